"""The world of the embedded model: one coloured shape that moves over a plain background, and sentences that say so.

Clips are drawn from signed distances, so edges are smooth and a shape can stand at any fraction of a pixel.
Leaves out: measuring a finished clip (``measure.py``) and training (``training/shapes.py``)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = HEIGHT = 64
FRAMES = 13
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (230, 40, 40), "green": (40, 190, 70), "blue": (50, 90, 245), "yellow": (245, 215, 50),
          "white": (245, 245, 245), "purple": (165, 60, 200)}  # fmt: skip
BACKGROUNDS = {"black": (10, 10, 12), "gray": (112, 114, 116), "navy": (16, 24, 84)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "still", "growing")
MOTION_ODDS = (0.2, 0.2, 0.2, 0.2, 0.1, 0.1)
_REACH = {"circle": 1.0, "square": 0.886, "triangle": 1.35}  # half the width, in radii


@dataclass(frozen=True)
class Scene:
    """What a clip shows. Lengths are in pixels of a 64 x 64 frame; ``travel`` is the whole way of the centre."""

    shape: str
    color: str
    motion: str
    background: str
    x: float
    y: float
    radius: float
    travel: float


def sample_scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """A random scene whose shape never leaves the frame; ``fixed`` pins shape, color, motion or background."""
    shape = fixed.get("shape") or _pick(rng, SHAPES)
    color = fixed.get("color") or _pick(rng, tuple(COLORS))
    background = fixed.get("background") or _pick(rng, tuple(BACKGROUNDS))
    motion = fixed.get("motion") or MOTIONS[rng.choice(len(MOTIONS), p=MOTION_ODDS)]
    radius, travel = rng.uniform(8.5, 11), rng.uniform(22, 30)
    if motion == "growing":
        radius = rng.uniform(14, 18)  # the size at the end; it starts at a third of that
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    reach = radius * _REACH[shape] + 1
    low, high = reach, WIDTH - 1 - reach

    def start(direction: int) -> float:
        if direction == 0:
            return rng.uniform(low, high)
        return rng.uniform(low, high - travel) if direction > 0 else rng.uniform(low + travel, high)

    return Scene(shape, color, motion, background, start(dx), start(dy), radius, travel)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; ``x``, ``y`` count from the centre, y downwards.

    The three shapes have about the same area at the same radius, so size says nothing about shape."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    # An equilateral triangle, point up: three half-planes at the same distance from the centre.
    inner = 0.778 * radius
    return np.maximum(y, (np.sqrt(3) * np.abs(x) - y) / 2) - inner


def draw(scene: Scene, frames: int = FRAMES) -> np.ndarray:
    """uint8 [frames, 64, 64, 3]."""
    time = np.linspace(0, 1, frames)[:, None, None] if frames > 1 else np.zeros((1, 1, 1))
    dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH][:, None]
    radius = scene.radius * ((1 + 2 * time) / 3 if scene.motion == "growing" else np.ones_like(time))
    x = columns - (scene.x + dx * scene.travel * time)
    y = rows - (scene.y + dy * scene.travel * time)
    cover = np.clip(0.5 - signed_distance(scene.shape, x, y, radius), 0, 1)[..., None]
    color, background = np.array(COLORS[scene.color]), np.array(BACKGROUNDS[scene.background])
    return np.round(background + (color - background) * cover).astype(np.uint8)


def plain_caption(scene: Scene) -> str:
    """The wording that is always understood: "a red circle moving left on a black background"."""
    return f"a {scene.color} {scene.shape} {motion_caption(scene)} on a {scene.background} background"


def motion_caption(scene: Scene) -> str:
    """Only what moves and how, for a model that has the first frame: "moving left"."""
    return {"still": "standing still", "growing": "growing"}.get(scene.motion, f"moving {scene.motion}")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
