"""The embedded model: complete, small, strict, and it does what it is told. ``ditkit bench quality`` measures more."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import ditkit
from ditkit.assembly import MODELS
from ditkit.lab.quality import ROUND_TRIP_TARGET, held_out, round_trip
from ditkit.shapes.draw import BACKGROUNDS, COLORS, FRAMES, HEIGHT, SHAPES, WIDTH, plain_caption
from ditkit.shapes.measure import measure, score

CLIPS = 8


@pytest.fixture(scope="module")
def pipe():
    return ditkit.load("shapes")


def test_it_is_complete_and_at_most_30_megabytes():
    folder = MODELS["shapes"]
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert (folder / part).is_dir()
    assert (folder / "README.md").is_file()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 30_000_000


def test_plain_prompts_become_what_they_say(pipe):
    """Eight held-out prompts and seeds with the default steps. One miss of each kind is allowed here; the rates over
    many more are in the model card."""
    marks = [score(measure(pipe(plain_caption(s), seed=seed).video), s) for s, seed in held_out(CLIPS)]
    for name in ("color", "shape", "motion", "background"):
        assert sum(m[name] for m in marks) >= CLIPS - 1, (name, marks)


def test_other_words_are_understood_too(pipe):
    video = pipe("On a dark background, a blue ball glides to the left.", seed=5).video
    reading = measure(video)
    assert (reading.color, reading.shape, reading.motion, reading.background) == ("blue", "circle", "left", "black")


def test_the_prompt_decides_and_the_seed_varies(pipe):
    one = pipe("a red circle moving left on a black background", seed=1).video
    other = pipe("a red circle moving left on a black background", seed=2).video
    assert one.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(one.astype(int) - other).mean() > 1


def test_the_vae_keeps_what_it_is_given(pipe):
    assert round_trip(pipe, 4) >= ROUND_TRIP_TARGET


def test_held_out_runs_show_every_value_about_equally_often():
    scenes = [s for s, _ in held_out(72)]
    for values, name in ((COLORS, "color"), (SHAPES, "shape"), (("left", "right", "up", "down"), "motion")):
        counts = [sum(getattr(s, name) == v for s in scenes) for v in values]
        assert min(counts) >= 0.6 * 72 / len(values), (name, counts)
    assert {s.background for s in scenes} == set(BACKGROUNDS)


@pytest.mark.slow
def test_the_wheel_carries_the_model_and_runs_outside_the_checkout(tmp_path):
    root = Path(__file__).resolve().parents[2]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    code = (
        "import ditkit, sys; assert sys.argv[1] in ditkit.__file__; "
        "v = ditkit.load()('a red circle moving left on a black background', steps=2).video; print(v.shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == str((FRAMES, HEIGHT, WIDTH, 3))
