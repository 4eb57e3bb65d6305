"""Folders that appear whole or not at all. Leaves out: what is in them (``convert.py``), and large files
(``files/writing.py``)."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditkit import writing
from ditkit.errors import OutputError


@contextmanager
def appearing(dst: Path) -> Iterator[Path]:
    """A folder beside ``dst`` that takes its name and its place when the block ends well, and vanishes otherwise. It is
    on the disk before anything older is let go of. Raises OutputError."""
    try:
        writing.make_folder(dst.parent)
        writing.sweep(dst.parent)
        with writing.new_folder(dst) as folder:
            yield folder
            for place in sorted(folder.rglob("*")):
                (writing.sync_folder if os.path.isdir(place) else writing.sync_file)(place)
            writing.sync_folder(folder)
            writing.take_place(folder, dst)
            writing.sync_folder(dst.parent)
    except OSError as error:
        do = "Choose a folder that you can write to and that has room"
        raise OutputError(f"writing {dst}", (error.strerror or str(error)).lower(), do) from None


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
