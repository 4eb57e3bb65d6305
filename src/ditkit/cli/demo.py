"""``ditkit demo``: one good prompt on the embedded model; what ``make demo`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.flags import RawSettings
from ditkit.cli.job import carried_out
from ditkit.cli.opening import open_pipe
from ditkit.cli.run_options import Out, Quiet, RunOptions, sheet_for

PROMPT = "a red circle moving left on a black background"
SEED = 7


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    prompt: Annotated[str, typer.Argument(help="What the clip should show.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="Another seed gives another clip.")] = SEED,
    out: Out = Path("outputs/demo.mp4"),
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "shapes",
    quiet: Quiet = False,
) -> None:
    """Make a clip on the embedded model, in seconds."""
    pipe, request, _ = open_pipe(RawSettings({"prompt": (prompt,), "seed": (str(seed),), "model": (model,)}))
    assert out is not None
    if not quiet:
        print(f'"{request.prompt}", seed {request.seed}, model {model}', flush=True)
    with carried_out(pipe, pipe.begin(request), RunOptions(out, sheet_for(out, None, False), quiet=quiet)) as job:
        job.result = job.run()
