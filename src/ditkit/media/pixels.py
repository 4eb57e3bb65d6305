"""Pixels as bytes: decoded floats, and the hash of frames. Leaves out: files and pictures."""

import hashlib
from typing import Any

import numpy as np

from ditkit.errors import DitkitError, OutputError

ROUNDINGS = ("wan", "diffusers")


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
