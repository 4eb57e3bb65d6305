"""How well a model of the drawn world does what it is told, measured from the pixels of many clips.

Prompts go through every colour, shape and motion; seeds are those of no training clip. The VAE's round trip is
measured on clips that were never drawn in training. Leaves out: speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.shapes.draw import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    SHAPES,
    Scene,
    draw,
    plain_caption,
    sample_scene,
)
from ditkit.shapes.measure import measure, psnr, score

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline

TARGETS = {"color": 0.95, "motion": 0.90, "shape": 0.80}
ROUND_TRIP_TARGET = 28.0  # dB
FIRST_SEED = 1_000_000  # training never sees a seed of a run; this keeps clear of the examples too


@dataclass(frozen=True)
class Quality:
    """``rates``: share of clips with the right attribute; ``round_trip``: PSNR in dB of decode(encode(clip))."""

    clips: int
    rates: dict[str, float]
    by_value: dict[str, dict[str, float]]
    round_trip: float
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return all(self.rates[k] >= v for k, v in TARGETS.items()) and self.round_trip >= ROUND_TRIP_TARGET


def held_out(count: int, motions: tuple[str, ...] = tuple(DIRECTIONS)) -> Iterator[tuple[Scene, int]]:
    """``count`` scenes and seeds. Colours, shapes and motions take turns, so each is there about equally often."""
    rng = np.random.default_rng(2026)
    for i in range(count):
        fixed = {
            "color": tuple(COLORS)[i % len(COLORS)],
            "shape": SHAPES[(i // len(COLORS)) % len(SHAPES)],
            "motion": motions[(i + i // len(motions)) % len(motions)],
            "background": tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        }
        yield sample_scene(rng, **fixed), FIRST_SEED + i


def round_trip(pipe: Pipeline, count: int = 16) -> float:
    """Mean PSNR in dB over clips, after clamping and rounding to bytes, through encode and decode."""
    import torch

    vae = pipe.components["vae"]
    values = []
    for i in range(count):
        clip = draw(sample_scene(np.random.default_rng([77, i])), FRAMES)
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype) / 127.5 - 1
        with torch.inference_mode():
            out = torch.cat(list(vae.decode(vae.encode(video))), 2)[0].permute(1, 2, 3, 0)
        values.append(psnr(clip, ((out.float().cpu() + 1) * 127.5).round().numpy().astype(np.uint8)))
    return float(np.mean(values))


def quality(pipe: Pipeline, count: int = 72, motions: tuple[str, ...] = tuple(DIRECTIONS),
            progress: Callable[[int, int], None] = lambda done, total: None, **request: Any) -> Quality:  # fmt: skip
    """Make ``count`` clips from plain captions and held-out seeds and read them. ``request`` overrides defaults."""
    hits: dict[str, list[bool]] = {}
    groups: dict[str, dict[str, list[bool]]] = {}
    failures = []
    for i, (scene, seed) in enumerate(held_out(count, motions)):
        reading = measure(pipe(plain_caption(scene), seed=seed, **request).video)
        marks = {name: right for name, right in score(reading, scene).items() if name != "all"}
        for name, right in marks.items():
            hits.setdefault(name, []).append(right)
            groups.setdefault(name, {}).setdefault(getattr(scene, name), []).append(right)
        if not all(marks.values()):
            wrong = {n: getattr(reading, n) for n, right in marks.items() if not right}
            failures.append({"prompt": plain_caption(scene), "seed": seed, "seen": wrong})
        progress(i + 1, count)
    rates = {name: float(np.mean(v)) for name, v in hits.items()}
    by_value = {name: {value: float(np.mean(v)) for value, v in sorted(g.items())} for name, g in groups.items()}
    return Quality(count, rates, by_value, round_trip(pipe), failures)


__all__ = ["MOTIONS", "Quality", "held_out", "quality", "round_trip"]
