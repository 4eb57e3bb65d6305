"""The chunks of a PNG. Tools store whole workflows and the profiles of displays in them, far beyond what Pillow takes;
none of it is a pixel."""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from ditkit import limits

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NAMED = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")
_NAME = 80  # bytes of a text's name, at most, with the zero after it


def chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where it begins, bytes with its head and tail) of each whole chunk; damage is left for a decoder."""
    at = stream.seek(len(SIGNATURE))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, at, length + 12
        if kind == b"IEND":
            return
        at = stream.seek(at + length + 12)


def moves(stream: BinaryIO) -> bool:
    """Is it an animation (APNG)? That is said before the first pixels."""
    for kind, _, _ in chunks(stream):
        if kind in (b"acTL", b"IDAT"):
            return kind == b"acTL"
    return False


def lean(stream: BinaryIO, *keep: str) -> BinaryIO:
    """The same PNG without colour profile and without texts, but those that may tell the orientation and those that
    are called ``keep``. Raises ValueError where what is left has more than PICTURE_FILE bytes."""
    named, kept, dropped = {*_ORIENTATION, *(name.encode() for name in keep)}, list[tuple[int, int]](), False
    for kind, at, size in chunks(stream):
        if kind in _NAMED:
            stream.seek(at + 8)
            drop = stream.read(_NAME).partition(b"\0")[0] not in named
        else:
            drop = kind == b"iCCP"
        dropped = dropped or drop
        kept += [] if drop else [(at, size)]
    stream.seek(0)
    if not dropped:
        return stream
    if sum(size for _, size in kept) > limits.PICTURE_FILE:
        raise ValueError(f"more than {limits.PICTURE_FILE:,} bytes beside its texts")
    copy = io.BytesIO(SIGNATURE)
    copy.seek(0, io.SEEK_END)
    for at, size in kept:
        stream.seek(at)
        copy.write(stream.read(size))
    copy.seek(0)
    return copy
