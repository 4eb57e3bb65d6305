"""Parts of a run's folder by themselves: names, files of States, and a State that is taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.runs import located
from ditkit.runs.folder import KeptStates
from ditkit.runs.fork import taken_back
from ditkit.state import Field, State


@pytest.mark.parametrize(
    ("text", "place"),
    [("a", "runs/a"), ("./a", "a"), ("b/a", "b/a"), ("..", ".."), (Path("a"), "a"), ("/x/a", "/x/a"), ("~/a", "~/a")],
)
def test_a_bare_name_lies_in_runs(tmp_path, monkeypatch, text, place):
    monkeypatch.chdir(tmp_path)
    assert located(text) == tmp_path / os.path.expanduser(place)


def at(step: int | None) -> State:
    return State({"latents": torch.full((4,), float(step or 0)), **({} if step is None else {"step": step})})


@pytest.mark.parametrize(
    ("only", "first", "left"), [(True, False, [4]), (True, True, [4, 1]), (False, False, [4, 3, 2, 1])]
)
def test_the_newest_is_kept_and_others_as_asked(tmp_path, only, first, left):
    states = KeptStates(tmp_path, keeps_first=first)
    for step in (None, 1, 2, 2):
        states.save("run", at(step), only)
        states.save("clip-1", at(step), only)
    assert [kept.number for kept in states.of("run")] == left
    assert states.of("clip-10") == []
    newest = states.newest("run", pytest.fail)
    assert newest is not None
    assert newest["step"] == 2


def test_the_nearest_at_or_before_a_step(tmp_path):
    states = KeptStates(tmp_path)
    for step in (None, 2, 4):
        states.save("run", at(step), only=False)
    found = [states.newest("run", pytest.fail, upto=step) for step in range(6)]
    assert [None if state is None else state["step"] for state in found] == [None, None, 2, 2, 4, 4]


def test_files_of_others_are_left_alone(tmp_path):
    states = KeptStates(tmp_path)
    states.save("run", at(1), only=True)
    for name in ("notes.txt", "run-1.safetensors", "run-000001-step-x.safetensors", "my.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".run-000002.safetensors.9.tmp").write_bytes(b"")
    states.sweep()
    states.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "my.safetensors", "notes.txt", "run-000001-step-x.safetensors", "run-1.safetensors",
    ]  # fmt: skip


def test_a_durable_state_is_brought_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a)))
    at(1).save(tmp_path / "a.safetensors")
    assert done == ["replace"]
    done.clear()
    at(1).save(tmp_path / "b.safetensors", durable=True)
    assert done == ["fsync", "replace", "fsync"], "the file, its name, the folder"


class Says(BaseStage):
    """Writes fields that follow from those that it reads."""

    def __init__(self, name, reads, writes, loop=()):
        self.name, self.reads, self.writes, self.loop = name, reads, writes, loop
        self.fields = tuple(Field(n, "plain", "str", "", "", name, "") for n in writes if n[0] in "abcd")


PIPELINE = StageList([
    Says("one", ("prompt",), ("a",)), Says("two", ("seed",), ("b",)), Says("three", ("a",), ("c",)),
    Says("start", ("b",), ("latents",)), Says("loop", ("c", "latents"), ("latents", "step"), ("latents", "step")),
    Says("last", ("latents",), ("d",)),
])  # fmt: skip


@pytest.mark.parametrize(
    ("names", "end", "left"),
    [
        ([], None, ["one", "two", "three", "start", "loop", "last"]),
        (["last"], None, ["one", "two", "three", "start", "loop"]),
        (["loop"], None, ["one", "two", "three"]),  # what the loop began from is overwritten
        (["one"], None, ["two"]),
        (["two"], None, ["one", "three"]),
        (["one"], 4, ["two", "start", "loop", "last"]),  # the loop keeps its own
    ],
)
def test_what_follows_from_a_stage_goes_with_it(names, end, left):
    stages = PIPELINE.names
    fields = {"a": "", "b": "", "c": "", "latents": torch.zeros(1), "step": 3, "d": ""}
    state = State({"prompt": ["x"], "seed": [1], **fields, "stages": stages, "records": {name: {} for name in stages}})
    back = taken_back(PIPELINE, state, names, end)
    assert back["stages"] == left
    assert list(back["records"]) == left
    written = {name for stage in PIPELINE.stages if stage.name in left for name in stage.writes}
    assert set(back) == {"prompt", "seed", "stages", "records", *written}


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    from filelock import FileLock, Timeout

    hold = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held')"
    lock = tmp_path / "lock"
    command = [sys.executable, "-u", "-c", f"{hold}; sys.stdin.read()", str(lock)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Timeout):
        FileLock(lock).acquire(timeout=0)
    process.kill()
    process.communicate()
    with FileLock(lock, timeout=0):
        pass
