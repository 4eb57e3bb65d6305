"""Frames that are stored one by one: the arrays of an npz, and the pictures of a folder."""

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ditkit import limits
from ditkit.errors import RequestError, StateError

from . import card as cards
from .clip import Clip
from .guard import check_clip
from .image import image_and_remark

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_NUMBER = re.compile(r"(\d+)\D*$")
_MOST_TEXT = 4 * limits.TEXT  # numpy holds four bytes of a character


@contextmanager
def arrays(stream: BinaryIO, size: int, asked: str) -> Iterator[Clip]:
    """``video`` uint8 [T, H, W, 3] and ``fps`` of an npz. Raises StateError, and what zipfile says against it."""
    with zipfile.ZipFile(stream) as archive:
        rate = number(archive, "fps", asked)
        with _member(archive, "video", asked) as (file, shape, fortran, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
                found, do = f"its video is {dtype} {list(shape)}"[:200], "Store uint8 [T, H, W, 3]"
                raise StateError(asked, found, do)
            count, high, wide, _ = shape
            check_clip(count, wide, high, size, asked, StateError)

            def frames() -> Iterator[tuple[float, Any]]:
                if fortran:
                    whole = np.frombuffer(_exactly(file, math.prod(shape)), np.uint8).reshape(shape, order="F")
                    yield from ((i / rate, partial(whole.__getitem__, i)) for i in range(count))
                    return
                for i in range(count):
                    data = np.frombuffer(_exactly(file, high * wide * 3), np.uint8).reshape(high, wide, 3)
                    yield i / rate, partial(data.__getitem__, ...)

            yield Clip(asked, count, wide, high, size, rate, count / rate, frames())


def number(archive: zipfile.ZipFile, name: str, asked: str) -> float:
    """A number above 0 that an archive holds. Raises StateError."""
    with _member(archive, name, asked) as (file, shape, _, dtype):
        value = np.frombuffer(_exactly(file, dtype.itemsize), dtype)[0] if not shape and dtype.kind in "fiu" else 0
    if not 0 < float(value) < math.inf:
        raise StateError(asked, f"its {name} is no number above 0", "Save it again")
    return float(value)


def text(archive: zipfile.ZipFile, name: str, asked: str) -> str | None:
    """A text that an archive holds; None where it holds none of that name. Raises StateError."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with _member(archive, name, asked) as (file, shape, _, dtype):
        if shape or dtype.kind != "U" or dtype.itemsize > _MOST_TEXT:
            raise StateError(asked, f"its {name} is no text", "Save it again")
        return str(np.frombuffer(_exactly(file, dtype.itemsize), dtype)[0]) if dtype.itemsize else ""


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, asked: str
) -> Iterator[tuple[Any, tuple[int, ...], bool, np.dtype[Any]]]:
    """What the head of an array says: the file behind the head, shape, whether the first axis is the nearest, dtype.
    The zip's own number of bytes must agree, and nothing is read before that."""
    if f"{name}.npy" not in archive.namelist():
        raise StateError(asked, f"it holds no {name}", "Name an npz that ditkit wrote, or one with video and fps")
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"an array of version {version}")
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = head(file)
        if dtype.hasobject:
            raise StateError(asked, f"its {name} holds Python objects, which are not read", "Store plain numbers")
        if math.prod(shape) * dtype.itemsize + file.tell() != info.file_size:
            raise ValueError(f"{name} has another number of bytes than it says")
        yield file, shape, fortran, dtype


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    if len(data) < size:
        raise EOFError("it ends too early")
    return data


@contextmanager
def folder(path: Path, asked: str) -> Iterator[Clip]:
    """The frames of a folder that ditkit wrote, or the pictures that another tool numbered without a gap: those have no
    rate. Raises StateError."""
    files, card = frames_in(path), None
    if files:
        card = cards.of_picture(files[0], asked)
    if card is not None and card["frames"] != len(files):
        found = f"it holds {len(files)} frames and a card for {card['frames']}"
        raise StateError(asked, found, "Bring the others back")
    if card is None:
        _check_numbers(files, asked)
    if len(files) > limits.FRAMES:
        raise StateError(asked, f"it has more than {limits.FRAMES:,} pictures", "Keep those that are needed")
    first = _picture(files[0], None)
    high, wide = first.shape[:2]
    rate = None if card is None else float(card["fps"])
    timed = ((i / (rate or 1), partial(_picture, file, first)) for i, file in enumerate(files))
    size = sum(file.stat().st_size for file in files)
    yield Clip(asked, len(files), wide, high, size, rate, rate and len(files) / rate, timed)


def frames_in(path: Path) -> list[Path]:
    """The pictures in a folder by their numbers; files that systems leave (.DS_Store, ._0001.png) are passed over."""
    found = [f for f in path.iterdir() if f.suffix.lower() in _PICTURES and not f.name.startswith(".")]
    return sorted(found, key=lambda file: (_number(file), file.name))


def _number(file: Path) -> int:
    match = _NUMBER.search(file.stem[-18:])
    return -1 if match is None else int(match[1])


def _check_numbers(files: list[Path], asked: str) -> None:
    do = "Name a folder that ditkit wrote, or one of pictures that are numbered without a gap"
    if not files:
        raise StateError(asked, "it holds 0 frames and no card", do)
    for before, file in zip([None, *files], files, strict=False):
        if _number(file) < 0:
            raise StateError(asked, f"it holds no card, and {file.name} no number", do)
        if before is not None and _number(file) != _number(before) + 1:
            found = f"{len(files)} frames and no card, and {file.name} comes after {before.name}"
            raise StateError(asked, found, do)


def _picture(file: Path, like: np.ndarray | None) -> np.ndarray:
    try:
        pixels, _ = image_and_remark(file)
    except RequestError as e:
        raise StateError(e.asked, e.found, e.do) from None
    if like is not None and pixels.shape != like.shape:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, like.shape)]
        found = f"it has {sizes[0]} pixels, and the first frame {sizes[1]}"
        raise StateError(f"reading the frame {file}", found, "Save all in one size")
    return pixels
