"""``ditkit runs``: the runs of a folder, how far each came, and what was forked from what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import show
from ditkit.cli.flags import to_path

if TYPE_CHECKING:
    from ditkit.runs import Listed

PROMPT = 60  # letters of a prompt in the table


def add_to(app: typer.Typer) -> None:
    app.command("runs")(runs)


def runs(
    folder: Annotated[Path, typer.Argument(parser=to_path, metavar="FOLDER", help="Where the runs lie.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the runs of a folder: name, progress, time, model, prompt; forks under what they were forked from."""
    from ditkit.runs import listed

    found = listed(folder)
    if as_json:
        print(json.dumps([_as_json(each) for each in found], ensure_ascii=False))
        return
    console = show.console()
    if not found:
        console.print(f"no runs in {folder}")
        return
    console.print(show.table(("name", "progress", "begun", "model", "prompt"), map(_row, found)))
    for each in found:
        if each.fault:
            console.print(f"note: {each.fault}")


def _row(each: Listed) -> tuple[str, ...]:
    name = "  " * (each.depth - 1) + "└ " * bool(each.depth) + each.path.name
    if each.run is None:
        return name, each.progress, "", "", ""
    description = each.run.description
    prompt = description.request["prompt"]
    text = prompt if isinstance(prompt, str) else " | ".join(prompt)
    begun, model = description.created[:16].replace("T", " "), Path(description.model["name"]).name
    above = description.parent
    changes = "" if above is None else ", ".join(f"{k}={show.value(new)}" for k, (_, new) in above.changed.items())
    at = "" if above is None or above.step is None else f"@{above.step} "
    what = text if above is None else f"{at}{changes or 'nothing changed'}"
    return name, each.progress, begun, model, what if len(what) <= PROMPT else what[: PROMPT - 3] + "..."


def _as_json(each: Listed) -> dict[str, Any]:
    told: dict[str, Any] = {"path": str(each.path), "progress": each.progress, "depth": each.depth}
    if each.run is None:
        return {**told, "fault": each.fault}
    return {**told, **each.run.description.model_dump(mode="json")}
