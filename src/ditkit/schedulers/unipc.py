"""UniPC: a multistep scheduler whose every step is corrected when the next velocity is known. Wan's default.

With lambda = ln((1 - sigma) / sigma) a step from s to t, h = lambda_t - lambda_s, is

    x_t = sigma_t / sigma_s * x_s  -  alpha_t * (e^-h - 1) * m_s  -  alpha_t * sum_k w_k / r_k * (m_k - m_s)

where m are x0 predictions, r_k = (lambda_k - lambda_s) / h their distances. The predictor sums over earlier steps; the
corrector repeats the step before with the x0 prediction at its end (r = 1) as one more, and its result replaces x.
The weights solve sum_k w_k r_k^(j-1) = c_j. When only one k is summed over, the method puts w = B / 2 instead, with
B = -h (``bh1``) or B = e^-h - 1 (``bh2``); that is the only difference between the two.

Source: the formulas of UniPC (arXiv 2302.04867) as Wan2.1 ``fm_solvers_unipc.py`` uses them for flow matching.
Leaves out: thresholding, noise prediction, and any way to end at full order (the last step goes to sigma 0, where a
higher order is not defined)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ditkit.contracts import History, Step
from ditkit.errors import RequestError, StateError
from ditkit.schedulers.common import Multistep, Past, log_snr, recall, remember, weighted


@dataclass(frozen=True)
class UniPC(Multistep):
    """``order`` 1 to 3, ``solver_type`` ``bh2`` or ``bh1``, ``corrector`` on or off.

    The order climbs from 1 in the first steps and falls back to 1 in the last. Where official code is not finite:
    ``bh1`` ends normally here (the last step has no sum, so its B does not matter); with a first sigma of 1 (lambda
    -inf) the x0 prediction at infinite distance drops out of the later sums, which is their limit, and ``bh1``, whose
    B / 2 has no limit there, uses the solved weight for that one correction."""

    solver_type: str = "bh2"
    corrector: bool = True

    name: ClassVar[str] = "unipc"
    solver_types: ClassVar[tuple[str, str]] = ("bh1", "bh2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.corrector, bool):
            raise RequestError(f"corrector {self.corrector!r} of unipc", "neither true nor false", "Use true or false")

    def solve(
        self, x: Tensor, velocity: Tensor, step: Step, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """x at ``step.sigma`` -> x at ``step.sigma_next``; any shape, float32 (float64 stays float64).

        ``history`` is {} or what the step before returned: up to ``order`` past x0 predictions with their sigmas, and
        for the corrector ``sample``, the corrected x of the step before."""
        sample, velocity = self.working(x, velocity, step, noise)
        x0 = sample - step.sigma * velocity  # from the uncorrected x, as in the official code
        past = recall(history, x)
        if self.corrector:
            # Without a past the copy keeps the caller's tensor out of the history.
            sample = self._correct(x0, step.sigma, history, past) if past else sample.clone()

        order = min(self.order, step.count - step.index, len(past) + 1)
        now = [(step.sigma, x0), *past]
        x_next = self._advance(sample, now[0], now[1:order], step.sigma_next)
        if not self.corrector:
            return x_next, remember(now[: self.order - 1])
        return x_next, {**remember(now[: self.order]), "sample": sample}

    def _correct(self, x0: Tensor, sigma: float, history: History, past: Past) -> Tensor:
        """The step that led to ``sigma`` once more, now that the x0 prediction at its end is known. It is of the order
        of that step, which the number of earlier predictions gives; only the step before the last had a lower one than
        that, and nothing comes of the correction after it: the last step goes to x0, whatever x is."""
        if "sample" not in history or history["sample"].shape != x0.shape:
            found = "what was remembered of the earlier steps comes from a scheduler without one"
            do = "Go on with the scheduler and options that began the run"
            raise StateError("unipc with its corrector", found, do)
        earlier = past[1 : self.order]
        return self._advance(history["sample"].to(x0.device), past[0], [*earlier, (sigma, x0)], sigma)

    def _advance(
        self, x: Tensor, start: tuple[float, Tensor], others: Sequence[tuple[float, Tensor]], sigma: float
    ) -> Tensor:
        """x at ``start``'s sigma -> x at ``sigma``, by the x0 prediction of ``start`` and those of ``others``."""
        sigma_s, m_s = start
        if (h := log_snr(sigma) - log_snr(sigma_s)) == 0:
            raise StateError("unipc", f"its history was made at this noise level, {sigma:g}", "Take an untouched State")
        alpha, phi = 1 - sigma, math.expm1(-h)
        ratios = [1.0 if s == sigma else (log_snr(s) - log_snr(sigma_s)) / h for s, _ in others]
        near = [k for k, r in enumerate(ratios) if math.isfinite(r)]
        big_b = -h if self.solver_type == "bh1" else phi
        if len(others) == 1 and near and math.isfinite(big_b):
            weights = [big_b / 2]
        else:
            weights = _solved([ratios[k] for k in near], h)

        gains = [alpha * w / ratios[k] for w, k in zip(weights, near, strict=True)]
        terms = [(-gain, others[k][1]) for gain, k in zip(gains, near, strict=True)]
        return weighted([(sigma / sigma_s, x), (sum(gains) - alpha * phi, m_s), *terms])


def _solved(ratios: Sequence[float], h: float) -> list[float]:
    """w with sum_k w_k r_k^(j-1) = j! * psi_j for j = 1, 2, ..., where psi_1 = (e^-h - 1) / -h - 1 and
    psi_j = psi_(j-1) / -h - 1 / j!. (The paper divides and multiplies by B; it cancels.)"""
    if not ratios:
        return []
    psi, right = math.expm1(-h) / -h, []
    for j in range(1, len(ratios) + 1):
        psi -= 1 / math.factorial(j)
        right.append(math.factorial(j) * psi)
        psi /= -h
    rows = [[r**j for r in ratios] for j in range(len(ratios))]
    a, b = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (rows, right))
    return torch.linalg.solve(a, b).tolist()
