"""What a file of frames is, by its first bytes; what it is called says nothing. Leaves out: reading it."""

from pathlib import Path
from typing import BinaryIO, Literal

from . import png

Kind = Literal["folder", "npz", "gif", "webp", "avif", "apng", "picture", "npy", "text", "empty", "video"]

_STILL = (
    b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"8BPS", b"qoif", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\0\0\x01\0",
    b"P1", b"P2", b"P3", b"P4", b"P5", b"P6",
)  # fmt: skip
_STILL_BRANDS = (b"avif", b"mif1", b"heic", b"heix", b"heim", b"heis")
_MOVING_BRANDS = (b"avis", b"msf1")


def kind_of(path: Path, stream: BinaryIO | None) -> Kind:
    """``stream``: the file, or None for a folder. ``video`` is whatever is not known: that is left to ffmpeg, which
    knows more containers than can be told here. Of a gif, webp or avif this is no word on how many frames it has."""
    if stream is None:
        return "folder"
    stream.seek(0)
    head = stream.read(64)
    stream.seek(0)
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(png.SIGNATURE):
        moving = png.moves(stream)
        stream.seek(0)
        return "apng" if moving else "picture"
    if head[4:8] == b"ftyp" and head[8:12] in (*_STILL_BRANDS, *_MOVING_BRANDS):
        return "avif" if head[8:12] in _MOVING_BRANDS else "picture"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(_STILL):
        return "picture"
    return "text" if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else "video"
