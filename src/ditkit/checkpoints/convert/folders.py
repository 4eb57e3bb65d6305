"""Folders that appear whole or not at all. Leaves out: what is in them (``convert.py``), and large files
(``files/writing.py``)."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditkit.errors import OutputError


@contextmanager
def appearing(dst: Path) -> Iterator[Path]:
    """A folder beside ``dst`` that takes its name and its place when the block ends well, and vanishes otherwise."""
    folder = dst.with_name(f".ditkit-{secrets.token_hex(6)}.part")
    old = dst.with_name(f".ditkit-{secrets.token_hex(6)}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        if dst.exists():
            os.rename(dst, old)
        try:
            os.rename(folder, dst)
        except BaseException:  # Ctrl-C too: the old one is deleted below
            if old.exists() and not dst.exists():
                os.rename(old, dst)
            raise
    except OSError as error:
        do = "Choose a folder that you can write to and that has room"
        raise OutputError(f"writing {dst}", (error.strerror or str(error)).lower(), do) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
