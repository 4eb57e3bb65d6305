"""A new run in a folder that keeps it: the flags that ask for one, and its beginning.

Leaves out: going on (``job.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import expansion, preflight, show
from ditkit.cli.run_options import RunOptions, sheet_for
from ditkit.config import Settled
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline
    from ditkit.runs import Parent
    from ditkit.state import State

RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="NAME|PATH", help="Keep the run in this folder; a NAME lies in runs/.")
]
Every = Annotated[
    int | None, typer.Option(metavar="K", help="With --run: keep a State every K denoising steps. Default: 1.")
]
WHICH = "With --run: keep the newest State only, or one for each kept step, to fork from. Default: last."
KeepSteps = Annotated[str | None, typer.Option(metavar="last|all", help=WHICH)]


@dataclass(frozen=True)
class NewRun:
    """Where a new run is kept and what of it. Made before the model is opened. Raises what stands against it."""

    path: Path
    out: Path | None
    sheet: Path | None
    no_sheet: bool
    keeping: Mapping[str, Any]

    @classmethod
    def at(
        cls, folder: str | Path, every: int | None, keep_steps: str | None, out: Path | None, sheet: Path | None,
        no_sheet: bool,
    ) -> NewRun:  # fmt: skip
        from ditkit.runs import located
        from ditkit.runs.run import check_new

        keeping: dict[str, Any] = {k: v for k, v in (("every", every), ("keep_steps", keep_steps)) if v is not None}
        check_new(located(folder), **keeping)
        return cls(located(folder), out, sheet, no_sheet, keeping)

    def begin(
        self,
        pipe: Pipeline,
        state: State,
        goal: RunOptions,
        settled: Settled,
        parent: Parent | None = None,
        **keeping: Any,
    ) -> tuple[State, RunOptions]:
        """The run is begun, once all that can be known to go wrong has not. ``keeping``: what counts where nothing was
        said."""
        from ditkit.assembly import placed
        from ditkit.runs import Run
        from ditkit.runs.folder import given

        clip = self.out or self.path / "clip.mp4"
        goal = goal.at(clip, sheet_for(clip, self.sheet, self.no_sheet), settled.of(Setup), kept=True)
        with self.unless_begun():
            preflight.check(pipe, state, goal)
            state, goal = expansion.before_run(pipe, state, goal, show.console(stderr=goal.json))
        sheet = str(self.sheet.absolute()) if self.sheet is not None else not self.no_sheet
        setup = given(placed(settled.setup()))  # from every folder
        run = Run.begin(self.path, pipe, state, **{**keeping, **self.keeping}, out=self.out, sheet=sheet, setup=setup,
                        parent=parent)  # fmt: skip
        return state, goal.at(goal.out, goal.sheet, settled.of(Setup), run)

    @contextmanager
    def unless_begun(self) -> Iterator[None]:
        """What fails before the run is there leaves no empty folder that the checks made."""
        new = not self.path.exists()
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if new:
                    self.path.rmdir()
            raise
