"""The plan of a denoising run: one ``Step`` a line, made before anything is computed and printable as it is.

Steps are told apart by their index. Two of them may have the same timestep (shift 16 with 80 steps begins 999, 999), so
nothing is ever looked up by timestep. Plain Python: no torch."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ditkit.contracts import EXPERTS, Scheduler, Step
from ditkit.errors import RequestError
from ditkit.schedulers.sigmas import explicit, float32, timesteps


def step_table(
    scheduler: Scheduler,
    steps: int | None,
    shift: float | None,
    convention: str,
    guidance_scale: float | Sequence[float],
    scale: float,
    explicit_sigmas: Iterable[float] | None = None,
    *,
    boundary: float | None = None,
    guidance_scale_2: float | None = None,
) -> list[Step]:
    """The steps of a run.

    ``explicit_sigmas`` takes the place of the scheduler's grid: then ``steps`` is None or their number, and ``shift``
    is None. ``scale`` is the transformer's ``timestep_scale``. ``guidance_scale`` is one number, or one for each step.
    With ``boundary`` (in sigma, as in Wan2.2: 0.875 or 0.9) the steps whose timestep is at least ``boundary * scale``
    go to the expert ``transformer``, the others to ``transformer_2`` with ``guidance_scale_2`` (None: the same).
    Raises RequestError for whatever does not fit together."""
    if explicit_sigmas is None:
        if steps is None or shift is None:
            raise RequestError("a run without its own sigmas", "steps or shift is missing", "Give both")
        sigmas = list(scheduler.sigmas(steps, shift, convention))
    else:
        sigmas = explicit(explicit_sigmas)
        if shift is not None:
            raise RequestError(f"shift {shift!r} with explicit sigmas", "they are used as given", "Leave the shift out")
        if steps not in (None, len(sigmas) - 1):
            raise RequestError(f"{steps} steps", f"the explicit sigmas make {len(sigmas) - 1}", "Leave the steps out")
    count = len(sigmas) - 1
    told = timesteps(sigmas, convention, scheduler.name, scale)
    # Rounded as late as official code and diffusers do it. Near sigma 1 it matters: 1 - sigma is what solvers use.
    sigmas = [float32(sigma) for sigma in sigmas]
    guidance = _per_step(guidance_scale, count)
    low = [False] * count
    if boundary is not None:
        if not 0 <= boundary <= 1:
            raise RequestError(f"boundary {boundary!r}", "not between 0 and 1", "Give it in sigma, such as 0.875")
        low = [t < boundary * scale for t in told]
        if guidance_scale_2 is not None:
            second = _per_step(guidance_scale_2, count)
            guidance = [b if is_low else a for a, b, is_low in zip(guidance, second, low, strict=True)]
    elif guidance_scale_2 is not None:
        raise RequestError("guidance_scale_2", "there is no boundary between two experts", "Leave it out")
    return [
        Step(i, count, sigmas[i], sigmas[i + 1], told[i], guidance[i], expert=EXPERTS[low[i]]) for i in range(count)
    ]


def request_steps(scheduler: Scheduler, request: Any, scale: float, experts: int = 1) -> list[Step]:
    """The step table that ``request`` asks for (anything with a Request's attributes). With two ``experts`` it needs a
    boundary; with one, a boundary or a second guidance scale is refused rather than ignored."""
    steps, shift = (request.steps, request.shift) if request.sigmas is None else (None, None)
    if experts == 2 and request.boundary is None:
        found = "no boundary between them is known"
        raise RequestError("a run of two experts", found, "Give one, such as boundary=0.875")
    if experts == 1 and request.boundary is not None:
        raise RequestError(f"boundary={request.boundary}", "this model has one transformer", "Leave it out")
    return step_table(
        scheduler, steps, shift, request.convention, request.guidance_scale, scale, request.sigmas,
        boundary=request.boundary, guidance_scale_2=request.guidance_scale_2,
    )  # fmt: skip


def format_table(steps: Iterable[Step]) -> str:
    """Aligned plain text with a heading: i, timestep, sigma, guidance, expert."""
    rows = [("i", "timestep", "sigma", "guidance", "expert")]
    rows += [(str(s.index), f"{s.timestep:g}", f"{s.sigma:.6f}", f"{s.guidance_scale:g}", s.expert) for s in steps]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # the last column begins where it begins
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _per_step(guidance: float | Sequence[float], count: int) -> list[float]:
    values = [float(g) for g in guidance] if isinstance(guidance, Sequence) else [float(guidance)] * count
    if len(values) != count:
        do = "Give one, or one for each step"
        raise RequestError(f"{len(values)} guidance scales", f"there are {count} steps", do)
    if not all(map(math.isfinite, values)):
        raise RequestError(f"guidance {guidance!r}", "not a finite number", "Use a number such as 5")
    return values
