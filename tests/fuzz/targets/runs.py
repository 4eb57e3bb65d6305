"""Run folders: opened, listed, gone on with, forked."""

from __future__ import annotations

import json
import shutil

from ditkit.runs import Run, listed

from .. import bases
from ..mutate import as_json, bytes_mutated, copied, entry_mutated, put, tree_mutated
from ..watch import command
from .state import mutated

NAMED = ("open", "list", "go", "resume", "fork", "runs")
HOWS = (*["open"] * 20, *["list"] * 10, "go", "go", "resume", "resume", "fork", "fork", "runs")
STRANGE = (
    "run-999999-step-2.safetensors", "run-000000.safetensors", f"run-{'9' * 26}.safetensors",
    "clip-0-000001.safetensors",
    "run-000009-step-99999999999999999999.safetensors", "clip-99999999999-000001-step-1.safetensors", ".x.tmp",
    "run-000001-step-٣.safetensors", "run-٠٠٠٠٠٩.safetensors", f"run-{'9' * 200}.safetensors", "a.safetensors",
)  # fmt: skip


def prepare(folder):
    global PIPE, RUNS
    PIPE, RUNS = bases.pipeline(folder, "t2v"), folder / "runs"
    Run.create(RUNS / "a", PIPE, "a red circle", seed=1, keep_steps="all", **bases.SIZE).go(stop_at_step=2)
    Run.create(RUNS / "b", PIPE, ["a", "b"], seed=[1, 2], **bases.SIZE).go(stop_at_step=1)
    Run.open(RUNS / "a", PIPE).fork(RUNS / "c", at_step=1, guidance_scale=2.0).go(stop_at_step=2)
    Run.create(RUNS / "d", PIPE, "x", seed=1, **bases.SIZE).go()


def make(rng, folder) -> str:
    run = copied(RUNS / rng.choice("aaabcd"), folder / "run")
    file, kept = run / "run.json", sorted((run / "states").iterdir())
    what = rng.choice(("json", "json", "json", "json", "bytes", "state", "state", "names", "entry"))
    if what == "json":
        put(file, as_json(tree_mutated(rng, json.loads(file.read_text()))[0]))
    elif what == "bytes":
        put(file, bytes_mutated(rng, file.read_bytes())[0])
    elif what == "state":
        each = rng.choice(kept)
        put(each, mutated(rng, each.read_bytes()))
    elif what == "names":
        each = rng.choice(kept)
        shutil.copy(each, each.with_name(rng.choice(STRANGE)))
        if rng.random() < 0.5:
            each.unlink()
    else:
        more = (run / "lock", run / ".x.tmp", run / ".ditkit-1.part", run / "states" / ".y.tmp", run / "clip.mp4",
                run / "clip.json", run / "states" / "run-000009.safetensors")  # fmt: skip
        entry_mutated(rng, rng.choice((*run.rglob("*"), *more)))
    return rng.choice(HOWS)


def run(folder, how):
    at, out = folder / "run", folder / "out"
    if how == "resume":
        command("run", "--resume", at, "--quiet", "--out", out / "o.npz", "--no-sheet")
    elif how == "fork":
        command(
            "fork", at, "--set", "guidance_scale=3", "--run", folder / "forked", "--out", out / "f.npz", "--clip", 0
        )
    elif how == "runs":
        command("runs", folder)
    elif how == "list":
        listed(folder)
    else:
        run = Run.open(at, PIPE)
        run.state()
        for clip in range(min(run.description.clips, 4)):
            run.clip_state(clip)
        if how == "go":
            run.go(stop_at_step=3)
