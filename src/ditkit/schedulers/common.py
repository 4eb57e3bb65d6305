"""What the solvers share: working precision, the logarithmic signal-to-noise ratio, and the memory of past steps.

A scheduler has no state. What it remembers is a dict of tensors, x0 predictions and their sigmas from the newest back:
``x0_1`` (shape of x) and ``sigma_1`` (0-dim float64 on the CPU), ``x0_2`` and ``sigma_2``, ..."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.errors import PipelineError, RequestError, StateError, nearest
from ditkit.schedulers.sigmas import grid

Past = list[tuple[float, Tensor]]
"""(sigma, x0 prediction), the newest first."""


class Solver:
    """Base of the schedulers: their noise levels, and what a step begins with. A subclass is a frozen dataclass; any
    number of threads can share one."""

    name: ClassVar[str]
    needs_noise: ClassVar[bool] = False

    def sigmas(self, steps: int, shift: float, convention: str) -> list[float]:
        return grid(self.name, steps, shift, convention)

    def working(self, x: Tensor, velocity: Tensor, step: Step, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` and ``velocity`` in the precision of the step: float64 when x is float64, else float32."""
        if self.needs_noise != (noise is not None):
            found = "no noise was handed in" if self.needs_noise else "noise was handed in that would not be used"
            do = "Hand noise exactly to solvers whose needs_noise is true"
            raise PipelineError(f"step {step.index} of {self.name}", found, do)
        if x.shape != velocity.shape:
            found = f"x has shape {tuple(x.shape)}, the velocity {tuple(velocity.shape)}"
            raise PipelineError("one scheduler step", found, "Return a velocity of the shape of x")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(dtype), velocity.to(dtype)


@dataclass(frozen=True)
class Multistep(Solver):
    """``order``: one of ``orders``; ``solver_type``: one of ``solver_types``."""

    order: int = 2
    solver_type: str = ""

    orders: ClassVar[tuple[int, ...]] = (1, 2, 3)
    solver_types: ClassVar[tuple[str, str]]

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in self.orders:
            do = f"Use one of: {', '.join(map(str, self.orders))}"
            raise RequestError(f"order {self.order!r} of {self.name}", "not supported", do)
        if self.solver_type not in self.solver_types:
            found = f"unknown{nearest(str(self.solver_type), self.solver_types)}"
            do = f"Use {' or '.join(self.solver_types)}"
            raise RequestError(f"solver_type {self.solver_type!r} of {self.name}", found, do)


def log_snr(sigma: float) -> float:
    """lambda = ln(alpha / sigma) with alpha = 1 - sigma: -inf at sigma 1, +inf at sigma 0."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)


def recall(history: History, x: Tensor) -> Past:
    """The past that ``remember`` wrote, on x's device."""
    past: Past = []
    while (sigma := history.get(f"sigma_{len(past) + 1}")) is not None:
        x0 = history.get(f"x0_{len(past) + 1}")
        if sigma.numel() != 1 or x0 is None or x0.shape != x.shape:
            raise StateError(
                "going on from a State", "its scheduler's history is of another run", "Take an untouched State"
            )
        past.append((float(sigma), x0.to(x.device)))
    return past


def remember(past: Sequence[tuple[float, Tensor]]) -> dict[str, Tensor]:
    memory: dict[str, Tensor] = {}
    for age, (sigma, x0) in enumerate(past, 1):
        memory[f"x0_{age}"] = x0
        memory[f"sigma_{age}"] = torch.tensor(sigma, dtype=torch.float64, device="cpu")
    return memory


def weighted(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum of factor * tensor, a new tensor; the factors are made in double precision."""
    (factor, tensor), *rest = terms
    total = tensor * factor
    for factor, tensor in rest:
        total.add_(tensor, alpha=factor)
    return total
