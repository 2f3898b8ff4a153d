// The overlay: a canvas drawn here, so that opacity, outlines and palette change at once and nothing is sent for it.
// `value` is {photo, labels, classes}: two pictures as data addresses (red of `labels` is the class, green its score),
// and [{id, name, share, score, vivid, colorblind}], the largest first.

const view = { opacity: 0.55, contours: false, colors: "vivid", pinned: null, hovered: null };
let shown = null;

const find = (selector) => element.querySelector(selector);

function loadImage(address) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = address;
  });
}

function pixels(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

// How far a pixel is from another class, as 1 (at the line), 2 (in the rim) or 0 (inside).
function rims(labels, width, height, reach) {
  const rim = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = y * width + x, label = labels[4 * at];
      if ((x > 0 && labels[4 * (at - 1)] !== label) || (y > 0 && labels[4 * (at - width)] !== label)) rim[at] = 1;
      for (let step = 1; step <= reach && !rim[at]; step++) {
        if ((x >= step && labels[4 * (at - step)] !== label) || (x + step < width && labels[4 * (at + step)] !== label)
          || (y >= step && labels[4 * (at - step * width)] !== label)
          || (y + step < height && labels[4 * (at + step * width)] !== label)) rim[at] = 2;
      }
    }
  }
  return rim;
}

function draw() {
  if (!shown) return;
  const { photo, labels, classes, rim, width, height } = shown;
  const canvas = find("canvas"), context = canvas.getContext("2d");
  const picture = context.createImageData(width, height), out = picture.data, below = photo.data, map = labels.data;
  const table = new Map(classes.map((one) => [one.id, rgb(one[view.colors])]));
  const chosen = view.hovered ?? view.pinned;
  for (let at = 0; at < width * height; at++) {
    const id = map[4 * at], color = table.get(id), other = chosen !== null && id !== chosen;
    let alpha = view.contours ? (rim[at] === 2 ? 1 : 0) : view.opacity;
    if (other) alpha = 0;
    const white = rim[at] === 1 && !other;
    const grey = (below[4 * at] + below[4 * at + 1] + below[4 * at + 2]) / 3;
    for (let channel = 0; channel < 3; channel++) {
      const base = other ? 0.45 * grey + 40 : below[4 * at + channel];
      out[4 * at + channel] = white ? 255 : base * (1 - alpha) + color[channel] * alpha;
    }
    out[4 * at + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function drawLegend() {
  const legend = find(".legend");
  legend.replaceChildren();
  for (const one of shown ? shown.classes : []) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.id = one.id;
    button.title = `${one.name}: score ${one.score.toFixed(2)}`;
    button.setAttribute("aria-pressed", String(view.pinned === one.id));
    for (const [kind, text] of [["swatch", ""], ["name", one.name], ["share", `${(100 * one.share).toFixed(one.share < 0.0995 ? 1 : 0)}%`]]) {
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text; // never as HTML: a label is whatever a visitor typed
      if (kind === "swatch") part.style.background = one[view.colors];
      button.append(part);
    }
    legend.append(button);
  }
}

function highlight(id) {
  if (view.hovered === id) return;
  view.hovered = id;
  draw();
}

async function show(value) {
  view.pinned = view.hovered = null;
  if (!value || !value.photo) {
    shown = null;
  } else {
    const [photo, map] = await Promise.all([loadImage(value.photo), loadImage(value.labels)]);
    const labels = pixels(map), { width, height } = labels;
    const reach = Math.max(3, Math.round(Math.max(width, height) / 220));
    shown = { photo: pixels(photo), labels, classes: value.classes, width, height, rim: rims(labels.data, width, height, reach) };
    const canvas = find("canvas");
    canvas.width = width;
    canvas.height = height;
    canvas.style.setProperty("--aspect", width / height);
    canvas.setAttribute("aria-label", "Photo with " + value.classes.map((one) => one.name).join(", "));
  }
  find(".empty").hidden = Boolean(shown);
  find(".stage").hidden = !shown;
  find(".tip").hidden = true;
  drawLegend();
  draw();
}

element.addEventListener("pointermove", (event) => {
  const tip = find(".tip"), canvas = find("canvas");
  if (!shown || event.target !== canvas) {
    if (tip) tip.hidden = true;
    return;
  }
  const box = canvas.getBoundingClientRect();
  const x = Math.min(shown.width - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * shown.width)));
  const y = Math.min(shown.height - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * shown.height)));
  const at = 4 * (y * shown.width + x), id = shown.labels.data[at];
  const one = shown.classes.find((candidate) => candidate.id === id);
  tip.textContent = `${one.name} · ${(shown.labels.data[at + 1] / 255).toFixed(2)}`;
  tip.hidden = false;
  const stage = find(".stage").getBoundingClientRect();
  const left = event.clientX - stage.left + 14, room = stage.width - tip.offsetWidth - 4;
  tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
  tip.style.top = `${Math.max(0, event.clientY - stage.top - 34)}px`;
});
element.addEventListener("pointerleave", () => {
  find(".tip").hidden = true;
  highlight(null);
});
element.addEventListener("pointerover", (event) => {
  const button = event.target.closest(".legend button");
  highlight(button ? Number(button.dataset.id) : null);
});
element.addEventListener("focusin", (event) => {
  const button = event.target.closest(".legend button");
  if (button && button.matches(":focus-visible")) highlight(Number(button.dataset.id));
});
element.addEventListener("focusout", () => highlight(null));
element.addEventListener("click", (event) => {
  const button = event.target.closest(".legend button");
  if (!button) return;
  const id = Number(button.dataset.id);
  view.pinned = view.pinned === id ? null : id;
  for (const one of element.querySelectorAll(".legend button")) {
    one.setAttribute("aria-pressed", String(Number(one.dataset.id) === view.pinned));
  }
  draw();
});

// The page's opacity, outline and palette fields call this.
window.armhfView = (opacity, contours, safe) => {
  Object.assign(view, { opacity, contours, colors: safe ? "colorblind" : "vivid" });
  drawLegend();
  draw();
};
watch("value", () => show(props.value));
show(props.value);
