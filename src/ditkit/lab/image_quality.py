"""How well an image-to-video model of the drawn world keeps what is in the picture and does what the prompt says.

Each case is a scene that was never drawn in training: its first frame is the picture, its motion the prompt. Leaves
out: text-to-video (``quality.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.lab.quality import held_out
from ditkit.shapes.draw import MOTIONS, draw, motion_caption
from ditkit.shapes.measure import measure, psnr, score

if TYPE_CHECKING:
    from ditkit.pipeline import Pipeline

SUBJECT_TARGET = 0.90
SUBJECT = ("color", "shape", "background")


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


def image_quality(
    pipe: Pipeline,
    count: int = 60,
    motions: tuple[str, ...] = MOTIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **request: Any,
) -> ImageQuality:
    """Make ``count`` clips out of pictures of held-out scenes and read them. ``request`` overrides defaults."""
    marks: list[dict[str, bool]] = []
    kept, likeness, failures = [], [], []
    for i, (scene, seed) in enumerate(held_out(count, motions)):
        picture = draw(scene)[0]
        video = pipe(motion_caption(scene), image=picture, seed=seed, **request).video
        reading = measure(video)
        right = {name: ok for name, ok in score(reading, scene).items() if name != "all"}
        marks.append(right)
        kept.append(all(right[name] for name in SUBJECT))
        likeness.append(min(psnr(video[0], picture), 100.0))
        if not all(right.values()):
            wrong = {n: getattr(reading, n) for n, ok in right.items() if not ok}
            failures.append({"scene": scene.__dict__, "seed": seed, "seen": wrong})
        progress(i + 1, count)
    rates = {name: float(np.mean([m[name] for m in marks])) for name in marks[0]}
    return ImageQuality(count, rates, float(np.mean(kept)), float(np.mean(likeness)), failures)
