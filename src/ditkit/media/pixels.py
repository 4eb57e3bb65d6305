"""Pixels as bytes: decoded floats, the hash of frames, and still pictures (a file, a PIL image, an array).

Decided here: a camera's rotation tag (EXIF) is applied; what is transparent lies on white, as in the official VACE
code; 16-bit grey is scaled to 8 bits. Leaves out: colour profiles (numbers are taken as sRGB), and resizing."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import DitkitError, OutputError, RequestError

ROUNDINGS = ("wan", "diffusers")
_MOVING = ("GIF", "PNG", "WEBP", "TIFF")  # formats of which only the first frame would be seen; MPO holds copies
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa")


def to_uint8(video: Any, rounding: str = "wan") -> np.ndarray:
    """What the VAE decodes -> frames: float [..., 3, T, H, W] in [-1, 1] -> uint8 [..., T, H, W, 3].

    ``video`` is a torch tensor on any device or a numpy array; values are taken as float32 and clamped.
    ``wan`` cuts the fraction off, as ``cache_video`` of Wan2.1 (``wan/utils/utils.py``) does; ``diffusers``
    rounds to the nearest, as its ``VaeImageProcessor.numpy_to_pil`` does: brighter by half a level on average.
    A value that is not finite is an error, for as a byte it would pass for a colour."""
    if rounding not in ROUNDINGS:
        raise OutputError(f"rounding {rounding!r}", "it is not known", f"Use one of {', '.join(ROUNDINGS)}")
    if hasattr(video, "detach"):  # a tensor; so nothing of torch is imported here
        video = video.detach().float().cpu().numpy()
    video = np.asarray(video)
    if video.ndim < 4 or video.shape[-4] != 3 or video.dtype.kind != "f":
        found, do = f"it is {video.dtype} {list(video.shape)}", "hand over floats of shape [..., 3, T, H, W] in [-1, 1]"
        raise OutputError("turning a video into bytes", found, do)
    frames = np.empty((*video.shape[:-4], *video.shape[-3:], 3), np.uint8)
    for index in range(video.shape[-3]):  # frame by frame: a long clip in float32 is big enough once
        frame = np.moveaxis(video[..., index, :, :], -3, -1).astype(np.float32)
        if not np.isfinite(frame).all():
            found = f"{np.count_nonzero(~np.isfinite(frame))} values of frame {index} are NaN or infinite"
            do = "Run again with dtype float32 and without caching, quantization or other attention kernels"
            raise DitkitError("turning the decoded video into bytes", found, do)
        level = (np.clip(frame, -1, 1) + np.float32(1)) / np.float32(2) * np.float32(255)
        frames[..., index, :, :, :] = np.rint(level) if rounding == "diffusers" else level
    return frames


def frames_sha256(video: np.ndarray) -> str:
    """Hex digest of the raw frames: dtype, shape, then the bytes in C order. The output hash of a run."""
    video = np.ascontiguousarray(video)
    digest = hashlib.sha256(f"{video.dtype.str} {list(video.shape)}\n".encode())
    digest.update(video.data)
    return digest.hexdigest()


def check_frames(video: np.ndarray) -> np.ndarray:
    """The clip itself, if it is uint8 [T, H, W, 3] with at least one frame and one pixel."""
    is_array = isinstance(video, np.ndarray)
    if is_array and video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3 and video.size:
        return video
    found = f"{video.dtype} {list(video.shape)}" if is_array else type(video).__name__
    raise OutputError("writing a clip", f"it is {found}", "Hand over a numpy array uint8 [T, H, W, 3]")


def read_image(path: str | Path) -> np.ndarray:
    """The picture in a file, uint8 [H, W, 3]. Raises RequestError where there is no such file, and for one that is no
    picture, damaged, moving, or of a kind that 8 bits cannot hold."""
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
