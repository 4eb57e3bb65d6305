"""Rows: what an installed package brings, or a file that is named as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from ditkit import BaseStage, Field
from ditkit.assembly import PlugRow, StageRow, TaskRow
from ditkit.nn.attention import AttentionRow, sdpa
from ditkit.schedulers import SchedulerRow
from ditkit.schedulers.euler import Euler


@dataclass(frozen=True)
class Twice(Euler):
    """Euler with steps of another length."""

    factor: float = 1.0

    def solve(self, x, velocity, step, history, noise=None):
        return super().solve(x, velocity * self.factor, step, history, noise)


@dataclass(frozen=True)
class Louder:
    factor: float = 2.0

    def __call__(self, predict):
        return lambda x, step: predict(x, step) * self.factor


class Count(BaseStage):
    name = "count"
    reads = ("prompt",)
    writes = ("words",)
    fields = (Field("words", "plain", "list[int]", "B", "", name, "words of each prompt"),)

    def run(self, inputs, ctx):
        return {"words": [len(prompt.split()) for prompt in inputs["prompt"]]}


def halved(q, k, v, site):
    return sdpa(q * 0.5, k, v, site)


LOUDER = PlugRow("louder", "predict", Louder, "velocities times a factor")
COUNT = StageRow("count", Count, before="encode_text", help="words of the prompt")
KERNEL = AttentionRow("halved", halved, "half the logits")
MISSING = AttentionRow("absent", halved, lacks=lambda: "its library is not installed")
TWICE = SchedulerRow("twice", Twice, "Euler times a factor")
SHORT = TaskRow("short", ("encode_text", "denoise"))
