"""A short form of ``tests/kills.py``: each command is killed twice, and a kept run at each of its parts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import kills
import pytest
from forks import ended, fork

from ditkit.media import read_video
from ditkit.runs import Run

KILLS = 18
NAMES = ("generate mp4", "generate png over one", "run --run", "fork", "convert over one", "lock", "cache, used",
         "cache clear", "a State over one")  # fmt: skip


@pytest.mark.slow
def test_whatever_is_killed_leaves_nothing_half_and_the_next_command_puts_all_in_order(model, tmp_path):
    told = kills.kills(model, KILLS, 7, tmp_path, NAMES)
    assert [fault for about in told.values() for fault in about.faults] == []
    assert sum(about.trials for about in told.values()) == KILLS
    assert sum(about.killed for about in told.values()) >= KILLS // 2, "those before an event hit all of them"
    assert sum(about.left for about in told.values()) > 0, "something was half written, and swept"


@pytest.mark.slow
def test_a_run_goes_on_from_wherever_it_was_killed(model, tmp_path):
    """Right before each State gets its name, and before the clip gets its own."""
    words = ["run", kills.PROMPT, "--seed", "3", "--steps", "2", "--model", str(model), "--quiet", "--no-sheet",
             "--threads", "1"]  # fmt: skip

    def begin(name: str) -> list[str]:
        return [*words, "--run", str(tmp_path / name), "--out", str(tmp_path / name / "clip.npz")]

    def killed_at(name: str, number: int) -> bool:
        class Stop:
            left = number

            def __call__(self, event, given):
                if event == "os.rename" and ".ditkit-" in str(given[0]):
                    self.left -= 1
                    if self.left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        def work():
            sys.addaudithook(Stop())
            kills.call(begin(name))

        code = ended(fork(work, tmp_path / "log"))
        assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        return code != 0

    def result(name: str):
        return Run.open(tmp_path / name).state(), read_video(tmp_path / name / "clip.npz")[0]

    kills.call(begin("whole"))
    expected, number, stood = result("whole"), 1, []
    while killed_at(name := f"run-{number}", number):
        folder = Path(tmp_path / name)
        with contextlib.suppress(IndexError):
            stood.append(Run.open(folder).states.of("run")[0].path.name if (folder / "run.json").exists() else "")
        kills.call(["run", "--resume", str(folder), "--quiet"] if stood[-1] else begin(name))
        state, frames = result(name)
        assert state.equal(expected[0])
        assert state.fingerprints == expected[0].fingerprints
        assert (frames == expected[1]).all()
        assert kills.hidden(folder) == []
        number += 1
    assert len(stood) >= 8, "the beginning and run.json, the text, two steps, the loop's end, the frames, clip and card"
    assert {name.partition("-step-")[2] for name in stood if "-step-" in name} == {"1.safetensors", "2.safetensors"}
