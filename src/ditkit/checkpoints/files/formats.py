"""Formats of weight files: told by a file's first bytes, never by its name; and how sets of files are named.

Leaves out: what a file of each format holds.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ditkit.errors import LoadError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf")  # looked at in a folder that has no safetensors
INDEX = re.compile(r"(.+)\.safetensors\.index(?:\.(.+))?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(.+)"
)  # the base names of diffusers and transformers


def kind_of(file: Path) -> str:
    """The format, by the first bytes: ``safetensors``, ``index`` (of its shards), ``torch``, ``old torch`` (a bare
    pickle), ``gguf`` or ``unknown``. Raises LoadError when the file cannot be read."""
    asked = f"opening {file}"
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for, a device never ends
            raise LoadError(asked, "it is no ordinary file", "Give a file of weights, or its folder")
        with file.open("rb") as stream:
            start = stream.read(9)
    except FileNotFoundError:
        raise LoadError(asked, "there is no such file", "Check the path, or download the model again") from None
    except OSError as error:
        raise LoadError(asked, f"it cannot be read ({error.strerror})", "Check the file and its permissions") from None
    if start[5:] == b"\0\0\0{":  # first, because the length before it may begin with the mark of another format
        return "safetensors"
    return next((kind for kind, mark in MARKS.items() if mark.match(start)), "unknown")


MARKS: Mapping[str, re.Pattern[bytes]] = MappingProxyType({
    "gguf": re.compile(b"GGUF"), "torch": re.compile(b"PK\x03\x04"), "old torch": re.compile(b"\x80[\x02-\x05]"),
    "index": re.compile(rb"\s*\{"),
})  # fmt: skip
KINDS: Mapping[str, str] = MappingProxyType({
    "torch": "a checkpoint of torch", "old torch": "a pickle", "gguf": "a GGUF file", "index": "a JSON file",
})  # fmt: skip
