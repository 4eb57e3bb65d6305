"""The Euler scheduler: one straight step along the velocity, nothing remembered.

x_next = x + (sigma_next - sigma) * velocity. The few-step models of the Wan family are used with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.schedulers.common import check_noise, weighted, working
from ditkit.schedulers.sigmas import grid


@dataclass(frozen=True)
class Euler:
    """First order, no options. Immutable; any number of threads can share one."""

    name: ClassVar[str] = "euler"
    needs_noise: ClassVar[bool] = False

    def sigmas(self, steps: int, shift: float, convention: str) -> list[float]:
        return grid(self.name, steps, shift, convention)

    def solve(
        self, x: Tensor, velocity: Tensor, step: Step, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """x at ``step.sigma`` -> x at ``step.sigma_next``; any shape, float32 (float64 stays float64)."""
        check_noise(self.name, self.needs_noise, noise, step)
        x, velocity = working(x, velocity)
        return weighted([(1.0, x), (step.sigma_next - step.sigma, velocity)]), {}
