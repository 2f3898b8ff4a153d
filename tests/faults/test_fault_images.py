"""Pictures that are broken, odd or hostile, through the command line and through the pipeline."""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

GROUP = "images"
Size = tuple[int, int] | None  # width and height of the answer; None where a line may come too
REFUSED = (0, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def png(width: int, height: int, body: bytes, *extra: tuple[bytes, bytes], depth: int = 1) -> bytes:
    """A grey PNG whose header says this size, whatever its body holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def damaged(draw: Callable[..., Image.Image]) -> Iterator[tuple[str, bytes, Size]]:
    """Cut short or overwritten at random places."""
    moment, image = random.Random(0), draw(48, 40)
    for kind, end, count in (("JPEG", "jpg", 8), ("PNG", "png", 8), ("WEBP", "webp", 4), ("GIF", "gif", 4)):
        whole = encoded(image, kind)
        for number in range(count):
            place = moment.randrange(1, len(whole))
            yield f"cut_{kind}_{number}.{end}", whole[:place], None
            bits = bytearray(whole)
            bits[moment.randrange(len(bits))] ^= 1 << moment.randrange(8)
            yield f"flipped_{kind}_{number}.{end}", bytes(bits), None


def hostile(draw: Callable[..., Image.Image]) -> Iterator[tuple[str, bytes, Size]]:
    """Files that unpack to far more than they are, or are no pictures."""
    rows = zlib.compress(b"\0" * (1 + 20_000 // 8) * 12_000, 9)
    yield "bomb_valid.png", png(20_000, 12_000, rows), REFUSED  # 240 million pixels in 30 kB
    yield "bomb_header.png", png(60_000, 60_000, zlib.compress(b"\0" * 100)), REFUSED
    yield "bomb_gif.gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",", REFUSED
    text = b"Comment\0\0" + zlib.compress(b"a" * (1 << 27), 9)
    image = Image.new("L", (8, 8))
    body = zlib.compress(b"\0" * 9 * 8)
    yield "bomb_text.png", png(8, 8, body, (b"zTXt", text), depth=8), None
    yield "header_lies.png", png(3000, 3000, body, depth=8), None
    yield "zero_wide.png", png(0, 8, body, depth=8), REFUSED
    yield "zero_bytes.jpg", b"", REFUSED
    yield "zeros.png", b"\0" * 5000, REFUSED
    yield "text.jpg", b"not a picture\n", REFUSED
    yield "page.png", b"<!doctype html><html></html>", REFUSED
    yield "vector.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', REFUSED
    yield "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", REFUSED
    yield "png_in_jpg.jpg", encoded(image, "PNG"), (8, 8)
    yield "jpg_in_png.png", encoded(draw(40, 24), "JPEG"), (40, 24)
    yield "webp_in_gif.gif", encoded(draw(40, 24), "WEBP"), (40, 24)
    yield "tiff_in_bmp.bmp", encoded(draw(40, 24), "TIFF"), (40, 24)


def unusual(draw: Callable[..., Image.Image]) -> Iterator[tuple[str, bytes, Size]]:
    """Good pictures of rare kinds."""
    image = draw(40, 24)
    frames = {"save_all": True, "append_images": [draw(40, 24, 1), draw(40, 24, 2)], "duration": 40}
    for kind, end in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "apng"), ("TIFF", "tif")):
        yield f"moving.{end}", encoded(image, kind, **frames), (40, 24)
    yield "cmyk.jpg", encoded(image.convert("CMYK"), "JPEG"), (40, 24)
    yield "cmyk.tif", encoded(image.convert("CMYK"), "TIFF"), (40, 24)
    yield "lab.tif", encoded(image.convert("LAB"), "TIFF"), (40, 24)
    grey = np.asarray(image.convert("L"))
    yield "sixteen.png", encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), (40, 24)
    yield "sixteen.tif", encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), (40, 24)
    yield "thirty_two.tif", encoded(Image.fromarray(grey.astype(np.int32) * 100_000), "TIFF"), (40, 24)
    holes = grey.astype(np.float32)
    holes[::3, ::2] = np.nan
    holes[1, 1] = np.inf
    yield "nan.tif", encoded(Image.fromarray(holes), "TIFF"), (40, 24)
    for mode in ("RGBA", "LA", "P", "1", "L"):
        yield f"mode_{mode}.png", encoded(image.convert(mode), "PNG"), (40, 24)
    yield "clear.png", encoded(Image.new("RGBA", (40, 24), (0, 0, 0, 0)), "PNG"), (40, 24)
    yield "palette.png", encoded(image.quantize(7), "PNG", transparency=3), (40, 24)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned_{turn}.jpg", encoded(image, "JPEG", exif=exif), (40, 24) if turn < 5 else (24, 40)


SIZES = [(1, 1), (2, 1), (1, 300), (300, 1), (20, 4000), (4000, 20), (1, 5000), (5000, 1), (3, 7000), (17, 15)]


def extreme(draw: Callable[..., Image.Image]) -> Iterator[tuple[str, bytes, Size]]:
    for width, height in SIZES:
        yield f"size_{width}x{height}.png", encoded(draw(width, height), "PNG"), (width, height)


@pytest.fixture
def album(tmp_path: Path, draw: Callable[..., Image.Image]) -> tuple[Path, dict[str, Size]]:
    """A folder of all of them, with the size that the answer must have."""
    folder, sizes = tmp_path / "album", {}
    folder.mkdir()
    for kinds in (damaged, hostile, unusual):
        for name, data, size in kinds(draw):
            (folder / name).write_bytes(data)
            sizes[name] = size
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    sizes["gone.jpg"] = REFUSED
    names = ["two\nlines.png", "red\x1b[31m.png", "\u202eltr.png", "a b'c\"d.png", "dot..png"]
    if os.name == "posix":
        names.append(os.fsdecode(b"caf\xe9.png"))  # no UTF-8
    for name in names:
        (folder / name).write_bytes(encoded(draw(12, 9), "PNG"))
        sizes[name] = (12, 9)
    return folder, sizes


def printable(text: str) -> bool:
    return all(sign == "\n" or (sign.isprintable() and sign != "\x7f") for sign in text)


def test_a_folder_of_them_through_the_command(faults, cli, album, models, tmp_path):
    folder, sizes = album
    out = tmp_path / "out"
    done = cli("segment", folder, "--labels", "cat,dog,sky", "--model", models / "clip", "--templates", "single",
               "--device", "cpu", "--out", out, "--no-overlay", "--workers", 0)  # fmt: skip
    skipped = [line for line in done.err.splitlines() if line.startswith("arm-hf: skipped: ")]
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]
    told = {record["image"]: record for record in records if "image" in record}
    with faults.case(GROUP, "the run as a whole") as case:
        assert not done.crash, done.crash
        assert done.code == 1 and told.keys() == sizes.keys(), done.err
        assert len(skipped) == sum("skipped" in record for record in told.values())
        assert printable(done.out + done.err)
        case.whole(out)
        case.right()
    for name, size in sizes.items():
        with faults.case(GROUP, f"command: {name!r}") as case:
            record = told[name]
            if "skipped" in record:
                assert size in (None, REFUSED), record
                case.line(record["skipped"])
                continue
            assert size != REFUSED, "no picture, and yet an answer"
            legend = json.loads((out / record["legend"]).read_text(encoding="utf-8"))
            with Image.open(out / record["labels"]) as labels:
                assert labels.size == (legend["width"], legend["height"])
                assert size is None or labels.size == size
                assert np.asarray(labels).max() < 3
            assert sum(segment["pixels"] for segment in legend["segments"]) == legend["width"] * legend["height"]
            case.right()


def test_one_by_one_through_the_pipeline(faults, album, pipe):
    folder, sizes = album
    for name, size in sizes.items():
        with faults.case(GROUP, f"pipeline: {name!r}") as case:
            try:
                result = pipe(folder / name, candidate_labels="cat,dog,sky", semantic=True)
            except ValueError as error:
                assert size in (None, REFUSED), error
                case.line(str(error))
                continue
            assert size != REFUSED
            assert size is None or result["semantic_map"].shape == size[::-1]
            assert np.isfinite(result["confidence"]).all()
            case.right()


def test_sizes_with_pictures_for_people(faults, cli, models, tmp_path, draw, pipe):
    folder, out = tmp_path / "sizes", tmp_path / "out"
    folder.mkdir()
    for name, data, _ in extreme(draw):
        (folder / name).write_bytes(data)
    done = cli("segment", folder, "--labels", "cat,dog", "--model", models / "full", "--device", "cpu", "--out", out,
               "--window", 64, "--workers", 0, "--contours")  # fmt: skip
    for width, height in SIZES:
        with faults.case(GROUP, f"command: {width} x {height}") as case:
            assert done.code == 0, done.err + done.crash
            with Image.open(out / f"size_{width}x{height}.png") as labels:
                assert labels.size == (width, height)
            case.parses(out / f"size_{width}x{height}_overlay.png")
            case.right()
        with faults.case(GROUP, f"pipeline: {width} x {height}") as case:
            found = pipe(draw(width, height), candidate_labels="cat,dog")
            assert all(each["mask"].size == (width, height) for each in found)
            assert sum(int(np.asarray(each["mask"]).astype(bool).sum()) for each in found) == width * height
            case.right()


def test_sizes_in_an_evaluation(faults, cli, models, tmp_path, draw, labelled):
    """Labels are counted at the picture's own size."""
    data, out = labelled(len(SIZES)), tmp_path / "out"
    for number, (width, height) in enumerate(SIZES):
        draw(width, height, number).save(data / "images" / f"{number:03}.png")
        Image.new("L", (width, height), number % 3).save(data / "labels" / f"{number:03}.png")
    done = cli("evaluate", "--data", data, "--methods", "clearclip", "--model", models / "full", "--device", "cpu",
               "--out", out, "--pictures", 1)  # fmt: skip
    with faults.case(GROUP, "evaluate: the run as a whole") as case:
        assert done.code == 0, done.err + done.crash
        case.whole(out)
        case.right()
    counts = np.load(out / "confusion.npz")["row clearclip"] if done.code == 0 else np.zeros((3, 4))
    for label in range(3):
        with faults.case(GROUP, f"evaluate: pixels of label {label}") as case:
            assert counts[label].sum() == sum(w * h for place, (w, h) in enumerate(SIZES) if place % 3 == label)
            case.right()


def test_arrays(faults, pipe):
    good = np.linspace(0, 1, 12 * 9 * 3).reshape(12, 9, 3)
    hole = good.copy()
    hole[3, 3, 1] = np.nan
    arrays: dict[str, tuple[Any, bool]] = {
        "floats": (good, True),
        "floats to 255": (good * 255, True),
        "half floats": (good.astype(np.float16), True),
        "bfloat16": (torch.from_numpy(good).permute(2, 0, 1).bfloat16(), True),
        "booleans": (good > 0.5, True),
        "channels first": ((good * 255).astype(np.uint8).transpose(2, 0, 1), True),
        "strided": ((good * 255).astype(np.uint8)[::-2, ::-1], True),
        "read-only": (np.broadcast_to(np.uint8(7), (12, 9, 3)), True),
        "nan": (hole, False),
        "infinite": (np.full((12, 9, 3), np.inf), False),
        "negative": (good - 0.5, False),
        "too bright": (good * 1e9, False),
        "complex": (good.astype(complex), False),
        "objects": (good.astype(object), False),
        "text": (np.full((12, 9, 3), "a"), False),
        "empty": (np.zeros((0, 9, 3)), False),
        "one number": (np.float32(3), False),
        "five axes": (np.zeros((1, 1, 12, 9, 3)), False),
        "seven channels": (np.zeros((12, 9, 7)), False),
        "a number": (3, False),
        "nothing": (b"", False),
    }
    for name, (array, is_good) in arrays.items():
        with faults.case(GROUP, f"array: {name}") as case:
            try:
                result = pipe(array, candidate_labels="cat,dog", semantic=True)
            except (ValueError, TypeError) as error:
                assert not is_good, error
                case.line(str(error))
                continue
            assert is_good and result["semantic_map"].shape in ((12, 9), (6, 9))
            case.right()
