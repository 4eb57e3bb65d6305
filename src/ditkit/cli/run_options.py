"""RunOptions: which part of a run a command wants and where its results go; and the flags that say so.

Leaves out: settings of the run itself (``flags.py``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli.flags import to_path
from ditkit.errors import OutputError

if TYPE_CHECKING:
    from ditkit.receipt import Recorder
    from ditkit.runs import Run

OUT = "An .mp4, .gif or .npz file, or .png for a folder of frames. Default: outputs/PROMPT-SEED.mp4."
Out = Annotated[Path | None, typer.Option(metavar="PATH", parser=to_path, help=OUT)]
Sheet = Annotated[
    Path | None, typer.Option(metavar="FILE.png", parser=to_path, help="The contact sheet. Default: beside the clip.")
]
NoSheet = Annotated[bool, typer.Option("--no-sheet", help="Make no contact sheet.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of what was written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; whatever else is shown goes to stderr.")]


@dataclass(frozen=True)
class RunOptions:
    """``setup``: the settings that somebody gave. ``run``: the folder that keeps the States, if one does; ``kept``: one
    does, and may not be there yet. ``recorder``: that of a part which has run."""

    out: Path
    sheet: Path | None
    state: Path | None = None
    start: str | None = None
    until: str | None = None
    stop_at_step: int | None = None
    setup: Mapping[str, Any] | None = None
    quiet: bool = False
    json: bool = False
    run: Run | None = None
    kept: bool = False
    recorder: Recorder | None = None

    def at(
        self, out: Path, sheet: Path | None, setup: Mapping[str, Any], run: Run | None = None, kept: bool = False
    ) -> RunOptions:
        """The same part of a run, with places for its results."""
        return replace(self, out=out, sheet=sheet, setup=setup, run=run, kept=kept or run is not None)


def default_out(prompt: str, seed: int) -> Path:
    """Letters, digits and marks of every script; as many as leave room in a file name for what is added to them."""
    text = unicodedata.normalize("NFC", prompt.lower())
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    slug = "-".join(words)[:60].encode()[:180].decode(errors="ignore").rstrip("-")
    return Path("outputs") / f"{slug or 'clip'}-{seed}.mp4"


def sheet_for(out: Path, sheet: Path | None, no_sheet: bool) -> Path | None:
    if sheet is not None and no_sheet:
        raise OutputError(f"--sheet {sheet} with --no-sheet", "they contradict each other", "Give one of them")
    return None if no_sheet else sheet or out.with_name(f"{out.stem}-sheet.png")


def numbered(path: Path, count: int) -> list[Path]:
    """The names that ``Result.save`` gives to the clips of a run."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
