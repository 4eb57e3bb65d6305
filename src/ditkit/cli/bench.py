"""``ditkit bench``: measurements of a whole model, shown. What is measured lives in ``lab``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import Given, settle, with_settings
from ditkit.cli.generate import load
from ditkit.errors import RequestError
from ditkit.request import Request

app = typer.Typer(name="bench", help="Measure quality.", no_args_is_help=True)


@app.callback()
def group() -> None:
    pass


@app.command("quality")
@with_settings
def quality(
    given: Given,
    clips: Annotated[int, typer.Option(help="How many held-out prompts and seeds, 1 or more.")] = 72,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Generate clips of the drawn world and measure colour, shape and direction from their pixels.

    For the embedded model and others trained like it. Exit code 0 when the targets are reached, else 1."""
    from rich.progress import Progress

    from ditkit.lab import quality as measured

    if clips < 1:
        raise RequestError(f"--clips {clips}", "there is nothing to measure", "Give 1 or more")
    settled, model = settle(given)
    for key in ("prompt", "seed", "batched"):
        if said := [origin for origin, _ in settled.said.get(key, ()) if not origin.startswith("model ")]:
            raise RequestError(f"{said[-1]} with bench quality", f"it has a {key} of its own for each clip"
                               if key != "batched" else "it makes one clip at a time", "Leave it out")  # fmt: skip
    fixed = {k: v for k, v in settled.of(Request).items() if k not in ("prompt", "seed")}
    model.request({"prompt": "x", **fixed})
    out = show.console(stderr=as_json)
    with Progress(console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task("clips", total=clips)
        result = measured.quality(
            load(settled), clips, progress=lambda done, total: bar.update(task, completed=done), **fixed
        )
    if as_json:
        print(json.dumps({**asdict(result), "reached": result.reached, "targets": measured.TARGETS}))
        return 0 if result.reached else 1
    for name, rate in result.rates.items():
        target = measured.TARGETS.get(name)
        values = "  ".join(f"{value} {r:.0%}" for value, r in result.by_value[name].items())
        out.print(f"{name:11}{rate:7.1%}  {'' if target is None else f'target {target:.0%}':12} {values}")
    out.print(f"{'round trip':11}{result.round_trip:5.1f} dB  target {measured.ROUND_TRIP_TARGET:.0f} dB")
    for failure in result.failures:
        wrong = ", ".join(f"{name} {seen}" for name, seen in failure["seen"].items())
        out.print(f"missed: {failure['prompt']} (seed {failure['seed']}): saw {wrong}")
    return 0 if result.reached else 1
