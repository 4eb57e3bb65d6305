"""A disk that fills up under each writer: one sentence, nothing half, and what was there before is whole."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from forks import child

from ditkit import media
from ditkit.cli.main import main
from ditkit.pipeline import Pipeline
from ditkit.state import State

PROMPT = "a red circle"
QUICK = ["--steps", "2", "--quiet", "--threads", "1", "--no-sheet"]
ROOMS = {"at once": 70_000, "as it begins": 3_000, "as it ends": 100}
"""When the disk fills up: before the command, or around what it computes -> bytes that a file may have from then on."""


def said(words: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main(words), err.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    """A folder with something of everything: clips, a State, a run, a cache, a converted model, a locked one."""
    root = tmp_path_factory.mktemp("made")
    before = os.getcwd()
    os.chdir(root)
    try:
        for suffix in ("mp4", "png"):
            media.write_video(f"old-{suffix}.{suffix}", np.zeros((5, 32, 32, 3), np.uint8), 16, {"old": True})
        words = ["run", PROMPT, "--model", str(model), "--out", "x.npz", "--save-state", "old.safetensors", *QUICK]
        assert said([*words, "--cache", "cache"]) == (0, "")
        words = ["run", PROMPT, "--model", str(model), "--run", "./begun", "--stop-at-step", "1", *QUICK]
        assert said(words) == (0, "")
        assert said(["convert", str(model), "converted", "--layout", "native", "--quiet"]) == (0, "")
        shutil.copytree(model, root / "locked")
        (root / "locked" / "ditkit.toml").write_text('[components]\nvae = "./vae"\ntransformer = "./transformer"\n')
        assert said(["lock", "locked"]) == (0, "")
    finally:
        os.chdir(before)
    return root


COMMANDS = {
    **{f"{name}.{suffix}": ["generate", PROMPT, "--seed", "4", "--out", f"{name}-{suffix}.{suffix}", *QUICK]
       for name, suffix in (("old", "mp4"), ("old", "png"), ("new", "gif"))},
    "a sheet": ["generate", PROMPT, "--out", "new.npz", "--sheet", "sheet.png", *QUICK[:-1]],
    "a State": ["run", PROMPT, "--seed", "4", "--out", "new.npz", "--save-state", "old.safetensors", *QUICK],
    "a run": ["run", PROMPT, "--run", "./new", *QUICK],
    "a run goes on": ["run", "--resume", "./begun", *QUICK[2:]],
    "a fork": ["fork", "./begun", "--run", "./fork", "--seed", "5", *QUICK[2:]],
    "a cache": ["generate", PROMPT, "--seed", "4", "--out", "new.npz", "--cache", "cache", *QUICK],
    "a native model over one": ["convert", "MODEL", "converted", "--layout", "native", "--overwrite", "--quiet"],
    "a diffusers model": ["convert", "MODEL", "new", "--layout", "diffusers", "--max-shard-size", "50KB", "--quiet"],
    "a lock": ["lock", "locked"],
    "a trimmed cache": ["cache", "trim", "--cache", "cache", "--cache-gigabytes", "1e-9"],
    "a cleared cache": ["cache", "clear", "--cache", "cache", "--yes"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_up(model, made, tmp_path, monkeypatch, name):
    words = [str(model) if word == "MODEL" else word for word in COMMANDS[name]]
    if words[0] in ("generate", "run") and "--resume" not in words:
        words += ["--model", str(model)]
    for when, room in ROOMS.items():
        if when != "at once" and words[0] not in ("generate", "run", "fork"):
            continue

        def full(room=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        def work(when=when, full=full):
            run = Pipeline.run

            def filling(*given, **more):
                if when == "as it begins":
                    full()
                result = run(*given, **more)
                full()
                return result

            Pipeline.run = filling if when != "at once" else run
            if when == "at once":
                full()
            return said(words)

        root = tmp_path / when
        shutil.copytree(made, root, symlinks=True)
        monkeypatch.chdir(root)
        before = tree(root)
        code, err = child(work)
        after = tree(root)
        assert "Traceback" not in err
        if code:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, err
            assert str(code) in "12"
        left = [path for path in after if Path(path).name.startswith(".ditkit") or path.endswith(".tmp")]
        assert left == []
        others = [path for path, data in before.items() if after.get(path) != data]
        assert code == 0 or all(path.startswith(("begun", "cache")) for path in others), f"{others} after {err}"
        for file in [*root.rglob("states/*.safetensors"), root / "old.safetensors"]:
            State.load(file)
