"""Photos to try the page with: free ones that come with scikit-image and scikit-learn, else a drawn scene."""

from __future__ import annotations

from pathlib import Path

from arm_hf.sample_photos import Reader, drawn_scene, from_skimage, from_sklearn

# Chelsea the cat and the coffee: CC0; astronaut: NASA, public domain; temple (danielbuechele) and flower (vultilion) on
# Flickr: CC BY 2.0.
_PHOTOS: tuple[tuple[str, str, Reader], ...] = (
    ("temple", "temple, tree, sky", from_sklearn("china.jpg")),
    ("cat", "cat, wall", from_skimage("chelsea")),
    ("coffee", "cup, table", from_skimage("coffee")),
    ("astronaut", "person=woman|astronaut, wall", from_skimage("astronaut")),
    ("flower", "flower, leaf", from_sklearn("flower.jpg")),
)


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Write the photos that are to be had into a folder; return path and words of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, str]] = []
    for name, words, read in (*_PHOTOS, ("scene", "sky, grass, road", drawn_scene)):
        if name == "scene" and found:
            break
        try:
            picture = read()
        except (ImportError, OSError):  # the library is not here, or came without its pictures
            continue
        path = folder / f"{name}.jpg"
        picture.convert("RGB").save(path, quality=92)
        found.append((str(path), words))
    return found
