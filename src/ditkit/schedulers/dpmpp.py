"""DPM-Solver++: a multistep scheduler without a corrector, as an ODE scheduler (``DPMpp``) and as an SDE scheduler
that adds fresh noise at every step (``DPMppSDE``).

Both integrate the x0 prediction m over lambda = ln((1 - sigma) / sigma). With h = lambda_t - lambda_s and D1 the scaled
difference of the last two predictions, the second-order midpoint step is

    ODE  x_t = sigma_t / sigma_s * x_s  +  alpha_t * (1 - e^-h) * (m_s + D1 / 2)
    SDE  x_t = sigma_t / sigma_s * e^-h * x_s  +  alpha_t * (1 - e^-2h) * (m_s + D1 / 2)
               +  sigma_t * sqrt(1 - e^-2h) * noise

The first step is of first order, so is the last (it goes to sigma 0), and under 15 steps the one before it has at most
the second. sigma 1 (lambda -inf) is allowed in front: its prediction is then infinitely far away and drops out of D1.

Source: arXiv 2211.01095 with the constants of Wan2.1 ``fm_solvers.py``. Leaves out: thresholding, noise prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.schedulers.common import Multistep, log_snr, recall, remember, weighted

_FEW_STEPS = 15  # below this many steps the last but one is at most of second order (Wan2.1 ``fm_solvers.py``)


@dataclass(frozen=True)
class DPMpp(Multistep):
    """``order`` 1 to 3, ``solver_type`` ``midpoint`` or ``heun`` (they differ at second order only).

    Order 3 is the multistep formula as published and as every implementation has it; its last term carries half of the
    weight that the Taylor series asks for, so it converges like a second-order method with another constant."""

    solver_type: str = "midpoint"

    name: ClassVar[str] = "dpm++"
    solver_types: ClassVar[tuple[str, str]] = ("midpoint", "heun")

    def solve(
        self, x: Tensor, velocity: Tensor, step: Step, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """x at ``step.sigma`` -> x at ``step.sigma_next``; any shape, float32 (float64 stays float64).

        ``noise``: normal, of x's shape, for the SDE scheduler only. ``history``: {} or what the step before returned,
        up to ``order - 1`` past x0 predictions with their sigmas."""
        x, velocity = self.working(x, velocity, step, noise)
        now = [(step.sigma, x - step.sigma * velocity), *recall(history, x)]
        left = step.count - step.index
        limit = 1 if left == 1 else 2 if left == 2 and step.count < _FEW_STEPS else 3
        points = now[: min(self.order, limit)]

        h = log_snr(step.sigma_next) - log_snr(step.sigma)
        ratio = step.sigma_next / step.sigma
        terms = [(ratio * math.exp(-h) if self.needs_noise else ratio, x)]
        terms += zip(self._weights(step, h, [sigma for sigma, _ in points]), (x0 for _, x0 in points), strict=True)
        if noise is not None:
            terms.append((step.sigma_next * math.sqrt(-math.expm1(-2 * h)), noise.to(x)))
        return weighted(terms), remember(now[: self.order - 1])

    def _weights(self, step: Step, h: float, sigmas: Sequence[float]) -> list[float]:
        """The factors of the x0 predictions at ``sigmas``, the newest first."""
        alpha = 1 - step.sigma_next
        z = 2 * h if self.needs_noise else h  # the exponent over which the x0 predictions are integrated
        phi = -math.expm1(-z)  # the integral of e^-(z - u) over the step, for a constant
        if len(sigmas) == 1:
            return [alpha * phi]
        lambdas = [log_snr(s) for s in sigmas]
        r = [(a - b) / h for a, b in pairwise(lambdas)]
        d1 = alpha * (1 - phi / z)  # for a straight line
        if len(sigmas) == 2:
            d = (alpha * phi / 2 if self.solver_type == "midpoint" else d1) / r[0]
            return [alpha * phi + d, -d]
        # The two differences are a = (m0 - m1) / r0 and b = (m1 - m2) / r1; with g = (a - b) / (r0 + r1) the step takes
        # the slope a + r0 * g and the curvature g. d2 is the published weight of g.
        d2 = alpha * (0.5 - (1 - phi / z) / z)
        g = (d1 * r[0] + d2) / (r[0] + r[1])
        a, b = (d1 + g) / r[0], -g / r[1]
        return [alpha * phi + a, b - a, -b]


@dataclass(frozen=True)
class DPMppSDE(DPMpp):
    """The stochastic variant; ``noise`` is needed at every step. ``order`` 1 or 2 (the third-order formula in
    circulation does not vanish with the step size, so there is nothing to agree with)."""

    name: ClassVar[str] = "dpm++_sde"
    needs_noise: ClassVar[bool] = True
    orders: ClassVar[tuple[int, ...]] = (1, 2)
