"""Frames on a stream of bytes: one byte for the kind, 8 for the length, 4 for the CRC-32, then the payload.

The checksum finds content that changed on its way; it is no signature. Leaves out: what frames mean (``job.py``).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

from ditkit.errors import PlaceError
from ditkit.placement.job import KINDS, Frame

MEDIA_TYPE = "application/x-ditkit-frames"

HEAD = struct.Struct("<BQI")

PIECE = 1 << 20
"""Bytes that are handed to a socket at once."""

LARGEST = 1 << 36
"""Bytes of a payload beyond which a length is taken for garbage."""


def checksum(buffers: Iterable[bytes | bytearray | memoryview]) -> int:
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def pieces(buffers: Iterable[bytes | bytearray | memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of a size that sockets like."""
    for buffer in buffers:
        view = memoryview(buffer)
        for at in range(0, len(view), PIECE):
            yield view[at : at + PIECE]


def pack(frame: Frame) -> Iterator[bytes | memoryview]:
    buffers = frame.buffers()
    head = HEAD.pack(KINDS.index(frame.kind), sum(map(len, buffers)), checksum(buffers))
    if frame.nbytes < PIECE:
        yield head + b"".join(buffers)
    else:
        yield head
        yield from pieces(buffers)


def unpack(read: Callable[[int], bytearray], source: str) -> Frame:
    """The next frame; ``read`` gives exactly so many bytes. Raises PlaceError for bytes that are none."""
    kind, length, crc = HEAD.unpack(read(HEAD.size))
    if kind >= len(KINDS) or length > LARGEST:
        raise PlaceError(f"reading what {source} sent", "it is no frame", "Look at its log")
    payload = read(length)
    if zlib.crc32(payload) != crc:
        raise PlaceError(f"reading what {source} sent", "its content has changed on the way", "Look at the network")
    return Frame(KINDS[kind], payload)
