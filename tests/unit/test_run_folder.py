"""Parts of a run's folder by themselves: names, files of States, and a State that is taken back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import child, ended, fork, open_to_all

from ditkit.errors import OutputError, StateError
from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.request import Request
from ditkit.runs import listed, located
from ditkit.runs.folder import KeptStates, RunFolder
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
    at(1).save(tmp_path / "a.safetensors", durable=False)
    assert done == ["replace"]
    done.clear()
    at(1).save(tmp_path / "b.safetensors")
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


# --- what somebody may have put into a folder of a run


def described(folder, **changes) -> Path:
    values = {"id": "0" * 32, "created": "2026-01-01T00:00:00.000+00:00", "model": {"name": "shapes"},
              "request": Request(prompt="a red circle").model_dump(), "setup": {"model": "shapes"}, "clips": 1,
              "steps": 4, "every": 1, "keep_steps": "last"}  # fmt: skip
    (folder / "states").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run": 1, **values, **changes}))
    return folder


@pytest.mark.parametrize("name", ["states", "run.json", "lock"])
def test_links_in_a_run_lead_nowhere(tmp_path, name):
    mine, run = tmp_path / "mine", described(tmp_path / "run")
    mine.mkdir()
    kept = [mine / "run-000001.safetensors", mine / ".ditkit-000000000000.part", mine / ".x.tmp"]
    for file in kept:
        file.write_bytes(b"mine")
    if name == "states":
        (run / name).rmdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine if name == "states" else kept[0])
    with pytest.raises(StateError, match=f"its {name} is a link, which may lead anywhere"), RunFolder.open(run).held():
        pass
    assert sorted(mine.iterdir()) == sorted(kept)
    assert {file.read_bytes() for file in kept} == {b"mine"}
    assert [(run.path.name, run.progress) for run in listed(tmp_path)] == [("run", "damaged")]


@pytest.mark.parametrize("kind", ["device", "itself", "nothing", "pipe", "folder", "another file"])
def test_a_state_that_is_something_else_is_passed_over(tmp_path, kind):
    states, heard = KeptStates(tmp_path / "states"), []
    states.save("run", at(1), only=False)
    odd = states.folder / "run-000002-step-2.safetensors"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        other = at(2).save(tmp_path / "x.safetensors")
        odd.symlink_to({"device": "/dev/zero", "itself": odd, "nothing": tmp_path / "y"}.get(kind, other))
    assert states.newest("run", heard.append)["step"] == 1
    assert len(heard) == 1
    assert odd.name in heard[0]
    with pytest.raises(StateError):
        states.of("run")[0].outline()
    states.nbytes()
    states.save("run", at(3), only=True)
    assert [kept.step for kept in states.of("run")] == [3]


@pytest.mark.parametrize("kind", ["device", "itself", "pipe", "folder", "deep", "long"])
def test_a_description_that_is_something_else(tmp_path, kind):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "run.json"
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "deep":
            file.write_text("[" * 100_000)
        case "long":
            file.write_text('{"run": ' + "9" * 5000 + "}")
        case _:
            file.symlink_to("/dev/zero" if kind == "device" else file)
    with pytest.raises(StateError) as error:
        RunFolder.open(tmp_path / "run")
    assert len(str(error.value)) < 1000
    assert [run.progress for run in listed(tmp_path)] == ["damaged"]


def test_a_run_that_may_not_be_read_hides_no_other():
    with open_to_all() as folder:
        for name, rights in (("a", 0o755), ("b", 0o000), ("c", 0o755)):
            described(folder / name)
            (folder / name).chmod(rights)
        (folder / "c" / "states").chmod(0o000)
        found = child(lambda: [(run.path.name, run.progress) for run in listed(folder)], nobody=True)
    assert sorted(found) == [("a", "begun"), ("b", "damaged"), ("c", "damaged")]


@pytest.mark.parametrize("kind", ["content", "pipe", "folder", "killed"])
def test_locks_that_are_left_or_odd(tmp_path, kind):
    run = RunFolder.open(described(tmp_path / "run"))
    lock = run.path / "lock"
    if kind == "content":
        lock.write_text("12345")
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:

        def work():
            with run.held():
                os.kill(os.getpid(), signal.SIGKILL)

        assert ended(fork(work)) == -signal.SIGKILL
    if kind == "folder":
        with pytest.raises(OutputError, match="working on the run"), run.held():
            pass
        return
    with run.held(), pytest.raises(StateError, match="another process does so"):
        child(lambda: run.held().__enter__())


@pytest.mark.parametrize("created", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00", "yesterday", ""])
def test_no_clock_hides_a_run(tmp_path, created):
    described(tmp_path / "a", created=created)
    described(tmp_path / "b", id="1" * 32)
    os.utime(tmp_path / "a", (1, 1))
    os.utime(tmp_path / "b", (2**33, 2**33))
    assert {run.path.name for run in listed(tmp_path)} == {"a", "b"}
