"""Write a clip where it was asked for, in the format that the path's suffix names; one function a format.

| suffix | what | loses |
|---|---|---|
| .mp4 | H.264, yuv420p, BT.709 limited range, card in the container's metadata (``ditkit``) | chroma halved, CRF 16 |
| .gif | one palette of 255 colours for the whole clip, looped, card in the comment | colours |
| .png | a folder ``NAME/0000.png``, ``NAME/0001.png``, ...; card as text of the first | nothing |
| .npz | arrays ``video`` uint8 [T, H, W, 3], ``fps`` and ``card`` | nothing |

The same frames and card give the same bytes. They are made in memory: an encoded clip is small beside its frames, and a
disk that fails cannot confuse an encoder."""

import io
import math
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import MissingDependency, OutputError, nearest

from . import card as cards
from . import files
from .card import Card
from .pixels import check_frames

CRF = 16  # x264's own default is 23; 18 is commonly taken for visually lossless
GIF_COLORS = 255  # one of 256 stays free for "as before", which keeps still regions small
GIF_MAX_FPS = 50  # browsers slow down anything with a shorter delay than 20 ms


def write_video(
    path: str | Path, video: np.ndarray, fps: float, manifest: Mapping[str, Any] | None = None, crf: int = CRF
) -> Path:
    """Write ``video`` uint8 [T, H, W, 3] and return the path of the file, or of the folder of frames for ``.png``.

    A card with fps, frame hash and ``manifest`` goes into the file, and with a manifest also beside it as
    ``NAME.json``. What was there before is replaced; parents are created. ``crf`` is for mp4 only.

    Raises OutputError for an unknown suffix, an odd size for mp4, a manifest that is not JSON, a path that cannot be
    written. Then nothing new is left at the path."""
    check_frames(video)
    target = check_writable(path, width=video.shape[2], height=video.shape[1], fps=fps)
    path = Path(path)
    suffix = path.suffix.lower()
    if crf != CRF and suffix != ".mp4":
        raise OutputError(f"crf {crf} for {path}", "only .mp4 has one", "Leave it out, or choose .mp4")
    if not 0 <= crf <= 51:
        raise OutputError(f"crf {crf}", "it is out of range", "Use 0 (best) to 51")
    card = cards.make_card(video, fps, manifest, path.suffix)
    content = mp4(video, card, crf) if suffix == ".mp4" else FORMATS[suffix](video, card)
    beside = path.with_suffix(".json")
    files.write_together({target: content, beside: None if manifest is None else cards.pretty(card)})
    return target


def check_writable(
    path: str | Path, *, width: int | None = None, height: int | None = None, fps: float | None = None
) -> Path:
    """Fail before a long run rather than after it: suffix, encoder, folder, room for a first block, what is there.

    Creates the parents; returns the path that will be written. Size and fps are checked if given."""
    path = Path(path)
    suffix, asked = path.suffix.lower(), f"writing {path}"
    if suffix not in FORMATS:
        hint = nearest(suffix, FORMATS) if suffix else ""
        found = f"{suffix or 'a name without suffix'} is no known format{hint}"
        raise OutputError(asked, found, f"Use {', '.join(FORMATS)}")
    if fps is not None and not (0 < fps < math.inf):
        raise OutputError(f"{fps} frames per second", "it is out of range", "Use a positive number")
    if suffix == ".gif" and fps is not None and fps > GIF_MAX_FPS:
        found = f"viewers show at most {GIF_MAX_FPS}"
        raise OutputError(f"a gif of {fps:g} frames per second", found, "Use .mp4 or fewer")
    if suffix == ".mp4":
        _check_mp4(asked, width or 0, height or 0)
    target = path.with_suffix("") if suffix == ".png" else path
    files.probe(target)
    if suffix == ".png":
        _check_folder(target)
    elif os.path.isdir(target):
        raise OutputError(asked, "it is a folder", f"Name a file in it, such as {target / 'clip'}{suffix}")
    cards.check_sidecar(path)
    return target


def _check_mp4(asked: str, width: int, height: int) -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise MissingDependency(
            "writing .mp4", "this PyAV has no libx264", "Install it again: pip install --force-reinstall av"
        )
    if width % 2 or height % 2:
        found = f"H.264 in yuv420p needs an even width and height, and this is {width} x {height}"
        raise OutputError(asked, found, "Choose .gif, .png or .npz, or an even size")


def _check_folder(folder: Path) -> None:
    """A folder of frames replaces an older one, and nothing else."""
    asked = f"writing frames into {folder}"
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(asked, "it is a file", "Choose another name")
    for file in folder.iterdir() if os.path.exists(folder) else ():
        if not re.fullmatch(r"\d{4,}\.png", file.name):
            raise OutputError(asked, f"it holds other files ({file.name})", "Choose a new or empty folder")


def mp4(video: np.ndarray, card: Card, crf: int = CRF) -> bytes:
    """``crf``: 0 (lossless but for the chroma) to 51. Width and height must be even."""
    import av

    text = cards.line(card)
    buffer = io.BytesIO()
    options = {
        "movflags": "use_metadata_tags",  # else the mp4 muxer drops names that it does not know
        "moov_size": str(len(text) + 64 * len(video) + 8192),  # index in front, so that browsers can start at once
        "fflags": "+bitexact",
    }
    with av.open(buffer, "w", format="mp4", options=options) as container:
        container.metadata[cards.KEY] = text
        stream = container.add_stream("libx264", rate=Fraction(card["fps"]).limit_denominator(1001))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without cpu-independent, x264's macroblock tree rounds otherwise from one call to the next where the processor
        # has AVX-512: equal frames then give other bytes, and other pixels.
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "cpu-independent=1"}
        codec = stream.codec_context
        codec.thread_count = 1  # the number of threads changes the bits
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        for frame in video:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _bayer(size: int) -> np.ndarray:
    """The recursive threshold matrix [size, size] (a power of two), in -0.5 to 0.5."""
    matrix = np.zeros((1, 1))
    while len(matrix) < size:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return ((matrix + 0.5) / matrix.size - 0.5).astype(np.float32)


# Moved from channel to channel, so that it reaches colours on all sides of a pixel and not only lighter and darker.
_DITHER = np.stack([np.roll(_bayer(8), move, (0, 1)) for move in ((0, 0), (3, 5), (5, 2))], -1)


def gif(video: np.ndarray, card: Card) -> bytes:
    """Delays are whole hundredths of a second, so their sum is kept right rather than each of them."""
    from PIL import Image

    ends = np.rint(np.arange(len(video) + 1) * 100 / card["fps"])
    picked = video[np.unique(np.linspace(0, len(video) - 1, 16).round().astype(int))].reshape(1, -1, 3)
    sample = np.linspace(0, picked.shape[1] - 1, min(picked.shape[1], 65_536)).astype(int)
    picked = np.ascontiguousarray(picked[:, sample])
    palette = Image.fromarray(picked).quantize(GIF_COLORS, Image.Quantize.MEDIANCUT, kmeans=1)

    def indices(frame: np.ndarray) -> Image.Image:
        return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)

    # Ordered dither, as strong as the palette is coarse (a step d errs by d / sqrt(12)): none where 255 colours are
    # enough. Its pattern stands still, so what does not move does not flicker.
    error = np.array(indices(picked).convert("RGB"), np.float32) - picked
    step = min(float(np.sqrt(12 * np.mean(error**2))), 32.0)
    down, across = (-(-size // 8) for size in video.shape[1:3])
    pattern = step * np.tile(_DITHER, (down, across, 1))[: video.shape[1], : video.shape[2]]
    first, *rest = (indices(np.clip(np.rint(frame + pattern), 0, 255).astype(np.uint8)) for frame in video)
    delays, comment, buffer = (np.diff(ends) * 10).astype(int).tolist(), cards.line(card).encode(), io.BytesIO()
    first.save(
        buffer, "GIF", save_all=True, append_images=rest, duration=delays, loop=0, comment=comment, optimize=False
    )
    return buffer.getvalue()


def png(video: np.ndarray, card: Card) -> dict[str, bytes]:
    """File names and their bytes."""
    from PIL import Image, PngImagePlugin

    named = {}
    for index, frame in enumerate(video):
        info = PngImagePlugin.PngInfo()
        if index == 0:
            info.add_text(cards.KEY, cards.line(card))
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", pnginfo=info)
        named[f"{index:04d}.png"] = buffer.getvalue()
    return named


def npz(video: np.ndarray, card: Card) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, video=video, fps=np.float64(card["fps"]), card=np.array(cards.line(card)))
    return buffer.getvalue()


FORMATS: dict[str, Callable[[np.ndarray, Card], files.Content]] = {".mp4": mp4, ".gif": gif, ".png": png, ".npz": npz}
