"""Plugs that tests put into the seams: small, real, written as a user would after reading the guide."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FirstBlockCache:
    """A residual cache at seam B: when the first block changed little since it was last computed in full, what the
    other blocks added then is added again."""

    threshold: float = 0.1

    seam = "run_blocks"

    def __call__(self, run_blocks, run):
        def around(blocks, x, ctx):
            first, *rest = blocks
            y = first(x, ctx)
            change = y - x
            if "change" in run.memory:
                before = run.memory["change"]
                if (change - before).abs().mean() / before.abs().mean() < self.threshold:
                    run.tell("hit", ctx.step)
                    return y + run.memory["rest"]
            run.tell("miss", ctx.step)
            z = run_blocks(rest, y, ctx)
            run.memory["change"], run.memory["rest"] = change, z - y
            return z

        return around


@dataclass(frozen=True)
class ForgetfulCache(FirstBlockCache):
    """The same with its memory in a closure, which it says."""

    saves_memory = False

    def __call__(self, run_blocks):
        memory = {}

        def around(blocks, x, ctx):
            first, *rest = blocks
            y = first(x, ctx)
            change = y - x
            if memory and (change - memory["change"]).abs().mean() / memory["change"].abs().mean() < self.threshold:
                return y + memory["rest"]
            z = run_blocks(rest, y, ctx)
            memory.update(change=change, rest=z - y)
            return z

        return around


@dataclass(frozen=True)
class Momentum:
    """A guidance with memory at seam A: each velocity is averaged with the ones before."""

    weight: float = 0.5

    seam = "predict"

    def __call__(self, predict, run):
        def call(x, step):
            velocity = predict(x, step)
            if "mean" in run.memory:
                velocity = self.weight * run.memory["mean"] + (1 - self.weight) * velocity
            run.memory["mean"] = velocity
            return velocity

        return call


@dataclass(frozen=True)
class StaleAttention:
    """A memory at seam D: what attention to the text gave at the first step is used at all later ones."""

    seam = "attend"

    def __call__(self, attend, run):
        def call(q, k, v, site):
            if site.kind != "cross":
                return attend(q, k, v, site)
            name = f"{site.block}.{site.control}"
            if name not in run.memory:
                run.memory[name] = attend(q, k, v, site)
            return run.memory[name]

        return call


@dataclass(frozen=True)
class Windows:
    """Context windows at seam A: overlapping ranges of latent frames, averaged."""

    size: int = 2
    stride: int = 1

    seam = "predict"

    def __call__(self, predict):
        def call(x, step):
            total, count = torch.zeros_like(x), torch.zeros(1, 1, x.shape[2], 1, 1)
            for start in range(0, max(1, x.shape[2] - self.size + 1), self.stride):
                stop = min(start + self.size, x.shape[2])
                total[:, :, start:stop] += predict(x[:, :, start:stop], step.window(start, stop))
                count[:, :, start:stop] += 1
            return total / count

        return call
