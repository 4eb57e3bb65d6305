"""A run that is killed, anywhere, goes on to the same bits: fifty times.

Half of the kills come from outside at random times. The other half come at random calls of Python or C functions, drawn
from each part of the run by itself, so that each part is hit however fast the machine is. A helper process, this file
started as a script, has imported everything once; what it forks from itself begins at once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPT = "a red circle"
STEPS = 12
KILLS = 50
PARTS = {
    "run.py:begin": "begin", "encode.py:run": "text", "denoise.py:run": "loop", "state.py:save": "save",
    "decode_latents.py:run": "decode", "job.py:write": "results",
}  # fmt: skip
"""Functions whose calls are parts of a run; of nested ones the inner one counts. What is in none is ``around``."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills what it forked")
def test_fifty_kills(model, tmp_path):
    from shell import alone

    command = [sys.executable, __file__, str(model), str(tmp_path)]
    environment = {**alone(), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    trials = json.loads(done.stdout)
    assert [t for t in trials if not t["same"]] == []
    assert [t for t in trials if t["left"]] == [], "nothing half written is left"
    killed = [t for t in trials if t["killed"]]
    assert len(trials) == KILLS
    assert len(killed) >= KILLS // 2, "those at calls hit all, those from outside as many as were fast enough"
    places = {t["stood"] for t in killed}
    assert {"nothing", "begun", "text", "decode", "done"} <= places
    assert len({place for place in places if place.startswith("step ")}) >= 4
    assert all(t["half"] for t in killed if t["part"] == "rename"), "a State was written and had not its name yet"
    assert {t["part"] for t in killed} >= {"around", "rename", *PARTS.values()}


# --- the helper


def forked(words: list[str], log: Path, hook=None) -> int:
    """A process that is the command line with these words; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from ditkit.cli.main import main

        if hook is not None:
            sys.setprofile(hook)
        code = main(words)
        sys.setprofile(None)
        if hook is not None:
            hook.ended()
    finally:
        os._exit(code)


class Calls:
    """Counts calls, and in which part of the run they are. At call ``last``, or when for the ``rename``-th time a State
    is about to be renamed, the process kills itself."""

    def __init__(self, last: int | None = None, told: Path | None = None, rename: int = 0):
        self.count, self.last, self.told, self.rename = 0, last, told, rename
        self.within: list[tuple[object, str]] = []
        self.ranges: list[list] = [["around", 0]]

    def __call__(self, frame, event, called):
        if event == "c_call" and called is os.replace and frame.f_code.co_name == "write_whole":
            self.rename -= Path(frame.f_locals["path"]).parent.name == "states"
            if self.rename == 0 and self.last is None and self.told is None:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "call":
            name = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"
            if name in PARTS:
                self.within.append((frame, PARTS[name]))
                self.ranges.append([PARTS[name], self.count])
        elif event == "return" and self.within and self.within[-1][0] is frame:
            self.within.pop()
            self.ranges.append([self.within[-1][1] if self.within else "around", self.count])
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def ended(self) -> None:
        if self.told is not None:
            self.told.write_text(json.dumps([*self.ranges, ["end", self.count]]))


def stood(folder: Path) -> tuple[str, bool]:
    """How far a killed run came, and whether it was writing a State."""
    from ditkit.runs import Run

    half = any((folder / "states").glob(".*.tmp"))
    if not (folder / "run.json").exists():
        return "nothing", half
    (newest, *_) = Run.open(folder).states.of("run")
    _, tensors = newest.outline()
    if "video" in tensors:
        return "done", half
    if newest.step == STEPS:
        return "decode", half
    return (f"step {newest.step}" if newest.step else "text" if "prompt_embeds" in tensors else "begun"), half


def result(folder: Path) -> tuple:
    from ditkit.media import read_video
    from ditkit.runs import Run

    return Run.open(folder).state(), read_video(folder / "clip.npz")[0]


def same(a: tuple, b: tuple) -> bool:
    return a[0].equal(b[0]) and a[0].fingerprints == b[0].fingerprints and bool((a[1] == b[1]).all())


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def helper(model: str, root: Path) -> None:
    draw = random.Random(7)
    log = root / "log.txt"

    def begin(folder: Path) -> list[str]:
        return ["run", PROMPT, "--model", model, "--seed", "3", "--steps", str(STEPS), "--run", str(folder), "--quiet",
                "--out", str(folder / "clip.npz"), "--no-sheet", "--threads", "1"]  # fmt: skip

    from ditkit.cli.main import main

    with contextlib.redirect_stdout(sys.stderr):
        assert main(begin(root / "warm")) == 0  # imports all that a run imports
    gc.collect()
    gc.freeze()  # what is forked leaves the parent's memory where it is
    begun = time.perf_counter()
    assert ended(forked(begin(root / "whole"), log)) == 0, log.read_text()
    seconds = time.perf_counter() - begun
    expected = result(root / "whole")
    assert ended(forked(begin(root / "counted"), log, Calls(told=root / "calls.json"))) == 0, log.read_text()
    *ranges, (_, end) = json.loads((root / "calls.json").read_text())
    spans: dict[str, list[range]] = {}
    for (part, first), following in zip(ranges, [*(r[1] for r in ranges[1:]), end], strict=True):
        spans.setdefault(part, []).append(range(first + 1, following + 1))
    trials = []
    for number in range(KILLS):
        folder = root / f"run-{number}"
        parts = sorted([*spans, "rename"])
        part = "any" if number % 2 else parts[number // 2 % len(parts)]
        if part == "rename":
            pid = forked(begin(folder), log, Calls(rename=1 + number // 2 // len(parts)))
        elif part == "any":
            pid = forked(begin(folder), log)
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            own = [s for s in spans[part] if len(s)]  # in turn: the first of the loop lies before the first kept step
            span = own[number // 2 // len(spans) % len(own)]
            pid = forked(begin(folder), log, Calls(last=draw.choice(span)))
        code = ended(pid)
        assert code in (0, -signal.SIGKILL), log.read_text()
        where, half = stood(folder)
        words = begin(folder) if where == "nothing" else ["run", "--resume", str(folder), "--quiet"]
        assert ended(forked(words, log)) == 0, f"{number} {where}: {log.read_text()}"
        left = sorted({p.name for p in folder.rglob(".*")})
        trials.append({"part": part, "killed": code != 0, "stood": where, "half": half,
                       "same": same(result(folder), expected), "left": left})  # fmt: skip
    print(json.dumps(trials))


if __name__ == "__main__":
    helper(sys.argv[1], Path(sys.argv[2]))
