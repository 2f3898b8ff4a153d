"""Every kind of picture becomes upright 8-bit RGB, or one clear line."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from arm_hf.modeling.images import IMAGE_EXTENSIONS, UnreadableImage, load_image, to_rgb


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def colours() -> Image.Image:
    """16 x 8: left half red, right half blue."""
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = (200, 20, 20)
    pixels[:, 8:] = (20, 20, 200)
    return Image.fromarray(pixels)


class TestModes:
    @pytest.mark.parametrize(
        "mode",
        [
            *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"),
            *("CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B", "I;16L"),
        ],
    )
    def test_every_mode_gives_rgb_of_the_same_size(self, mode):
        result = to_rgb(Image.new(mode, (5, 3)))
        assert (result.mode, result.size) == ("RGB", (5, 3))

    def test_sixteen_bits_are_scaled_not_clipped(self):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        expected = np.rint(ramp / 257.0).astype(np.uint8)
        for result in (load_image(encoded(Image.fromarray(ramp), "PNG")), to_rgb(ramp), to_rgb(Image.fromarray(ramp))):
            np.testing.assert_array_equal(np.asarray(result)[..., 0], expected)
        tiff = load_image(encoded(Image.fromarray(ramp), "TIFF"))
        np.testing.assert_array_equal(np.asarray(tiff)[..., 1], expected)

    def test_sixteen_bit_netpbm(self):
        data = b"P5 4 1 65535\n" + struct.pack(">4H", 0, 257, 32896, 65535)
        assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_float_images(self):
        grey = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
        assert np.asarray(to_rgb(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 128, 255]
        wide = np.array([[-1000.0, 0.0, 1000.0]], dtype=np.float32)
        assert np.asarray(to_rgb(Image.fromarray(wide)))[0, :, 0].tolist() == [0, 128, 255]

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_what_is_transparent_becomes_white(self, kind):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        image.paste((10, 20, 30, 255), (0, 0, 2, 4))
        result = load_image(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert (result.getpixel((0, 0)), result.getpixel((3, 0))) == ((10, 20, 30), (255, 255, 255))

    def test_transparent_palette_and_rgb_with_a_transparent_colour(self, colours):
        palette = colours.quantize(2)
        gif = load_image(encoded(palette, "GIF", transparency=palette.getpixel((0, 0))))
        assert gif.getpixel((0, 0)) == (255, 255, 255)
        png = load_image(encoded(colours, "PNG", transparency=(200, 20, 20)))
        assert (png.getpixel((0, 0)), png.getpixel((15, 0))) == ((255, 255, 255), (20, 20, 200))

    def test_cmyk_jpeg(self):
        cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
        red, green, blue = load_image(encoded(cyan, "JPEG", quality=95)).getpixel((4, 4))
        assert red < 10 and green > 245 and blue > 245

    def test_a_broken_or_alien_colour_profile_does_no_harm(self):
        cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
        rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for profile in (b"not a profile", rgb_profile):
            red, green, _ = load_image(encoded(cyan, "TIFF", icc_profile=profile)).getpixel((0, 0))
            assert red < 10 and green > 245


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, colours, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        result = load_image(encoded(colours, "PNG", exif=exif))
        assert result.size == (colours.size if orientation < 5 else colours.size[::-1])
        # Where red lies once the picture is upright: left, right, right, left; top, top, bottom, bottom.
        red_at = [(0, 0), (15, 0), (15, 7), (0, 7), (0, 0), (7, 0), (7, 15), (0, 15)][orientation - 1]
        assert result.getpixel(red_at) == (200, 20, 20)
        assert result.getexif().get(0x0112, 1) == 1

    def test_broken_exif_does_not_spoil_the_picture(self, colours):
        broken = encoded(colours, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
        assert load_image(broken).size == colours.size


class TestSources:
    def test_path_bytes_file_and_data_address_give_the_same(self, colours, tmp_path):
        import base64

        data = encoded(colours, "PNG")
        path = tmp_path / "übung 1.png"
        path.write_bytes(data)
        address = "data:image/png;base64," + base64.b64encode(data).decode()
        with path.open("rb") as file:
            results = [load_image(source) for source in (path, str(path), data, bytearray(data), file, address)]
        results.append(load_image(colours))
        for result in results:
            assert result.mode == "RGB" and result.tobytes() == colours.tobytes()

    def test_animation_gives_its_first_frame(self, colours):
        other = Image.new("RGB", colours.size, "green")
        result = load_image(encoded(colours, "WEBP", save_all=True, append_images=[other], lossless=True))
        assert result.getpixel((0, 0)) == (200, 20, 20)

    def test_unreachable_address_is_one_line(self):
        with pytest.raises(UnreadableImage, match=r"cannot read image 'http://127\.0\.0\.1:9/cat\.png'"):
            load_image("http://127.0.0.1:9/cat.png", timeout=2)

    def test_other_types_are_refused(self):
        for source in (3, None, {"image": 1}):
            with pytest.raises(TypeError, match="an image must be"):
                load_image(source)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size its data does not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class TestDamage:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_a_file_cut_short(self, kind, tmp_path):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(encoded(noise, kind)[: len(encoded(noise, kind)) // 2])
        with pytest.raises(UnreadableImage, match="cut") as caught:
            load_image(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "empty, broken, or in none of the formats"),
            (b"no image at all", "empty, broken, or in none of the formats"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats"),
            (png_of_size(0, 4), "."),
            (png_of_size(60_000, 60_000), "too many pixels"),
        ],
    )
    def test_no_image(self, data, message):
        with pytest.raises(UnreadableImage, match=message) as caught:
            load_image(data)
        assert "\n" not in str(caught.value)

    def test_no_file_and_folder(self, tmp_path):
        with pytest.raises(UnreadableImage, match="no such file"):
            load_image(tmp_path / "missing.jpg")
        with pytest.raises(UnreadableImage, match="it is a folder"):
            load_image(tmp_path)

    def test_a_lazy_pil_image_of_a_broken_file(self, colours):
        with pytest.raises(UnreadableImage, match="PIL image"):
            to_rgb(Image.open(io.BytesIO(encoded(colours.resize((200, 200)), "JPEG")[:-200])))

    @settings(max_examples=40, deadline=None)
    @given(st.binary(max_size=200), st.integers(0, 400))
    def test_any_damage_is_one_line_or_a_picture(self, noise, place):
        image = Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3))
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
            data = bytearray(encoded(image, kind))
            data[place : place + len(noise)] = noise
            try:
                assert load_image(bytes(data)).mode == "RGB"
            except UnreadableImage as error:
                assert "\n" not in str(error)


class TestArrays:
    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4), (1, 6, 5), (3, 6, 5), (4, 6, 5)])
    @pytest.mark.parametrize("kind", ["array", "tensor"])
    def test_shapes(self, shape, kind):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        result = to_rgb(array if kind == "array" else torch.from_numpy(array))
        assert (result.mode, result.size) == ("RGB", (5, 6))

    def test_channel_order_where_both_readings_fit(self):
        values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
        np.testing.assert_array_equal(np.asarray(to_rgb(values)), values)
        np.testing.assert_array_equal(np.asarray(to_rgb(torch.from_numpy(values))), values.transpose(1, 2, 0))

    def test_value_ranges(self):
        expected = [0, 51, 255]
        for values in (
            np.array([[0, 51, 255]], dtype=np.uint8),
            np.array([[0, 51, 255]], dtype=np.int64),
            np.array([[0, 51 * 257, 65535]], dtype=np.uint16),
            np.array([[0, 0.2, 1]], dtype=np.float32),
            np.array([[0, 51, 255]], dtype=np.float64),
            torch.tensor([[0, 51, 255]], dtype=torch.bfloat16),
            torch.tensor([[0.0, 0.2, 1.0]], requires_grad=True),
        ):
            assert np.asarray(to_rgb(values))[0, :, 0].tolist() == expected
        assert np.asarray(to_rgb(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((0, 4, 3)), "no pixels"),
            (np.zeros((2, 8, 8, 3)), "list of images"),
            (np.zeros((8, 8, 2)), r"1, 3 or 4 channels.*got \(8, 8, 2\)"),
            (np.zeros(8), "must have the shape"),
            (np.full((4, 4), -1.5), "not normalised"),
            (np.full((4, 4), np.nan), "must lie in"),
            (np.full((4, 4), 300), "must lie in"),
            (np.full((4, 4), "a"), "must hold numbers"),
        ],
    )
    def test_errors(self, array, message):
        with pytest.raises(UnreadableImage, match=message) as caught:
            to_rgb(array)
        assert "\n" not in str(caught.value)

    def test_the_source_is_left_alone(self, colours):
        before = colours.tobytes()
        to_rgb(colours).paste((0, 0, 0), (0, 0, 16, 8))
        assert colours.tobytes() == before


def test_extensions_are_those_pillow_knows():
    Image.init()
    assert set(IMAGE_EXTENSIONS) <= set(Image.registered_extensions())
