"""Sound inputs that several targets share: tiny models, a pipeline, States of a run at each of its stages."""

from __future__ import annotations

import functools
from pathlib import Path

SIZE = {"width": 32, "height": 32, "frames": 5, "steps": 3}
DEFAULTS = "[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 3\n"


@functools.cache
def model(folder: Path, task: str, layout: str) -> Path:
    """The folder of a complete model below ``folder``."""
    import tiny

    at = tiny.write(folder / f"model-{task}-{layout}", task, layout)
    (at / "ditkit.toml").write_text(DEFAULTS)
    return at


@functools.cache
def pipeline(folder: Path, task: str):
    import ditkit

    return ditkit.load(model(folder, task, "diffusers"), threads=1)


def begun(pipe, prompt="a red circle", seed=1, **more):
    return pipe.begin(pipe.model.request({"prompt": prompt, "seed": seed, **SIZE, **more}))


@functools.cache
def states(folder: Path):
    """A run before, within and after its stages, and one of two clips."""
    pipe = pipeline(folder, "t2v")
    first = begun(pipe)
    text = pipe.run(first, until="encode_text").state
    half, whole = pipe.run(text, stop_at_step=2).state, pipe.run(text).state
    two = pipe.run(begun(pipe, ["a", "b"], [1, 2]), until="encode_text").state
    return first, text, half, whole, two
