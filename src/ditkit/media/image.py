"""Still pictures: a file, a PIL image, an array.

Decided here: a camera's rotation tag (EXIF) is applied; what is transparent lies on white, as in the official VACE
code; 16-bit grey is scaled to 8 bits; a picture of more than PICTURE_WHOLE pixels is brought down by a whole factor.
Leaves out: colour profiles (numbers are taken as sRGB), and resizing to a size that is asked for."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ditkit import limits
from ditkit.errors import RequestError
from ditkit.reading import open_ordinary

from . import png
from .guard import guarded, said

_NOT_MOVING = ("MPO", "PSD")  # their further frames are copies in other sizes, or layers
_PROGRAMS = ("EPS", "WMF")  # Pillow has another program draw these
_THRICE = ("WEBP", "AVIF")
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa")


def read_image(path: str | Path) -> np.ndarray:
    """The picture in a file, uint8 [H, W, 3]. Raises RequestError where there is no such file, and for one that is no
    picture, damaged, moving, too large, or of a kind that 8 bits cannot hold."""
    return image_and_remark(path)[0]


def image_and_remark(path: str | Path) -> tuple[np.ndarray, str]:
    """``read_image``, and what is to be said of it: that it was read smaller than it is, or nothing."""
    from PIL import Image, UnidentifiedImageError

    asked = f"reading the picture {path}"
    with opened(path, asked) as stream, guarded(asked, RequestError):
        whole = png.lean(stream) if stream.read(8) == png.SIGNATURE else stream
        whole.seek(0)
        try:
            Image.init()
            picture = Image.open(whole, formats=[name for name in Image.ID if name not in _PROGRAMS])
        except UnidentifiedImageError:
            raise RequestError(asked, "it is not a picture of a known format", "Give a png, jpg or webp file") from None
        except Image.DecompressionBombError as e:  # beyond what Pillow was told to allow
            raise RequestError(asked, f"it is too large ({said(e)})", "Make it smaller first") from None
        with picture:
            check_size(picture, asked)
            wide, high = picture.size
            if (factor := _factor(wide, high)) > 1:
                picture.draft(None, (wide // factor, high // factor))  # a jpg is decoded small; others stay as they are
            pixels = _from_pil(picture, asked, os.fstat(stream.fileno()).st_size)
    if pixels.shape[0] * pixels.shape[1] == wide * high:
        return pixels, ""
    return pixels, f"{path} has {wide * high:,} pixels and is read at {pixels.shape[1]} x {pixels.shape[0]}"


def check_size(picture: Any, asked: str) -> None:
    """Raise RequestError for a PIL image without pixels, or with more than its format's limit; it is not decoded."""
    wide, high = picture.size
    most = limits.PICTURE_THRICE if picture.format in _THRICE else limits.PICTURE
    if 0 in (wide, high):
        raise RequestError(asked, "it has no pixels", "Give another one")
    if wide * high > most:
        found = f"it is too large ({wide} x {high} are more than {most:,} pixels)"
        raise RequestError(asked, found, "Make it smaller first")


def opened(path: str | Path, asked: str) -> BinaryIO:
    """An ordinary file. Raises RequestError."""
    try:
        return open_ordinary(path)
    except FileNotFoundError:
        found = "it is a link to what is not there" if os.path.islink(path) else "there is no such file"
    except IsADirectoryError:
        found = "that is a folder"
    except (OSError, ValueError) as e:  # a path with a zero in it
        found = "that is a folder" if os.path.isdir(path) else f"it cannot be read ({said(e).lower()})"
    raise RequestError(asked, found, "Check the path") from None


def as_image(value: Any) -> np.ndarray:
    """A path, PIL image, numpy array or torch tensor -> uint8 [H, W, 3].

    Arrays and tensors: uint8, or floats in [0, 1]; [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4 (alpha, on white).
    Raises RequestError for anything else, and where the shape leaves open which axis is the colour."""
    from PIL import Image

    if isinstance(value, str | Path):
        return read_image(value)
    if isinstance(value, Image.Image):
        asked = "using a PIL image as a picture"
        with guarded(asked, RequestError, "Open it again", "it cannot be read"):  # its file is read only now
            return _from_pil(value, asked)
    if hasattr(value, "detach"):  # a tensor; so nothing of torch is imported here
        value = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise RequestError(f"a {type(value).__name__} as a picture", "it is none",
                       "Give a path, a PIL image, a numpy array or a torch tensor")  # fmt: skip


def flat(picture: Any) -> np.ndarray:
    """A PIL image of 8 bits, on white where it is transparent: uint8 [H, W, 3]."""
    from PIL import Image

    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def _from_pil(picture: Any, asked: str, size: int = 0) -> np.ndarray:
    if picture.format not in _NOT_MOVING and getattr(picture, "is_animated", False):
        count = picture.n_frames if size <= limits.COUNTED else "many"
        raise RequestError(asked, f"it has {count} frames", "Give one frame of it as a picture")
    check_size(picture, asked)
    picture = upright(picture)
    if picture.mode not in _COLOURS and not picture.mode.startswith("I;16"):
        found = f"its pixels are of mode {picture.mode}, without a fixed range"
        raise RequestError(asked, found, "Save it with 8 bits")
    if (factor := _factor(*picture.size)) > 1:
        return _reduced(picture, factor)
    return _bytes(picture)


def upright(picture: Any) -> Any:
    """``picture`` as its EXIF or XMP says that it was taken."""
    from PIL import Image

    turn = Image.Transpose
    told = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
            6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    picture.load()  # some formats know their EXIF only then
    orientation = picture.getexif().get(0x0112, 1)
    return picture.transpose(told[orientation]) if orientation in told else picture


def _bytes(picture: Any) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        grey = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return flat(picture)


def _factor(wide: int, high: int) -> int:
    """By how much a picture is brought down: the least power of 2 that makes PICTURE_WHOLE pixels of it."""
    factor = 1
    while wide * high > limits.PICTURE_WHOLE * factor**2:
        factor *= 2
    return factor


def _reduced(picture: Any, factor: int) -> np.ndarray:
    """Means of ``factor`` x ``factor`` pixels, strip by strip: a large picture is in memory once."""
    from PIL import Image

    wide, high = picture.size
    step = 64 * factor
    strips = (picture.crop((0, top, wide, min(top + step, high))) for top in range(0, high, step))
    return np.concatenate([np.asarray(Image.fromarray(_bytes(strip)).reduce(factor)) for strip in strips])


def _from_array(array: np.ndarray) -> np.ndarray:
    asked = f"an array {array.dtype} {list(array.shape)} as a picture"
    if not array.size:
        raise RequestError(asked, "it has no pixels", "Give another one")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise RequestError(asked, "its values are not all in [0, 1]", "Scale it to [0, 1], or give uint8")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise RequestError(asked, "it is neither uint8 nor of floats", "Convert it to uint8 in 0 to 255")
    array = array[..., None] if array.ndim == 2 else array
    colour = [axis for axis in (0, 2) if array.ndim == 3 and array.shape[axis] in (1, 3, 4)]
    if len(colour) != 1:
        found = "either its first or its last axis could be the colour" if colour else "no axis is the colour"
        raise RequestError(asked, found, "Give [H, W, 3], best as a PIL image")
    array = np.moveaxis(array, colour[0], 2)
    if array.shape[2] == 4:
        from PIL import Image

        return _from_pil(Image.fromarray(np.ascontiguousarray(array)), asked)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")
