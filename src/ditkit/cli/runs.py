"""``ditkit runs``: the runs of a folder, how far each came, and what was forked from what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import show
from ditkit.cli.flags import PathArgument

if TYPE_CHECKING:
    from ditkit.runs import Listed

PROMPT = 60  # letters of a prompt in the table


def runs(
    folder: Annotated[Path, PathArgument(metavar="FOLDER", help="Where the runs lie.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the runs of a folder: name, progress, time, model, prompt; forks under what they were forked from."""
    from ditkit.runs import listed

    found = listed(folder)
    if as_json:
        print(json.dumps([_as_json(each) for each in found], ensure_ascii=False))
        return
    console = show.console()
    columns = ("name", "progress", "begun", "model", "prompt")
    console.print(show.table(columns, map(_row, found)) if found else f"no runs in {folder}")
    for each in found:
        if each.fault:
            console.print(f"note: {each.fault}")


def _row(each: Listed) -> tuple[str, ...]:
    name = "  " * (each.depth - 1) + "└ " * bool(each.depth) + each.path.name
    if each.run is None:
        return name, each.progress, "", "", ""
    description = each.run.description
    prompt, above = description.request["prompt"], description.parent
    what = prompt if isinstance(prompt, str) else " | ".join(prompt)
    if above is not None:
        changes = ", ".join(f"{k}={show.value(new)}" for k, (_, new) in above.changed.items())
        what = f"{'' if above.step is None else f'@{above.step} '}{changes or 'nothing changed'}"
    begun, model = description.created[:16].replace("T", " "), Path(description.model["name"]).name
    return name, each.progress, begun, model, what if len(what) <= PROMPT else what[: PROMPT - 3] + "..."


def _as_json(each: Listed) -> dict[str, Any]:
    about = {"fault": each.fault} if each.run is None else each.run.description.model_dump(mode="json")
    return {"path": str(each.path), "progress": each.progress, "depth": each.depth, **about}
