"""What the solvers share: working precision, the logarithmic signal-to-noise ratio, and the memory of past steps.

A scheduler has no state. What it remembers is a dict of tensors, x0 predictions and their sigmas from the newest back:
``x0_1`` (shape of x) and ``sigma_1`` (0-dim float64 on the CPU), ``x0_2`` and ``sigma_2``, ...
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.errors import PipelineError

Past = list[tuple[float, Tensor]]
"""(sigma, x0 prediction), the newest first."""


def working(x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision of the step: float64 when x is float64, else float32."""
    if x.shape != velocity.shape:
        raise PipelineError(
            "one scheduler step",
            f"x has shape {tuple(x.shape)}, the velocity {tuple(velocity.shape)}",
            "Return a velocity of the shape of x",
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype), velocity.to(dtype)


def check_noise(name: str, needs_noise: bool, noise: Tensor | None, step: Step) -> None:
    if needs_noise != (noise is not None):
        raise PipelineError(
            f"step {step.index} of {name}",
            "no noise was handed in" if needs_noise else "noise was handed in that would not be used",
            "Hand noise exactly to solvers whose needs_noise is true",
        )


def log_snr(sigma: float) -> float:
    """lambda = ln(alpha / sigma) with alpha = 1 - sigma: -inf at sigma 1, +inf at sigma 0."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)


def recall(history: History, x: Tensor) -> Past:
    """The past that ``remember`` wrote, on x's device."""
    past: Past = []
    while (sigma := history.get(f"sigma_{len(past) + 1}")) is not None:
        past.append((float(sigma), history[f"x0_{len(past) + 1}"].to(x.device)))
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
