"""Other wordings of what a drawn clip shows, so that the trained models understand more than the plain caption."""

from collections.abc import Sequence

import numpy as np

from ditkit.shapes.draw import DIRECTIONS, Scene, motion_caption

SHAPE_WORDS = {"circle": ("circle", "circle", "ball", "disc"), "square": ("square", "square", "box"),
                "triangle": ("triangle",)}  # fmt: skip
BACKGROUND_WORDS = {"black": ("black", "black", "dark"), "gray": ("gray", "gray", "grey"),
                     "navy": ("navy", "navy", "navy blue")}  # fmt: skip
MOTION_WORDS = {
    "still": ("standing still", "resting", "not moving", "that stays still", "at rest"),
    "growing": ("growing", "getting bigger", "that grows", "becoming larger"),
    "left": ("leftwards", "left", "to the left"),
    "right": ("rightwards", "right", "to the right"),
    "up": ("upwards", "up", "to the top"),
    "down": ("downwards", "down", "to the bottom"),
}
SUBJECTS = ("it", "the shape", "the thing", "")
VERBS = ("moving", "sliding", "gliding", "drifting", "flying", "that moves", "that travels", "that floats")
TEMPLATES = (
    "a {color} {shape} {motion} on a {background} background",
    "{color} {shape} {motion}, {background} background",
    "on a {background} background, a {color} {shape} {motion}",
    "a video of a {color} {shape} {motion} over a {background} backdrop",
    "the {shape} is {color} and the background is {background}: a {shape} {motion}",
    "A {color} {shape} {motion} in front of a {background} background.",
    "a {shape} in {color}, {motion}, on {background}",
)


def other_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of some thousand other wordings of the same scene."""
    motion, template = _moving(scene, rng), _pick(rng, TEMPLATES)
    shape, background = _pick(rng, SHAPE_WORDS[scene.shape]), _pick(rng, BACKGROUND_WORDS[scene.background])
    return template.format(color=scene.color, shape=shape, background=background, motion=motion)


def other_motion(scene: Scene, rng: np.random.Generator) -> str:
    """Only what moves and how, in other words or the plain ones."""
    motion, subject = _moving(scene, rng), _pick(rng, SUBJECTS)
    return f"{subject} {motion_caption(scene) if rng.random() < 0.4 else motion}".strip()


def _moving(scene: Scene, rng: np.random.Generator) -> str:
    motion = _pick(rng, MOTION_WORDS[scene.motion])
    return f"{_pick(rng, VERBS)} {motion}" if scene.motion in DIRECTIONS else motion


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
