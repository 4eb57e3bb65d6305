"""``ditkit demo``: one good prompt on the embedded model; what ``make demo`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli import job
from ditkit.cli.flags import RawSettings
from ditkit.cli.generate import open_pipe

PROMPT = "a red circle moving left on a black background"
SEED = 7


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    prompt: Annotated[str, typer.Argument(help="What the clip should show.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="Another seed gives another clip.")] = SEED,
    out: job.Out = Path("outputs/demo.mp4"),
    model: Annotated[str, typer.Option(help="A model's name or folder.")] = "shapes",
    quiet: job.Quiet = False,
) -> None:
    """Make a clip on the embedded model, in seconds."""
    pipe, request, _ = open_pipe(RawSettings({"prompt": (prompt,), "seed": (str(seed),), "model": (model,)}))
    assert out is not None
    if not quiet:
        print(f'"{request.prompt}", seed {request.seed}, model {model}', flush=True)
    job.carry_out(pipe, pipe.begin(request), job.RunOptions(out, job.sheet_for(out, None, False), quiet=quiet))
