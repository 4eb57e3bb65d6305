"""Pictures of every kind that people bring, and those that are refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit import limits
from ditkit.errors import RequestError
from ditkit.media import as_image, image_and_remark, read_image

AVIF = pytest.param(
    "avif", marks=pytest.mark.skipif("AVIF" not in Image.registered_extensions().values(), reason="old")
)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (20, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "no_suffix"])
def test_a_file_without_loss(tmp_path, pixels, name):
    path, kind = tmp_path / name, {"a.webp": "webp"}.get(name, "png" if "." not in name else name[2:])
    Image.fromarray(pixels).save(path, format=kind, **({"lossless": True} if kind == "webp" else {}))
    for found in (read_image(path), read_image(str(path)), as_image(path), as_image(str(path))):
        np.testing.assert_array_equal(found, pixels)
        assert found.dtype == np.uint8
        assert found.flags.writeable


def test_jpeg(tmp_path):
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - flat).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_was_held_otherwise(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright[orientation])


def test_what_is_transparent_lies_on_white(tmp_path, pixels):
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[:10], alpha[10:15] = 255, 128
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(found[:10], pixels[:10])
    assert (found[15:] == 255).all()
    half = pixels[10:15] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(found[10:15] - half).max() <= 1
    for value in (np.dstack([pixels, alpha]), torch.from_numpy(np.dstack([pixels, alpha])).permute(2, 0, 1)):
        np.testing.assert_array_equal(as_image(value), found)


def test_a_palette_with_a_transparent_colour(tmp_path):
    picture = Image.new("P", (4, 2))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1] * 4)
    picture.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png")[0].tolist() == [[255, 0, 0], [255, 255, 255]] * 2
    picture.save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png")[0].tolist() == [[255, 0, 0], [0, 0, 255]] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_colours(tmp_path, mode):
    white = Image.new("RGB", (5, 3), "white").convert(mode)
    white.save(tmp_path / "a.tiff")
    found = read_image(tmp_path / "a.tiff")
    assert found.shape == (3, 5, 3)
    assert (found == 255).all()


def test_16_bits_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("value", [
    lambda x: x, lambda x: x.astype(np.float32) / 255, lambda x: torch.from_numpy(x), lambda x: Image.fromarray(x),
    lambda x: torch.from_numpy(x).permute(2, 0, 1), lambda x: torch.from_numpy(x).permute(2, 0, 1).double() / 255,
    lambda x: x.transpose(2, 0, 1), lambda x: torch.from_numpy(x).bfloat16().float() / 255,
])  # fmt: skip
def test_pixels_in_memory(pixels, value):
    np.testing.assert_array_equal(as_image(value(pixels)), pixels)


def test_bfloat16_pixels():
    picture = torch.tensor([0, 0.5, 1]).bfloat16().view(1, 3, 1).repeat(2, 1, 3)[..., None, :].flatten(1, 2)
    assert as_image(picture)[0, :, 0].tolist() == [0, 128, 255]


def test_grey_arrays(pixels):
    grey = pixels[..., 0]
    for value in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        np.testing.assert_array_equal(as_image(value), np.repeat(grey[..., None], 3, 2))


def test_the_caller_keeps_its_array(pixels):
    before = pixels.copy()
    as_image(pixels)[:] = 0
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(("value", "match"), [
    (np.zeros((3, 9, 3), np.uint8), "either its first or its last axis"),
    (np.zeros((9, 9, 2), np.uint8), "no axis is the colour"),
    (np.zeros((1, 9, 9, 3), np.uint8), "no axis is the colour"),
    (np.zeros((0, 9, 3), np.uint8), "no pixels"),
    (np.zeros((9, 8, 3), np.int64), "neither uint8"),
    (np.full((9, 8, 3), -0.1), r"not all in \[0, 1\]"),
    (np.full((9, 8, 3), 255.0), r"not all in \[0, 1\]"),
    (np.full((9, 8, 3), np.nan), r"not all in \[0, 1\]"),
    (7, "a int as a picture"),
    (Image.new("F", (3, 3)), "mode F"),
    (Image.new("I", (3, 3)), "mode I,"),
])  # fmt: skip
def test_no_picture(value, match):
    with pytest.raises(RequestError, match=match):
        as_image(value)


def test_no_file(tmp_path, pixels):
    with pytest.raises(RequestError, match="there is no such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(RequestError, match="that is a folder"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(RequestError, match="not a picture of a known format"):
        read_image(tmp_path / "text.png")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for end in (40, 300, len(whole) - 30):
        (tmp_path / "cut.png").write_bytes(whole[:end])
        with pytest.raises(RequestError, match=r"damaged|known format"):
            read_image(tmp_path / "cut.png")


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", AVIF])
def test_a_moving_picture(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a", format=kind, save_all=True, append_images=frames[1:])
    with pytest.raises(RequestError, match="it has 3 frames"):
        read_image(tmp_path / "a")


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RequestError, match="too large"):
        read_image(tmp_path / "a.png")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("extra", [
    chunk(b"iCCP", b"display\0\0" + zlib.compress(bytes(1_200_000))),
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 600_000)),
    chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"{}" * 600_000)),
    chunk(b"tEXt", b"workflow\0" + b"{}" * 600_000),
    chunk(b"tEXt", b"workflow\0" + b"{}" * 1_000_000) * 40,
    chunk(b"zTXt", b"workflow\0\0" + b"no zlib"), chunk(b"iTXt", b"no end"),
], ids=["iCCP", "zTXt", "iTXt", "tEXt", "80 MB", "damaged", "no name"])  # fmt: skip
def test_a_png_with_a_workflow_or_a_large_profile(tmp_path, pixels, extra):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    plain = (tmp_path / "a.png").read_bytes()
    for at in (33, plain.index(b"IEND") - 4):
        (tmp_path / "a.png").write_bytes(plain[:at] + extra + plain[at:])
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "webp", "tiff", AVIF])
def test_every_format_is_turned(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    colours = np.zeros((32, 48, 3), np.uint8)
    colours[:16, :24], colours[:16, 24:], colours[16:, :24] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(colours).save(tmp_path / "a", kind, exif=exif, quality=95)
    found, right = (read_image(tmp_path / name).astype(int) for name in ("a", "a.png"))
    assert found.shape == right.shape
    assert np.abs(found - right).mean() < 6


def test_a_photo_of_a_hundred_megapixels_is_read_small(tmp_path, monkeypatch):
    """The limit is low here; a real one takes a second."""
    monkeypatch.setattr(limits, "PICTURE_WHOLE", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    means = np.rot90(colours.reshape(16, 4, 24, 4, 3).mean((1, 3)), -1)
    for kind, most in {"png": 1, "tiff": 1, "webp": 2, "jpeg": 40}.items():
        Image.fromarray(colours).save(tmp_path / "a", kind, exif=exif, quality=100, lossless=True)
        found, remark = image_and_remark(tmp_path / "a")
        assert found.shape == (24, 16, 3)
        assert np.abs(found - means).max() <= most
        assert remark == f"{tmp_path / 'a'} has 6,144 pixels and is read at 16 x 24"
    clear = np.dstack([colours, np.full((64, 96), 255, np.uint8)])
    clear[:32, :, 3] = 0
    Image.fromarray(clear).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png")[:8] == 255).all()
    assert as_image(Image.fromarray(colours)).shape == (16, 24, 3)
    monkeypatch.setattr(limits, "PICTURE", 6143)
    with pytest.raises(RequestError, match=r"too large \(96 x 64 are more than 6,143 pixels"):
        read_image(tmp_path / "b.png")


@pytest.mark.slow
def test_a_photo_of_108_megapixels_says_nothing_of_bombs(tmp_path, recwarn, capfd):
    Image.new("RGB", (12000, 9000), (9, 9, 9)).save(tmp_path / "a.jpg", quality=10)
    assert read_image(tmp_path / "a.jpg").shape == (4500, 6000, 3)
    assert not recwarn
    assert capfd.readouterr() == ("", "")


def test_no_other_program_draws_a_picture(tmp_path):
    """Pillow gives Encapsulated PostScript to Ghostscript."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(RequestError, match="not a picture of a known format"):
        read_image(tmp_path / "a.png")
