"""How well a model of the drawn world does what it is told, measured from the pixels of many clips.

Prompts go through every colour, shape and motion; seeds are those of no training clip. An image-to-video model is given
the first frames of scenes that were never drawn in training, and the motion as its prompt. Leaves out: speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.shapes import draw
from ditkit.shapes.draw import COLORS, DIRECTIONS, MOTIONS, SHAPES, Scene
from ditkit.shapes.measure import measure, psnr, score

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline

TARGETS = {"color": 0.95, "motion": 0.90, "shape": 0.80}
ROUND_TRIP_TARGET = 28.0  # dB
SUBJECT = ("color", "shape", "background")
SUBJECT_TARGET = 0.90
FIRST_SEED = 1_000_000  # training never sees a seed of a run; this keeps clear of the examples too


Progress = Callable[[int, int], None]  # called after each clip with how many are done, and of how many


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


@dataclass(frozen=True)
class ImageQuality:
    """``rates``: share of clips with the right attribute; ``subject``: colour, shape and background all kept;
    ``first_frame``: mean PSNR in dB of the first frame against the picture."""

    clips: int
    rates: dict[str, float]
    subject: float
    first_frame: float
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return self.subject >= SUBJECT_TARGET


def held_out(count: int, motions: tuple[str, ...] = tuple(DIRECTIONS)) -> Iterator[tuple[Scene, int]]:
    """``count`` scenes and seeds. Colours, shapes and motions take turns, so each is there about equally often."""
    rng = np.random.default_rng(2026)
    for i in range(count):
        fixed = {
            "color": tuple(COLORS)[i % len(COLORS)],
            "shape": SHAPES[(i // len(COLORS)) % len(SHAPES)],
            "motion": motions[(i + i // len(motions)) % len(motions)],
            "background": tuple(draw.BACKGROUNDS)[rng.integers(len(draw.BACKGROUNDS))],
        }
        yield draw.sample_scene(rng, **fixed), FIRST_SEED + i


def round_trip(pipe: Pipeline, count: int = 16) -> float:
    """Mean PSNR in dB over clips, after clamping and rounding to bytes, through encode and decode."""
    import torch

    vae = pipe.components["vae"]
    values = []
    for i in range(count):
        clip = draw.draw(draw.sample_scene(np.random.default_rng([77, i])), draw.FRAMES)
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype) / 127.5 - 1
        with torch.inference_mode():
            out = torch.cat(list(vae.decode(vae.encode(video))), 2)[0].permute(1, 2, 3, 0)
        values.append(psnr(clip, ((out.float().cpu() + 1) * 127.5).round().numpy().astype(np.uint8)))
    return float(np.mean(values))


def quality(
    pipe: Pipeline, count: int = 72, motions: tuple[str, ...] = tuple(DIRECTIONS),
    progress: Progress = lambda done, total: None, **request: Any,
) -> Quality:  # fmt: skip
    """Make ``count`` clips from plain captions and held-out seeds and read them. ``request`` overrides defaults."""
    scenes: list[Scene] = []
    marks: list[dict[str, bool]] = []
    failures: list[dict[str, Any]] = []
    for scene, seed in held_out(count, motions):
        video = pipe(draw.plain_caption(scene), seed=seed, **request).video
        scenes.append(scene)
        marks.append(_marks(video, scene, failures, prompt=draw.plain_caption(scene), seed=seed))
        progress(len(marks), count)
    by_value: dict[str, dict[str, float]] = {name: {} for name in marks[0]}
    for name, values in by_value.items():
        shown = [getattr(scene, name) for scene in scenes]
        for value in sorted(set(shown)):
            values[value] = _mean(mark[name] for mark, there in zip(marks, shown, strict=True) if there == value)
    return Quality(count, _rates(marks), by_value, round_trip(pipe), failures)


def image_quality(
    pipe: Pipeline, count: int = 60, motions: tuple[str, ...] = MOTIONS,
    progress: Progress = lambda done, total: None, **request: Any,
) -> ImageQuality:  # fmt: skip
    """Make ``count`` clips out of pictures of held-out scenes and read them. ``request`` overrides defaults."""
    marks: list[dict[str, bool]] = []
    failures: list[dict[str, Any]] = []
    likeness: list[float] = []
    for scene, seed in held_out(count, motions):
        picture = draw.draw(scene)[0]
        video = pipe(draw.motion_caption(scene), image=picture, seed=seed, **request).video
        marks.append(_marks(video, scene, failures, scene=scene.__dict__, seed=seed))
        likeness.append(min(psnr(video[0], picture), 100.0))
        progress(len(marks), count)
    subject = _mean(all(mark[name] for name in SUBJECT) for mark in marks)
    return ImageQuality(count, _rates(marks), subject, _mean(likeness), failures)


def _marks(video: np.ndarray, wanted: Scene, failures: list[dict[str, Any]], **about: Any) -> dict[str, bool]:
    """Which attributes of a clip are right. ``failures`` grows by one where some are not."""
    reading = measure(video)
    right = score(reading, wanted)
    if not all(right.values()):
        failures.append({**about, "seen": {name: getattr(reading, name) for name, ok in right.items() if not ok}})
    return right


def _rates(marks: list[dict[str, bool]]) -> dict[str, float]:
    return {name: _mean(mark[name] for mark in marks) for name in marks[0]}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
