"""Where the noise levels of a run lie, and what the transformer is told at each of them.

sigma is the share of noise: x = (1 - sigma) * data + sigma * noise, so 1 is pure noise and 0 is the picture.
Two conventions are in use for the same models and give different numbers; a run uses one, never a mixture:

- ``wan``: Wan's own solvers (UniPC, DPM++); for Euler, which Wan has not, the grid of Self-Forcing.
- ``diffusers``: what diffusers' schedulers make of ``use_flow_sigmas`` and ``flow_shift`` (UniPC, DPM++) or ``shift``
  (Euler). Its UniPC and DPM++ grids differ from each other.

Values are Python floats in double precision. Timesteps are made from them as they are; the steps of a run get them
rounded to float32 (``table``), because both conventions do it in that order. Plain Python: no torch, no numpy."""

import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise

from ditkit.errors import RequestError, nearest

CONVENTIONS = ("wan", "diffusers")

_LOWEST = 1e-3  # the smallest noise level of the models' training table, an end point of diffusers' grids
_HIGHEST = 0.9990000128746033  # 1 - 1e-3 rounded to float32: where official UniPC begins before the shift
_NUDGE = 1e-6  # diffusers' UniPC keeps this distance from sigma 1, where its lambda would be -inf


def grid(scheduler: str, steps: int, shift: float, convention: str) -> list[float]:
    """``steps + 1`` strictly falling sigmas in [0, 1] for one of ``unipc``, ``dpm++``, ``dpm++_sde``, ``euler``; the
    last is 0. ``shift`` > 0 moves them towards noise (above 1) or away from it (below 1); 1 leaves them alone.

    Raises RequestError for an unknown name, fewer than one step, a shift that is not a positive number, or one so
    extreme that two sigmas coincide."""
    _check_known("convention", convention, CONVENTIONS)
    _check_known("sigmas of scheduler", scheduler, _GRIDS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RequestError(f"{steps!r} steps", "not a whole number of at least 1", "Ask for one step or more")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        raise RequestError(f"shift {shift!r}", "not a positive number", "Use a shift such as 3, 5 or 12")
    sigmas = [*_GRIDS[scheduler][convention](steps, float(shift)), 0.0]
    if sigmas[0] > 1 or not _falling(sigmas):
        asked, found = f"{steps} steps with shift {shift:g}", "neighbouring noise levels coincide"
        raise RequestError(asked, found, "Use a milder shift or fewer steps")
    return sigmas


def explicit(sigmas: Iterable[float]) -> list[float]:
    """A list of sigmas given by hand, checked: numbers in [0, 1], strictly falling, at least one above 0. A final 0
    is appended where it is missing. They are used as they are; no shift is applied. Raises RequestError."""
    asked = f"sigmas {(given := list(sigmas))!r}"
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in given):
        raise RequestError(asked, "not all of them are numbers", "Give numbers between 0 and 1")
    values = [float(s) for s in given]
    if values and values[-1] != 0:
        values.append(0.0)
    if not all(0 <= s <= 1 for s in values):  # false for nan as well
        raise RequestError(asked, "not all of them lie between 0 and 1", "Divide timesteps by the model's scale first")
    if not _falling(values):
        do = "List each level once, the highest first, at least 1e-7 apart"
        raise RequestError(asked, "they do not fall strictly", do)
    if len(values) < 2:
        raise RequestError(asked, "there is no step to take", "Give at least one sigma above 0")
    return values


def timesteps(sigmas: Sequence[float], convention: str, scheduler: str, scale: float) -> list[float]:
    """What the transformer is told at each step: one value for every sigma but the last.

    UniPC and DPM++ tell ``scale * sigma`` cut off to a whole number, in both conventions and for explicit sigmas too;
    two steps may then be told the same value. Euler and every other scheduler tell it as a float32 number.
    ``scale`` is the transformer's ``timestep_scale``."""
    _check_known("convention", convention, CONVENTIONS)
    if scheduler in ("unipc", "dpm++", "dpm++_sde"):
        return [float(math.trunc(scale * sigma)) for sigma in sigmas[:-1]]
    return [float32(scale * float32(sigma)) for sigma in sigmas[:-1]]


def _check_known(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        found = f"unknown{nearest(str(name), known)}"
        raise RequestError(f"{what} {name!r}", found, f"Use one of: {', '.join(known)}")


def _falling(sigmas: Sequence[float]) -> bool:
    """Strictly, and still so in float32."""
    return all(a > b for a, b in pairwise(map(float32, sigmas)))


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _shifted32(sigma: float, shift: float) -> float:
    """The shift with every operation rounded to float32."""
    return float32(float32(float32(shift) * sigma) / float32(1 + float32(float32(shift - 1) * sigma)))


def float32(value: float) -> float:
    """The nearest float32 number."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _evenly(start: float, stop: float, count: int) -> list[float]:
    """``count`` values from ``start`` on, the next of which would be ``stop``; rounded as numpy's linspace rounds."""
    stride = (stop - start) / count
    return [i * stride + start for i in range(count)]


def _from_nearly_one(steps: int, shift: float) -> list[float]:
    """Wan2.1 ``fm_solvers_unipc.py``: evenly from 0.999 to 0, then shifted."""
    return [_shifted(s, shift) for s in _evenly(_HIGHEST, 0.0, steps)]


def _from_one(steps: int, shift: float) -> list[float]:
    """Wan2.1 ``fm_solvers.py`` ``get_sampling_sigmas``: evenly from 1 to 0, then shifted."""
    return [1.0, *(_shifted(s, shift) for s in _evenly(1.0, 0.0, steps)[1:])]


def _from_one_float32(steps: int, shift: float) -> list[float]:
    """Self-Forcing ``utils/scheduler.py``: evenly from 1 to 0, then shifted; all of it in float32. The even values are
    counted from both ends, as torch's linspace does it."""
    stride, half = float32(-1 / steps), (steps + 1) // 2
    even = [float32(1 + stride * i if i < half else -stride * (steps - i)) for i in range(steps)]
    return [min(_shifted32(s, shift), 1.0) for s in even]


def _diffusers_unipc(steps: int, shift: float) -> list[float]:
    """``UniPCMultistepScheduler``: evenly from 1 to 0.001, shifted, the first kept off 1."""
    first, *rest = (_shifted(s, shift) for s in _evenly(1.0, _LOWEST, steps))
    return [first - _NUDGE if abs(first - 1) < _NUDGE else first, *rest]


def _diffusers_dpmpp(steps: int, shift: float) -> list[float]:
    """``DPMSolverMultistepScheduler``: alpha evenly from 1 to 0.001, sigma = 1 - alpha, shifted."""
    alphas = [*_evenly(1.0, _LOWEST, steps), _LOWEST]
    return [_shifted(1 - alpha, shift) for alpha in reversed(alphas[1:])]


def _diffusers_euler(steps: int, shift: float) -> list[float]:
    """``FlowMatchEulerDiscreteScheduler``: its table of noise levels is shifted when it is built, in float32, and what
    is picked evenly between the table's ends is shifted once more."""
    highest, lowest = (_shifted32(s, shift) for s in (1.0, float32(_LOWEST)))
    even = [highest] if steps == 1 else [*_evenly(highest, lowest, steps - 1), lowest]
    return [min(_shifted(s, shift), 1.0) for s in even]


_GRIDS: dict[str, dict[str, Callable[[int, float], list[float]]]] = {
    "dpm++": {"wan": _from_one, "diffusers": _diffusers_dpmpp},
    "dpm++_sde": {"wan": _from_one, "diffusers": _diffusers_dpmpp},
    "euler": {"wan": _from_one_float32, "diffusers": _diffusers_euler},
    "unipc": {"wan": _from_nearly_one, "diffusers": _diffusers_unipc},
}
