"""Commands that are killed in the middle, and what they leave: nothing half under a final name, no two files that do
not belong to each other, a sound index of the cache; and the next command puts all in order.

``python tests/kills.py --kills 200 --seed 1`` prints a table. Every second kill comes from outside at a random time,
the others right before a file is opened, renamed, made or removed, drawn from all of these. What is killed is forked
from this process, which has imported everything, so that each command begins at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from forks import ended, fork

from ditkit.cli.main import main
from ditkit.errors import DitkitError
from ditkit.media import read_manifest, read_video
from ditkit.media.pixels import frames_sha256
from ditkit.runs import Run
from ditkit.runs.folder import HERE
from ditkit.state import State
from ditkit.store.cache import NAME, Cache

PROMPT = "a red circle"
STEPS = 3
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "sqlite3.connect", "sqlite3.connect/handle",
          "ctypes.dlsym")  # fmt: skip
Left = dict[str, bytes]


def call(words: list[str]) -> None:
    """One command, which must end well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code == 0, f"{words}: {err.getvalue()}"


def tree(folder: Path) -> Left:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    """What commands write to for a while, below ``folder``."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != HERE)


class Events:
    """Counts what the process does to files; before the event ``last`` the process kills itself."""

    def __init__(self, last: int | None = None):
        self.count, self.last = 0, last

    def __call__(self, event: str, words: tuple) -> None:
        if event not in EVENTS or (event == "open" and not (isinstance(words[2], int) and words[2] & os.O_ACCMODE)):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Scenario:
    """``words``: the command, run in a folder that ``prepare`` filled. ``check`` raises AssertionError for what the
    kill must not leave, and goes on with whatever comes next; it is called there, with what was there before."""

    name: str
    words: list[str]
    check: Callable[[Left], None]
    prepare: list[list[str]] = field(default_factory=list)
    times: int = 0

    @cached_property
    def template(self) -> Path:
        """A folder as it is before the command."""
        folder = Path(tempfile.mkdtemp(dir="."))
        with contextlib.chdir(folder):
            for words in self.prepare:
                call(words)
        return folder.absolute()

    @cached_property
    def extent(self) -> tuple[int, float]:
        """How many events and seconds a command that is left alone takes."""
        with self.at() as log:

            def counted() -> None:
                events = Events()
                sys.addaudithook(events)
                call(self.words)
                log.write_text(str(events.count))

            begun = time.perf_counter()
            pid = fork(counted, log)
            assert ended(pid) == 0, log.read_text()
            return int(log.read_text().split()[-1]), time.perf_counter() - begun

    @contextlib.contextmanager
    def at(self) -> Iterator[Path]:
        """In a copy of the folder, with the name of a file for what is said."""
        folder = Path(tempfile.mkdtemp(dir=self.template.parent))
        try:
            shutil.copytree(self.template, folder / "here", symlinks=True)
            with contextlib.chdir(folder / "here"):
                yield folder / "log"
        finally:
            shutil.rmtree(folder)

    def kill(self, draw: random.Random) -> tuple[bool, bool]:
        """Whether it was killed before its end, and whether it left something hidden."""
        events, seconds = self.extent
        self.times += 1
        with self.at() as log:
            before = tree(Path())
            if self.times % 2:
                last = draw.randint(1, events)

                def work() -> None:
                    sys.addaudithook(Events(last))
                    call(self.words)

                pid = fork(work, log)
            else:
                pid = fork(lambda: call(self.words), log)
                time.sleep(draw.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL), log.read_text()
            left = bool(hidden(Path()))
            self.check(before)
            assert hidden(Path()) == [], f"{hidden(Path())} is left"
            return code != 0, left


def scenarios(model: Path) -> list[Scenario]:
    """``model``: the folder of a tiny one. The working folder is where all is done."""
    quick = ["--model", str(model), "--steps", str(STEPS), "--quiet", "--threads", "1"]
    expected: dict[str, tuple] = {}

    def generate(name: str, seed: int) -> list[str]:
        return ["generate", PROMPT, "--seed", str(seed), "--out", name, "--no-sheet", *quick]

    def clip(name: str) -> Callable[[Left], None]:
        def check(before: Left) -> None:
            target = Path(name).with_suffix("") if name.endswith(".png") else Path(name)
            if target.exists():
                frames, beside = read_video(target)[0], Path(name).with_suffix(".json")
                if beside.exists():
                    said = read_manifest(beside)
                    assert said == read_manifest(target), "the card beside it is that of another clip"
                    assert said["output_sha256"] == frames_sha256(frames) or name.endswith(("mp4", "gif"))
            else:
                assert not any(Path(path).parts[0] == target.name for path in before), "the older clip is gone"
            call(generate(name, 4))
            found = read_manifest(target)["output_sha256"]
            assert found == expected.setdefault(name, (found,))[0], "another clip"

        return check

    def run(before: Left) -> None:
        if Path("kept/run.json").exists():
            call(["run", "--resume", "./kept", "--quiet"])
        else:
            call(begin)
        same("run", Run.open("./kept").state(), read_video("kept/clip.npz")[0])

    def same(name: str, state: State, frames) -> None:
        known = expected.setdefault(name, (state, frames))
        assert state.equal(known[0])
        assert state.fingerprints == known[0].fingerprints
        assert (frames == known[1]).all()

    def forked(before: Left) -> None:
        now = {path: data for path, data in tree(Path("parent")).items() if path != "lock"}
        assert now == {path.removeprefix("parent/"): data for path, data in before.items() if path != "parent/lock"}
        if Path("fork/run.json").exists():
            call(["run", "--resume", "./fork", "--quiet"])
        else:
            call(fork_words)
        same("fork", Run.open("./fork").state(), read_video("fork/clip.npz")[0])

    def converted(before: Left) -> None:
        if Path("m").exists():
            now = tree(Path("m"))
            old = {path.removeprefix("m/"): data for path, data in before.items() if path.startswith("m/")}
            if "new" not in expected:
                call(["convert", str(model), "other", "--layout", "diffusers", "--quiet"])
                expected["new"] = (tree(Path("other")),)
            assert now in (old, expected["new"][0]), "a model that is neither the old one nor the new one"
        else:
            assert not any(path.startswith("m/") for path in before), "the older model is gone"
        call(["convert", str(model), "m", "--layout", "diffusers", "--overwrite", "--quiet"])

    def locked(before: Left) -> None:
        if Path("m/ditkit.lock").exists():
            call(["lock", "m", "--check"])
        call(["lock", "m"])

    def cached(before: Left) -> None:
        index = Path("cache/v1/index.sqlite")
        if index.exists() and index.stat().st_size:
            with contextlib.closing(sqlite3.connect(index)) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = Cache("cache", 10**9)
        assert kept.told == ""
        with kept.index.reading() as db:
            known = {file for (file,) in db.execute("SELECT file FROM entries WHERE gone = ''")}
        there = {file.name for file in kept.results.iterdir() if NAME.fullmatch(file.name)}
        assert there == known, f"{len(there)} files, and {len(known)} in the index"
        call([*generate("a.npz", 4), "--cache", "cache"])
        found = read_video("a.npz")[0]
        assert (found == expected.setdefault("cache", (found,))[0]).all()

    def saved(before: Left) -> None:
        if Path("s.safetensors").exists():
            assert State.load("s.safetensors")["seed"] in ([3], [4])
        else:
            assert "s.safetensors" not in before
        call(save(4))

    def save(seed: int) -> list[str]:
        words = ["--seed", str(seed), "--until", "encode_text", "--save-state", "s.safetensors"]
        return ["run", PROMPT, *words, "--out", "x.npz", "--no-sheet", *quick]

    begin = ["run", PROMPT, "--seed", "4", "--run", "./kept", "--out", "kept/clip.npz", "--no-sheet", *quick]
    parent = ["run", PROMPT, "--seed", "3", "--run", "./parent", "--no-sheet", *quick]
    fork_words = [
        "fork",
        "./parent",
        "--run",
        "./fork",
        "--seed",
        "4",
        "--out",
        "fork/clip.npz",
        "--no-sheet",
        "--quiet",
    ]
    shelf = ["--cache", "cache"]
    full = [[*generate("a.npz", 3), *shelf]]
    return [
        *(Scenario(f"generate {s}", generate(f"c.{s}", 4), clip(f"c.{s}")) for s in ("mp4", "gif")),
        *(Scenario(f"generate {s} over one", generate(f"c.{s}", 4), clip(f"c.{s}"), [generate(f"c.{s}", 3)])
          for s in ("npz", "png")),
        Scenario("run --run", begin, run),
        Scenario("fork", fork_words, forked, [parent]),
        Scenario("convert", ["convert", str(model), "m", "--layout", "diffusers", "--quiet"], converted),
        Scenario("convert over one", ["convert", str(model), "m", "--layout", "diffusers", "--overwrite", "--quiet"],
                 converted, [["convert", str(model), "m", "--layout", "native", "--quiet"]]),
        Scenario("lock", ["lock", "m"], locked, [["convert", str(model), "m", "--layout", "diffusers", "--quiet"]]),
        Scenario("cache", [*generate("a.npz", 4), *shelf], cached),
        Scenario("cache, used", [*generate("a.npz", 4), *shelf], cached, full),
        Scenario("cache trim", ["cache", "trim", *shelf, "--cache-gigabytes", "1e-9"], cached, full),
        Scenario("cache clear", ["cache", "clear", *shelf, "--yes"], cached, full),
        Scenario("a State over one", save(4), saved, [save(3)]),
    ]  # fmt: skip


@dataclass
class Told:
    """Of one scenario: trials, how many were killed before their end, how many had left something hidden, faults."""

    trials: int = 0
    killed: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)


def kills(model: Path, count: int, seed: int, root: Path, names: tuple[str, ...] = ()) -> dict[str, Told]:
    """``count`` kills, the scenarios in turn, all in the folder ``root``."""
    draw, told = random.Random(seed), dict[str, Told]()
    with contextlib.chdir(root):
        chosen = [s for s in scenarios(model.absolute()) if not names or s.name in names]
        for number in range(count):
            scenario = chosen[number % len(chosen)]
            about = told.setdefault(scenario.name, Told())
            about.trials += 1
            try:
                killed, left = scenario.kill(draw)
                about.killed, about.left = about.killed + killed, about.left + left
            except (AssertionError, DitkitError, OSError, sqlite3.Error) as e:
                about.faults.append(f"trial {number}: {type(e).__name__}: {e}")
    return told


def table(told: dict[str, Told]) -> str:
    total = Counter[str]()
    lines = [f"{'command':24}{'trials':>8}{'killed':>8}{'left':>8}{'faults':>8}"]
    for name, about in told.items():
        row = {"trials": about.trials, "killed": about.killed, "left": about.left, "faults": len(about.faults)}
        total.update(row)
        lines.append(f"{name:24}" + "".join(f"{value:8}" for value in row.values()))
        lines += [f"  {fault}" for fault in about.faults]
    return "\n".join([*lines, f"{'all':24}" + "".join(f"{value:8}" for value in total.values())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill commands in the middle, and look at what they leave.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="a command of the table")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where ``training`` lies
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        place = tiny.write(Path(folder) / "model")
        (place / "ditkit.toml").write_text("[defaults]\nwidth = 32\nheight = 32\nframes = 5\n")
        (Path(folder) / "work").mkdir()
        found = kills(place, given.kills, given.seed, Path(folder) / "work", tuple(given.only))
    print(table(found))
    sys.exit(any(about.faults for about in found.values()))
