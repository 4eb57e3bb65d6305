"""Plugs and a stage without rows: what a person writes into a file and names as FILE.py:NAME."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ditkit import BaseStage, Field

HEARD = []


@dataclass(frozen=True)
class Skip:
    """Leaves one block out."""

    block: int = 1
    note: str = field(default="", compare=False)

    seam = "run_blocks"

    def __call__(self, run_blocks):
        def run(blocks, x, ctx):
            return run_blocks([b for i, b in enumerate(blocks) if i != self.block], x, ctx)

        return run


@dataclass(frozen=True)
class Interval:
    """Guides between two noise levels only."""

    low: float
    high: float = 1.0

    seam = "predict"

    def __call__(self, predict):
        return lambda x, step: predict(
            x, step if self.low <= step.sigma <= self.high else replace(step, guidance_scale=1.0)
        )


def softer(attend):
    return lambda q, k, v, site: attend(q * 0.5, k, v, site)


softer.seam = "attend"


@dataclass(frozen=True)
class Renoise:
    """A few-step scheduler: it jumps to the clean guess and adds fresh noise."""

    strength: float = 1.0

    name = "renoise"
    needs_noise = True

    def sigmas(self, steps, shift, convention):
        even = [1 - i / steps for i in range(steps)]
        return [*(shift * s / (1 + (shift - 1) * s) for s in even), 0.0]

    def solve(self, x, velocity, step, history, noise=None):
        clean = x - step.sigma * velocity
        return (1 - step.sigma_next) * clean + self.strength * step.sigma_next * noise, {}


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module, by: float):
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x):
        return self.inner(x) * self.by


@dataclass(frozen=True)
class Damped:
    """A swap: the feed-forward of one block is scaled."""

    by: float = 0.5

    seam = "swap"

    def match(self, name: str, module: nn.Module) -> bool:
        return name == "blocks.1.ffn"

    def make(self, module: nn.Module) -> nn.Module:
        return Scaled(module, self.by)


@dataclass(frozen=True)
class Listen:
    """Remembers the names of all events."""

    seam = "listener"

    def __call__(self, event):
        HEARD.append(event.name)


@dataclass(frozen=True)
class Amount:
    amount: float = 1.0
    mode: str = "mean"

    def __post_init__(self):
        if self.mode not in ("mean", "max"):
            raise ValueError(f"mode {self.mode!r} is neither mean nor max")


@dataclass(frozen=True)
class Sharpness(BaseStage):
    offset: float = 0.0

    name = "sharpness"
    after = "decode_latents"
    reads = ("video", "request")
    writes = ("sharpness",)
    settings = Amount
    fields = (Field("sharpness", "tensor", "float32", "B T", "levels", name, "step between neighbouring pixels"),)

    def run(self, inputs, ctx):
        steps = inputs["video"].float().diff(dim=3).abs().flatten(2)
        own = ctx.settings.sharpness
        found = steps.mean(2) if own.mode == "mean" else steps.amax(2)
        return {"sharpness": own.amount * found + self.offset}


@dataclass(frozen=True)
class Brighter(BaseStage):
    """Has no place of its own."""

    name = "brighter"
    reads = ("latents",)
    writes = ("latents",)

    def run(self, inputs, ctx):
        return {"latents": inputs["latents"] + torch.tensor(0.5)}
