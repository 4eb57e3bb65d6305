"""Still pictures: a file, a PIL image or an array to uint8 [H, W, 3], RGB.

Decided here: a camera's rotation tag (EXIF) is applied; what is transparent lies on white, as in the official VACE
code; 16-bit grey is scaled to 8 bits. Leaves out: colour profiles (numbers are taken as sRGB), and resizing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import RequestError

_MOVING = ("GIF", "PNG", "WEBP", "TIFF")  # formats of which only the first frame would be seen; MPO holds copies
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa")


def read_image(path: str | Path) -> np.ndarray:
    """The picture in a file, uint8 [H, W, 3].

    Raises:
        RequestError: there is no such file, it is not a picture, damaged, moving, or of a kind that 8 bits cannot hold.
    """
    from PIL import Image, UnidentifiedImageError

    asked = f"reading the picture {path}"
    if not Path(path).is_file():
        found = "that is a folder" if Path(path).is_dir() else "there is no such file"
        raise RequestError(asked, found, "Check the path")
    try:
        with Image.open(path) as picture:
            picture.load()
            return _from_pil(picture, asked)
    except UnidentifiedImageError:
        raise RequestError(asked, "it is not a picture of a known format", "Give a png, jpg or webp file") from None
    except Image.DecompressionBombError as error:  # PIL's guard against files that unpack to no end
        raise RequestError(asked, f"it is too large ({error})", "Make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(asked, f"it is damaged ({error})", "Save it again") from None


def as_image(value: Any) -> np.ndarray:
    """A path, PIL image, numpy array or torch tensor -> uint8 [H, W, 3].

    Arrays and tensors: uint8, or floats in [0, 1]; [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4 (alpha, on white).
    Raises RequestError for anything else, and where the shape leaves open which axis is the colour."""
    from PIL import Image

    if isinstance(value, str | Path):
        return read_image(value)
    if isinstance(value, Image.Image):
        try:
            return _from_pil(value, asked := "using a PIL image as a picture")
        except (OSError, SyntaxError, ValueError) as error:  # its file is read only now
            if isinstance(error, RequestError):
                raise
            raise RequestError(asked, f"it cannot be read ({error})", "Open it again") from None
    if hasattr(value, "detach"):  # a tensor; so nothing of torch is imported here
        value = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise RequestError(f"a {type(value).__name__} as a picture", "it is none",
                       "Give a path, a PIL image, a numpy array or a torch tensor")  # fmt: skip


def _from_pil(picture: Any, asked: str) -> np.ndarray:
    from PIL import Image, ImageOps

    if picture.format in _MOVING and getattr(picture, "n_frames", 1) > 1:
        raise RequestError(asked, f"it has {picture.n_frames} frames", "Give one frame of it as a picture")
    if 0 in picture.size:
        raise RequestError(asked, "it has no pixels", "Give another one")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        grey = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode not in _COLOURS:
        raise RequestError(
            asked, f"its pixels are of mode {picture.mode}, without a fixed range", "Save it with 8 bits"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


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
