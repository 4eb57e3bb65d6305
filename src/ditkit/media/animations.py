"""Moving pictures (gif, webp, avif, apng), by Pillow; when each frame comes up is read without decoding any.

What is transparent lies on white, as of still pictures. Leaves out: the card of ditkit's own gifs (``read.py``)."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from ditkit import limits
from ditkit.errors import StateError

from . import png
from .clip import Clip, Timed
from .containers import demuxed, moving, times_of
from .guard import check_frame
from .image import flat, upright

_DEMUXERS = {"gif": "gif", "apng": "apng", "avif": "mov"}
_PILLOW = {"gif": "GIF", "apng": "PNG", "avif": "AVIF", "webp": "WEBP"}
_DELAY = 100  # ms: what viewers make of none


def known(kind: str) -> bool:
    """Does Pillow have a reader? Avif came late; ffmpeg shows it, without its transparency."""
    from PIL import Image

    Image.init()
    return _PILLOW[kind] in Image.OPEN


@contextmanager
def animation(stream: BinaryIO, size: int, kind: str, asked: str) -> Iterator[Clip]:
    """Raises StateError, and whatever Pillow says of a damaged file."""
    from PIL import Image

    times, seconds = _times(stream, kind, asked)
    stream.seek(0)
    with Image.open(png.lean(stream) if kind == "apng" else stream, formats=[_PILLOW[kind]]) as picture:
        check_frame(*picture.size, asked, StateError)
        skipped = int(getattr(picture, "default_image", False))  # what those see who cannot play it
        wide, high = upright(picture).size
        rate = len(times) / seconds if seconds else None
        yield Clip(asked, len(times), wide, high, size, rate, seconds, _timed(picture, times, skipped))


def _timed(picture: Any, times: list[float], skipped: int) -> Timed:
    for index, time in enumerate(times):
        picture.seek(skipped + index)
        pixels = flat(upright(picture))
        yield time, lambda pixels=pixels: pixels  # type: ignore[misc]


def _times(stream: BinaryIO, kind: str, asked: str) -> tuple[list[float], float]:
    if kind == "webp":
        ends = np.cumsum(_webp_delays(stream, asked)) / 1000
        return [0.0, *ends[:-1].tolist()], float(ends[-1])
    with demuxed(stream, asked, _DEMUXERS[kind]) as container:
        times, seconds, _ = times_of(container, moving(container, asked), asked)
    return times, seconds


def _webp_delays(stream: BinaryIO, asked: str) -> list[int]:
    """Milliseconds of each frame: chunks ANMF, of which bytes 12 to 14 say it."""
    found = list[int]()
    at = stream.seek(12)
    while len(head := stream.read(8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        if kind == b"ANMF":
            found.append(int.from_bytes(stream.read(16)[12:15], "little") or _DELAY)
            if len(found) > limits.FRAMES:
                raise StateError(asked, f"it has more than {limits.FRAMES:,} frames", "Cut it to what is needed")
        at = stream.seek(at + 8 + length + length % 2)
    return found or [_DELAY]
