"""Folders that appear whole or not at all. Leaves out: what is in them (``convert.py``), and large files
(``files/writing.py``)."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
        os.rename(folder, dst)
    except OSError as error:
        do = "Choose a folder that you can write to and that has room"
        raise OutputError(f"writing {dst}", (error.strerror or str(error)).lower(), do) from None
    finally:  # after Ctrl-C too, which may come in the middle of a rename
        if not dst.exists() and old.exists():
            with suppress(OSError):
                os.rename(old, dst)
        shutil.rmtree(folder, ignore_errors=True)
        if dst.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            found = f"{dst} could not get its name back, and lies in {old} now"
            raise OutputError(f"writing {dst}", found, f"Rename it: mv {old} {dst}")


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
