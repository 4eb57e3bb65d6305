"""Messages on a stream of bytes: one byte for the kind, 8 for the length, the payload, and 4 for its CRC-32.

The checksum finds content that changed on its way; it is no signature. Leaves out: what messages mean (``job.py``)."""

import functools
import struct
from collections.abc import Callable, Iterable, Iterator

import numpy

try:
    from zlib_ng.zlib_ng import crc32  # the same number ten times sooner
except ModuleNotFoundError:
    from zlib import crc32

from ditkit import limits
from ditkit.errors import PlaceError
from ditkit.placement.job import KINDS, LOG, Message

MEDIA_TYPE = "application/x-ditkit-frames"
HEAD, TAIL = struct.Struct("<BQ"), struct.Struct("<I")
FRAMING = HEAD.size + TAIL.size  # bytes of a message besides its payload
PIECE = 1 << 20  # bytes that are handed to a socket at once
LARGEST = limits.STATE_OF_HOST
MOST = {"event": limits.WORDS_OF_EVENT, "error": limits.TEXT, "alive": 0}  # bytes of a payload; of others LARGEST
Buffer = bytes | bytearray | memoryview


def checksum(buffers: Iterable[Buffer]) -> int:
    return functools.reduce(lambda crc, buffer: crc32(buffer, crc), buffers, 0)


def fresh(size: int) -> bytearray | memoryview:
    """Memory to receive into. numpy asks Linux for large pages from 4 MB on: to touch small ones for the first time
    takes twice as long as the loopback takes to fill them."""
    return bytearray(size) if size < PIECE else numpy.empty(size, numpy.uint8).data


def pieces(buffers: Iterable[Buffer]) -> Iterator[memoryview]:
    """The same bytes in pieces of a size that sockets like."""
    for buffer in buffers:
        view = memoryview(buffer)
        for at in range(0, len(view), PIECE):
            yield view[at : at + PIECE]


def pack(message: Message) -> Iterator[bytes | memoryview]:
    """The message's bytes; a large one comes in pieces, without a copy."""
    head, buffers = HEAD.pack(KINDS.index(message.kind), message.nbytes), message.buffers()
    if message.nbytes < PIECE:
        yield b"".join([head, *buffers, TAIL.pack(checksum(buffers))])
        return
    yield head
    crc = 0
    for piece in pieces(buffers):
        crc = crc32(piece, crc)  # while the processor's cache still holds it
        yield piece
    yield TAIL.pack(crc)


def unpack(read: Callable[[int], bytearray | memoryview], source: str) -> Message:
    """The next message; ``read`` gives exactly so many bytes. Raises PlaceError for bytes that are none,
    and where there is no room for them."""
    asked, (kind, length) = f"reading what {source} sent", HEAD.unpack(read(HEAD.size))
    if kind >= len(KINDS) or length > MOST.get(KINDS[kind], LARGEST):
        raise PlaceError(asked, "it is no message", LOG)
    try:
        payload = read(length)  # at once: in pieces, each checked while it is in the cache, takes longer
    except MemoryError:  # the length is the other end's word
        found = f"it announces {length} bytes, for which there is no room"
        raise PlaceError(asked, found, "Look at its log, or free some memory") from None
    if TAIL.pack(checksum([payload])) != bytes(read(TAIL.size)):
        raise PlaceError(asked, "its content has changed on the way", "Look at the network")
    return Message(KINDS[kind], payload)
