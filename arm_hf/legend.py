"""The legend of an overlay, and letters that can be read in any script the machine has a font for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from arm_hf.colors import Color

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Drawn where a label holds letters that Pillow's own font lacks, if the machine has one of them.
_OTHER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msgothic.ttc",
)
_MISSING = "\uffff"  # no font holds this code point: what is drawn for it is drawn for every missing letter


@dataclass(frozen=True)
class Segment:
    """What a legend says about one class of a label map.

    Attributes:
        id: Index of the class in the label map.
        label: Its name.
        color: Red, green and blue, 0..255 each.
        pixels: Number of pixels of the class.
        share: The same as a fraction of the picture, 0..1.
    """

    id: int
    label: str
    color: Color
    pixels: int
    share: float


_PAPER, _INK, _FAINT_INK, _EDGE = (252, 252, 250), (28, 30, 34), (110, 114, 120), (198, 200, 204)
MOST_ENTRIES = 36


def add_legend(picture: Image.Image, found: list[Segment], shares: bool = True) -> Image.Image:
    """Add the legend where the picture leaves more room: below if it is wide, else at its right.

    Args:
        picture: What to add it to.
        found: The classes, in the order of the legend.
        shares: Write each class's share of the area behind its name.
    """
    size = text_size(picture)
    pad, row = round(1.1 * size), round(1.75 * size)
    below = picture.width > 1.15 * picture.height

    most = MOST_ENTRIES
    if not below:
        most = min(MOST_ENTRIES, max(8, (picture.height - 2 * pad) // row))
    shown = found if len(found) <= most else found[: most - 1]
    entries: list[tuple[Color | None, str, str]] = [
        (segment.color, segment.label, _percent(segment.share) if shares else "") for segment in shown
    ]
    if len(shown) < len(found):
        rest = found[len(shown) :]
        entries.append((None, f"+{len(rest)} more", _percent(sum(segment.share for segment in rest)) if shares else ""))

    widest_label = picture.width - 2 * pad if below else max(16 * size, picture.width)
    cells = [_Cell(color, label, share, size, min(widest_label, 22 * size)) for color, label, share in entries]
    cell_width = max(cell.width for cell in cells)
    columns = max(1, min((picture.width - pad) // (cell_width + pad), len(cells))) if below else 1
    rows = math.ceil(len(cells) / columns)
    columns = math.ceil(len(cells) / rows)
    legend_width, legend_height = columns * (cell_width + pad) + pad, rows * row + 2 * pad

    if below:
        canvas = Image.new("RGB", (max(picture.width, legend_width), picture.height + legend_height), _PAPER)
        left, top = 0, picture.height
        spare = max(0, picture.width - legend_width) // columns
        cell_step = cell_width + pad + min(spare, 3 * pad)
    else:
        canvas = Image.new("RGB", (picture.width + legend_width, max(picture.height, legend_height)), _PAPER)
        left, top, cell_step = picture.width, 0, 0
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for index, cell in enumerate(cells):
        column, line = divmod(index, rows)  # the order runs down the columns
        cell.draw(draw, left + pad + column * cell_step, top + pad + line * row, row, cell_width)
    return canvas


def text_size(picture: Image.Image) -> int:
    """Return the height of letters that can be read when the whole picture is fitted to a screen."""
    return max(14, round(max(picture.size) / 42))


class _Cell:
    """One line of the legend: colour, label, share."""

    def __init__(self, color: Color | None, label: str, share: str, size: int, widest_label: int):
        self.color, self.share, self.size = color, share, size
        self.font = font_for(label, size)
        self.share_font = ImageFont.load_default(size)
        self.label = shorten(drawable(label, self.font), self.font, widest_label)
        self.swatch = round(1.5 * size)
        self.gap = round(0.6 * size)
        self.share_width = math.ceil(self.share_font.getlength("99.9%"))
        self.width = self.swatch + 2 * self.gap + math.ceil(self.font.getlength(self.label)) + self.share_width

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int, row: int, width: int) -> None:
        middle = y + row // 2
        if self.color is not None:
            half = round(0.48 * self.size)
            box = (x, middle - half, x + self.swatch, middle + half)
            draw.rounded_rectangle(box, radius=max(2, self.size // 4), fill=self.color, outline=_EDGE)
        ink = _INK if self.color is not None else _FAINT_INK
        # "lm": the same baseline in every cell, whatever letters the label holds.
        draw.text((x + self.swatch + self.gap, middle), self.label, fill=ink, font=self.font, anchor="lm")
        draw.text((x + width, middle), self.share, fill=_FAINT_INK, font=self.share_font, anchor="rm")


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def shorten(text: str, font: Font, widest: float) -> str:
    """Cut the text to the width given, with an ellipsis where something is missing.

    Args:
        text: Any text.
        font: What it is drawn with.
        widest: Room in pixels.
    """
    if font.getlength(text) <= widest:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= widest:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…"


def font_for(text: str, size: int) -> Font:
    """Return Pillow's own font, or one of the machine's if that knows more of the text's letters.

    Args:
        text: What is to be drawn.
        size: Height of the letters in pixels.
    """
    best = ImageFont.load_default(size)
    missing = _missing_letters(text, best)
    for name in _OTHER_FONTS if missing else ():
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if len(now_missing := _missing_letters(text, font)) < len(missing):
            best, missing = font, now_missing
        if not missing:
            break
    return best


def _missing_letters(text: str, font: Font) -> set[str]:
    absent = bytes(font.getmask(_MISSING))
    return {letter for letter in set(text) if not letter.isspace() and bytes(font.getmask(letter)) == absent}


def drawable(text: str, font: Font) -> str:
    """Write letters that no font at hand can draw as their code, so that two labels never look alike.

    Args:
        text: What is to be drawn.
        font: What it is drawn with.
    """
    missing = _missing_letters(text, font)
    return "".join(f"\\u{ord(letter):04x}" if letter in missing else letter for letter in text)
