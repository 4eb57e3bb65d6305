"""AdamW for vectors, Muon for matrices and convolution kernels, with one learning rate for both.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and
the update is scaled to the size of an AdamW update (Moonlight, arXiv 2502.16982, eq. 4), so that one rate fits both.
PyTorch's own ``torch.optim.Muon`` takes two-dimensional parameters only; most of a VAE is five-dimensional.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by five Newton-Schulz steps of degree five, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.mT if m.shape[0] > m.shape[1] else m
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if m.shape[0] > m.shape[1] else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonalise(update) * (0.2 * max(update.shape) ** 0.5)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


class Optimizer:
    """Both together. ``matrices(name, parameter)`` says which parameters go to Muon."""

    def __init__(self, named_parameters, lr: float, weight_decay: float = 0.0, matrices=lambda name, p: p.ndim >= 2):
        named = [(n, p) for n, p in named_parameters if p.requires_grad]
        chosen = [p for n, p in named if matrices(n, p)]
        others = [p for n, p in named if not matrices(n, p)]
        self.lr = lr
        self.parts = [Muon(chosen, lr, weight_decay=weight_decay)] if chosen else []
        if others:
            self.parts.append(torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0))
        self.parameters = [p for _, p in named]

    def step(self, scale: float, clip: float = 1.0) -> float:
        """One update at ``lr * scale``; returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
