"""A folder of runs at a glance: what each is, how far it came, what it was forked from. Reads headers, no tensors.

Leaves out: showing it (``cli/runs.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditkit.errors import StateError
from ditkit.runs.description import NAME
from ditkit.runs.kept import WHOLE, Kept, clip
from ditkit.runs.run import Run


@dataclass(frozen=True)
class Listed:
    """``depth``: 0, or one more than that of the run in the same folder that it was forked from. ``progress``:
    ``done``, ``step 3 of 50``, ``clip 1 of 3, step 4 of 50``, ``begun`` or ``damaged``; ``fault`` says of a run that
    cannot be opened why."""

    path: Path
    run: Run | None
    depth: int
    progress: str
    fault: str = ""


def listed(folder: str | Path) -> list[Listed]:
    """The runs right under ``folder``, oldest first, each followed by its forks. Raises StateError."""
    folder = Path(folder)
    if not folder.is_dir():
        do = "Name one, or begin a run with --run"
        raise StateError(f"listing the runs in {folder}", "there is no such folder", do)
    runs, broken = list[Run](), []
    for path in sorted(folder.iterdir()):
        if (path / NAME).exists():
            try:
                runs.append(Run.open(path.absolute()))
            except StateError as e:
                broken.append(Listed(path, None, 0, "damaged", str(e)))
    return [*_ordered(runs), *broken]


def _ordered(runs: list[Run]) -> list[Listed]:
    """Each run once: of a folder that was copied the first one has the forks, and runs that are each other's forks,
    which nobody made with ditkit, come last."""
    ids, forks, found = {run.description.id for run in runs}, dict[str | None, list[Run]](), list[Listed]()
    for run in sorted(runs, key=lambda run: (run.description.created, run.name)):
        above = run.description.parent
        forks.setdefault(above.id if above is not None and above.id in ids else None, []).append(run)
    while forks:
        waiting = [(run, 0) for run in reversed(forks.pop(None if None in forks else next(iter(forks))))]
        while waiting:
            run, depth = waiting.pop()
            found.append(Listed(run.path, run, depth, progress(run)))
            waiting += [(fork, depth + 1) for fork in reversed(forks.pop(run.description.id, []))]
    return found


def progress(run: Run) -> str:
    description = run.description
    if not run.apart:
        return _standing(run.states.of(WHOLE), description.steps)
    for i in range(description.clips):
        standing = _standing(run.states.of(clip(i)), description.steps)
        if standing != "done":
            return f"clip {i + 1} of {description.clips}, {standing}"
    return "done"


def _standing(kept: list[Kept], steps: int) -> str:
    if not kept:
        return "begun"
    try:
        _, tensors = kept[0].outline()
    except StateError:
        return "damaged"
    if "video" in tensors:
        return "done"
    return "begun" if kept[0].step is None else f"step {kept[0].step} of {steps}"
