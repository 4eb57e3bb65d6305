"""The Euler scheduler: one straight step along the velocity, nothing remembered.

x_next = x + (sigma_next - sigma) * velocity. The few-step models of the Wan family are used with it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.schedulers.common import Solver, weighted


@dataclass(frozen=True)
class Euler(Solver):
    """First order, no options."""

    name: ClassVar[str] = "euler"

    def solve(
        self, x: Tensor, velocity: Tensor, step: Step, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """x at ``step.sigma`` -> x at ``step.sigma_next``; any shape, float32 (float64 stays float64)."""
        x, velocity = self.working(x, velocity, step, noise)
        return weighted([(1.0, x), (step.sigma_next - step.sigma, velocity)]), {}
