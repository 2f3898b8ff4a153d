"""Any picture a user may hand over, as one upright 8-bit RGB image.

Cameras, scanners and editors write pictures that lie on their side (EXIF), hold 16 bits, four inks, a palette or an
alpha channel. CLIP reads three channels of 8 bits. What cannot be read is one clear line, `UnreadableImage`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .downloads import DownloadError, download

# Pillow's names of the formats that are opened: photographs and drawings made of pixels. Others (EPS, PDF, WMF) would
# start foreign programs on a file of unknown origin.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI")
# fmt: off
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif",
    ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi",
)
# fmt: on

_DOWNLOAD_TIMEOUT = 60.0  # seconds


class UnreadableImage(ValueError):
    """A picture that cannot be used; the message is one line that names it and says why."""


def load_image(source: Any, timeout: float | None = _DOWNLOAD_TIMEOUT) -> Image.Image:
    """Return the picture as an upright 8-bit RGB image.

    Args:
        source: A path, an `http(s)://` address, a `data:image/...;base64,` string, an open binary file or bytes; or an
            image in memory as `to_rgb` takes it. Of an animation the first frame counts. Addresses of this machine and
            of private networks are refused unless the environment has ARM_HF_LOCAL_ADDRESSES=1.
        timeout: Seconds for a download; `None` waits for ever.

    Raises:
        UnreadableImage: If there is no such file, the server does not deliver a picture, the data is broken, cut short
            or no image, or it would unpack to more pixels than is safe (Pillow's limit, about 179 million).
        TypeError: If the source is of another type.
    """
    if isinstance(source, Image.Image | np.ndarray) or _is_tensor(source):
        return to_rgb(source)
    if isinstance(source, str | os.PathLike):
        source = os.fspath(source)
        if source.startswith(("http://", "https://")):
            return _decode(io.BytesIO(_download(source, timeout)), repr(source))
        if source.startswith("data:image/"):
            return _decode(io.BytesIO(_from_data_address(source)), f"{source[:30]!r}...")
        return _open_file(source)
    if isinstance(source, bytes | bytearray):
        return _decode(io.BytesIO(source), "from the bytes given")
    if hasattr(source, "read"):
        return _decode(source, repr(source.name) if hasattr(source, "name") else "from the open file given")
    raise TypeError(
        f"an image must be a path, an address, bytes, a PIL image, an array or a tensor, not {type(source).__name__}"
    )


def to_rgb(image: Any) -> Image.Image:
    """Return an image in memory as upright 8-bit RGB.

    PIL images: EXIF orientation is applied; what is transparent becomes white; 16-bit grey is scaled to 8 bits, not
    clipped; CMYK goes through its colour profile where it carries one.

    Args:
        image: A PIL image of any mode; or a NumPy array or torch tensor of shape (H, W), (H, W, C) or (C, H, W) with 1,
            3 or 4 channels in RGB(A) order. Where a shape can be read both ways, the channels of an array come last and
            those of a tensor first. Values are 0..255 (`uint8`, other integers), 0..65535 (`uint16`), 0..1 or, if any
            is above 1, 0..255 (floats), or false and true.

    Raises:
        UnreadableImage: If the image has no pixels, an impossible shape, or values out of range.
        TypeError: If it is neither a PIL image nor an array nor a tensor.
    """
    if isinstance(image, Image.Image):
        _require_pixels(image.size, "of PIL")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"cannot read the PIL image given: {_one_line(error)}") from error
        return _pil_to_rgb(_upright(image))
    if _is_tensor(image):
        tensor = image.detach().cpu()
        if tensor.dtype.is_floating_point:
            tensor = tensor.float()  # NumPy has no bfloat16
        return _pil_to_rgb(_array_to_pil(tensor.numpy(), "tensor", channels_first=True))
    if isinstance(image, np.ndarray):
        return _pil_to_rgb(_array_to_pil(image, "array", channels_first=False))
    raise TypeError(f"an image must be a PIL image, an array or a tensor, not {type(image).__name__}")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def _open_file(path: str) -> Image.Image:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise UnreadableImage(f"cannot read image {path!r}: it is a folder")
    try:
        with open(path, "rb") as file:
            return _decode(file, repr(path))
    except FileNotFoundError as error:
        raise UnreadableImage(f"cannot read image {path!r}: no such file") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"cannot read image {path!r}: {_one_line(error)}") from error


def _decode(file: Any, name: str) -> Image.Image:
    """Unpack all pixels now, so that damage shows here and not in the middle of the work."""
    Image.init()
    formats = [name_ for name_ in IMAGE_FORMATS if name_ in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow warns of 90 megapixels, of odd metadata and the like; where a picture comes out, all is well.
            warnings.filterwarnings("ignore", module="PIL")
            with Image.open(file, formats=formats) as image:
                _require_pixels(image.size, name)
                image.load()
                return to_rgb(image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(
            f"cannot read image {name}: it is empty, broken, or in none of the formats {', '.join(formats)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"cannot read image {name}: too many pixels ({_one_line(error)}); save a smaller copy"
        ) from error
    # Pillow's decoders answer broken data with nearly every kind of exception (OSError, SyntaxError, struct.error,
    # IndexError, zlib.error, ...); each means the same to the caller.
    except Exception as error:
        raise UnreadableImage(f"cannot read image {name}: {_one_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # The pixels are loaded already, so what fails here is the metadata: a picture with broken EXIF is a good picture.
    except (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return image.copy()


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode in ("CMYK", "LAB"):
        return _managed_to_rgb(image)
    return image.convert("RGB")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale one channel of 16 or 32 bits by what its type can hold, or, where the type does not say, by its maximum."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        scaled = values / 257.0
    elif low < 0 or high > 65535:
        scaled = (values - low) * (255.0 / (high - low))
    elif image.mode == "F" and high <= 1.0:
        scaled = values * 255.0
    elif high > 255:
        scaled = values / 257.0
    else:
        scaled = values
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _managed_to_rgb(image: Image.Image) -> Image.Image:
    """Convert through the colour profile; without one (or with a broken one) the plain formula must do for CMYK."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            profile: Any = ImageCms.createProfile("LAB")
        elif image.info.get("icc_profile"):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        else:
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        return image.convert("RGB") if converted is None else converted
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")


def _array_to_pil(array: np.ndarray, kind: str, channels_first: bool) -> Image.Image:
    channels = (1, 3, 4)
    shape = array.shape
    if array.ndim == 3 and shape[0] in channels and (channels_first or shape[2] not in channels):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels):
        hint = "; give a list of images instead of a batch" if array.ndim == 4 else ""
        raise UnreadableImage(
            f"an image {kind} must have the shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got {shape}{hint}"
        )
    _require_pixels((array.shape[1], array.shape[0]), f"{kind} of shape {shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(array, kind)))


def _to_8_bit(array: np.ndarray, kind: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return np.rint(array / 257.0).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise UnreadableImage(f"an image {kind} must hold numbers, got the type {array.dtype}")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # false for nan as well
        raise UnreadableImage(
            f"the values of an image {kind} of type {array.dtype} must lie in 0..255 or 0..1, got {low:g} to {high:g}; "
            "give the pixels as they are, not normalised"
        )
    scale = 255.0 if np.issubdtype(array.dtype, np.floating) and high <= 1 else 1.0
    return np.rint(array * scale).astype(np.uint8)


def _require_pixels(size: tuple[int, int], name: str) -> None:
    if min(size) < 1:
        raise UnreadableImage(f"cannot read image {name}: it has no pixels ({size[0]} x {size[1]})")


def _download(address: str, timeout: float | None) -> bytes:
    try:
        return download(address, timeout)
    except DownloadError as error:
        raise UnreadableImage(f"cannot read image {address!r}: {error}") from error


def _from_data_address(address: str) -> bytes:
    header, _, body = address.partition(",")
    if not header.endswith(";base64"):
        raise UnreadableImage(f"cannot read image {address[:30]!r}...: only base64 data addresses are understood")
    try:
        return base64.b64decode(body, validate=False)
    except binascii.Error as error:
        raise UnreadableImage(f"cannot read image {address[:30]!r}...: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
