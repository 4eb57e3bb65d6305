"""Videos, by ffmpeg: whatever it decodes, from one file and no other.

Only containers that hold their frames themselves are opened: a playlist could name files and addresses. A display
matrix is applied (phones store what they hold sideways), and pixels that are not square are made so. Leaves out: gif,
webp and their like (``animations.py``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from ditkit import limits
from ditkit.errors import StateError

from .clip import Clip, Timed
from .guard import check_frame, said

FORMATS = (
    "mov", "matroska", "avi", "flv", "asf", "mpegts", "mpeg", "mpegvideo", "ogg", "ivf", "yuv4mpegpipe", "h264", "hevc",
    "obu", "m4v", "mxf", "nut", "dv", "mjpeg",
)  # fmt: skip
_UNKNOWN = "its format is not known, or it is damaged"
USE = "Use an mp4, mov, mkv, webm, avi, gif, webp, apng, npz or a folder of numbered pictures"


def _refused(*_: Any) -> Any:
    raise PermissionError("it names another file")


@contextmanager
def demuxed(stream: BinaryIO, asked: str, form: str | None = None) -> Iterator[Any]:
    """The file as an av container, ``form`` of one format or any of FORMATS. Raises StateError."""
    import av

    stream.seek(0)
    options = {"max_pixels": str(limits.FRAME)}
    own = {"protocol_whitelist": "none"} | ({} if form else {"format_whitelist": ",".join(FORMATS)})
    try:
        container = av.open(stream, "r", format=form, options=options, container_options=own, io_open=_refused)
    except MemoryError:
        raise
    except Exception as e:
        raise StateError(asked, f"{_UNKNOWN} ({said(e)})", USE) from None
    with container:
        yield container


def moving(container: Any, asked: str) -> Any:
    """The video stream that is meant: the first that is no cover picture; in an avif the sequence. Raises
    StateError."""
    from av.stream import Disposition

    found = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not found:
        raise StateError(asked, "it has no pictures in it, only sound or text", "Name a video")
    first = found[0]
    return max(found, key=lambda s: s.frames) if first.frames == 1 else first


def times_of(container: Any, stream: Any, asked: str) -> tuple[list[float], float, Fraction | None]:
    """When each frame comes up, in seconds after the first; when the last one goes; and the first one's own time.
    Nothing is decoded. Raises StateError for more than FRAMES."""
    found: list[tuple[int | None, int]] = []
    hides = (
        stream.codec_context is not None and stream.codec_context.name == "vp8"
    )  # frames that are only looked back at
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and not (hides and not memoryview(packet)[0] & 0x10):
            found.append((packet.dts if packet.pts is None else packet.pts, packet.duration or 0))
            if len(found) > limits.FRAMES:
                raise StateError(asked, f"it has more than {limits.FRAMES:,} frames", "Cut it to what is needed")
    if not found:
        raise StateError(asked, "it has no frames", "Save it again")
    rate = _rate(stream)
    if any(at is None for at, _ in found) or not stream.time_base:
        step = 1 / rate if rate else 0.0
        return [i * step for i in range(len(found))], len(found) * step, None
    known = sorted((at, length) for at, length in found if at is not None)
    (begin, _), (last, length) = known[0], known[-1]
    ticks = stream.time_base
    times = [float((at - begin) * ticks) for at, _ in known]
    mean = times[-1] / (len(times) - 1) if len(times) > 1 and times[-1] else 1 / rate if rate else 0.0
    return times, float((last - begin) * ticks) + (float(length * ticks) or mean), begin * ticks


def _rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate and rate > 0 else None


@contextmanager
def video(stream: BinaryIO, size: int, asked: str) -> Iterator[Clip]:
    """Raises StateError."""
    with demuxed(stream, asked) as container:
        meant = moving(container, asked)
        if meant.codec_context is None:
            raise StateError(asked, "its codec is not known", "Save it as H.264, such as by ffmpeg -i IN OUT.mp4")
        wide, high = meant.codec_context.width, meant.codec_context.height
        if wide and high:
            check_frame(wide, high, asked, StateError)
        times, seconds, begin = times_of(container, meant, asked)
    with demuxed(stream, asked) as container:
        meant = moving(container, asked)
        decoded = _decoded(container, meant)
        first = next(decoded, None)
        if first is None:
            raise StateError(asked, "it is damaged: none of its frames can be decoded", "Save it again")
        check_frame(first.width, first.height, asked, StateError)
        shape = _square(first, meant)
        turn = _turn(first, asked)
        wide, high = (shape[1], shape[0]) if turn[0] else shape
        check_frame(wide, high, asked, StateError)
        rate = _rate(meant) or (len(times) / seconds if seconds else None)
        timed = _timed(chain([first], decoded), shape, turn, begin, seconds / len(times), asked)
        yield Clip(asked, len(times), wide, high, size, rate, seconds or None, timed)


def card_text(stream: BinaryIO, asked: str, key: str) -> str | None:
    """The text that a container carries under ``key``. Raises StateError."""
    with demuxed(stream, asked) as container:
        return next((text for name, text in container.metadata.items() if name.lower() == key), None)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    stream.codec_context.options = {"max_pixels": str(limits.FRAME)}
    yield from container.decode(stream)


def _timed(
    frames: Iterator[Any], shape: tuple[int, int], turn: tuple[bool, bool, bool], begin: Fraction | None, step: float,
    asked: str,
) -> Timed:  # fmt: skip
    size, before = None, 0.0
    for index, frame in enumerate(frames):
        size = size or (frame.width, frame.height)
        if frame.is_corrupt:
            raise StateError(asked, f"frame {index} is damaged", "Save it again")
        if (frame.width, frame.height) != size:
            found = f"frame {index} is of another size ({frame.width} x {frame.height}) than the first"
            raise StateError(asked, found, "Save it in one size")
        timeless = begin is None or frame.pts is None or frame.time_base is None
        before = max(before, index * step if timeless else float(frame.pts * frame.time_base - begin))
        yield before, partial(_pixels, frame, shape, turn)


def _pixels(frame: Any, shape: tuple[int, int], turn: tuple[bool, bool, bool]) -> np.ndarray:
    alpha = any(part.is_alpha for part in frame.format.components)
    resized = {} if shape == (frame.width, frame.height) else {"width": shape[0], "height": shape[1]}
    pixels: np.ndarray = frame.to_ndarray(format="rgba" if alpha else "rgb24", **resized)
    if alpha:
        from PIL import Image

        from .image import flat

        pixels = flat(Image.fromarray(pixels))
    transposed, across, down = turn
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    pixels = pixels[:, ::-1] if across else pixels
    return pixels[::-1] if down else pixels


def _square(frame: Any, stream: Any) -> tuple[int, int]:
    """Width and height with square pixels; of the two sides one grows."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    if ratio <= 0:
        return frame.width, frame.height
    if ratio > 1:
        return round(frame.width * ratio), frame.height
    return frame.width, round(frame.height / ratio)


def _turn(frame: Any, asked: str) -> tuple[bool, bool, bool]:
    """Whether rows become columns, and then left becomes right, and top bottom. Raises StateError for other turns."""
    told = frame.side_data.get("DISPLAYMATRIX")
    if told is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(told), np.int32, 9).tolist()  # right and down go to (a, b) and (c, d)
    if not any((a, b, c, d)):  # nothing could be shown: no player follows it
        return False, False, False
    small = max(map(abs, (a, b, c, d))) / 256
    if abs(b) <= small and abs(c) <= small and a and d:
        return False, a < 0, d < 0
    if abs(a) <= small and abs(d) <= small and b and c:
        return True, c < 0, b < 0
    raise StateError(asked, "it is to be shown turned by no quarter of a circle", "Turn it first")
