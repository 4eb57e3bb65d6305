"""Many odd inputs of one target: made and read in children of this process, one batch after the other, so that whatever
an input does, the next one is read too. Faults are kept as folders; equal ones are counted.

An input is known by target, seed and number, and is the same each time. Leaves out: what a fault is (``watch.py``)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import targets, watch

BATCH = 200
EXAMPLES = 2  # kept of each fault
_PREPARED = set[str]()  # targets of this process
SILENCE = 90  # seconds after which a child is ended that nothing else ends


def known() -> list[str]:
    return sorted(each.name for each in pkgutil.iter_modules(targets.__path__))


@dataclass
class Fault:
    """One kind: ``count`` inputs ended in it; ``first`` is the number of the first, ``kept`` its folder."""

    kind: str
    place: str
    text: str
    first: int
    count: int = 0
    kept: list[str] = field(default_factory=list)


@dataclass
class Report:
    target: str
    seed: int
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    faults: dict[tuple[str, str], Fault] = field(default_factory=dict)


class Campaign:
    """``keep``: where inputs that ended in a fault are copied to, or None."""

    def __init__(self, target: str, seed: int = 0, keep: Path | None = None):
        self.name, self.seed, self.keep = target, seed, keep
        self.target = importlib.import_module(f"{targets.__name__}.{target}")
        self.report = Report(target, seed)

    def run(self, count: int, begin: int = 0, tell: Callable[[Report], None] = lambda _: None) -> Report:
        begun = time.perf_counter()
        with self._folder() as folder:
            at = begin
            while at < begin + count:
                at = self._batch(folder, at, min(at + BATCH, begin + count), tell)
                self.report.seconds = time.perf_counter() - begun
        return self.report

    @contextlib.contextmanager
    def _folder(self):
        """Where inputs are made. ``outside`` beside them has what nobody may touch."""
        warm()
        here, environment = Path.cwd(), dict(os.environ)
        folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=_root()))
        try:
            for name in ("outside", "home", "tmp"):
                (folder / name).mkdir()
            (folder / "outside" / "victim").write_text("precious")
            kept = {k: v for k, v in os.environ.items() if not k.startswith("DITKIT_")}
            os.environ.clear()
            os.environ.update(kept, HOME=str(folder / "home"), XDG_CACHE_HOME=str(folder / "home"), HF_HUB_OFFLINE="1",
                              TMPDIR=str(folder / "tmp"), COLUMNS="200")  # fmt: skip
            tempfile.tempdir = None
            if self.name not in _PREPARED:
                self.target.prepare(_root() / "base")
                _PREPARED.add(self.name)
            yield folder
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None
            _removed(folder)

    def _batch(self, folder: Path, begin: int, end: int, tell) -> int:
        """The number of the first input that is still to be read."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                self._child(folder, begin, end, os.fdopen(writing, "w"))
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        at, silent, left = begin, False, b""
        while not silent:
            silent = not select.select([reading], [], [], SILENCE)[0]
            if not silent:
                if not (data := os.read(reading, 1 << 16)):
                    break
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    told = json.loads(line)
                    at = told["number"]
                    if "kind" in told:
                        self._count(folder, told)
                        at += 1
                tell(self.report)
        os.close(reading)
        if silent:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) or silent:
            text = "silence" if silent else f"signal {os.WTERMSIG(status)}"
            self._count(folder, {"number": at, "label": "?", "kind": "hang" if silent else "crash", "place": text,
                                 "text": text, "seconds": 0.0, "how": "?"})  # fmt: skip
            at += 1
        elif os.WEXITSTATUS(status):
            raise RuntimeError(f"the child for {self.name} {at} failed: mend the harness")
        tell(self.report)
        return at

    def _child(self, folder: Path, begin: int, end: int, out) -> None:
        os.nice(5)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        if not os.environ.get("FUZZ_STDERR"):
            os.dup2(nowhere, 1)
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True  # it has read the environment before
        seen = watch.confine(folder, getattr(self.target, "ALLOWED", ()))
        for number in range(begin, end):
            at = folder / f"input-{number}"
            at.mkdir()
            os.chdir(at)
            print(json.dumps({"number": number}), file=out, flush=True)
            rng = random.Random(f"{self.name}/{self.seed}/{number}")
            how = "?"
            try:
                how = self.target.make(rng, at)
            except Exception as e:
                verdict = watch.Verdict("maker", watch.place_of(e), f"{type(e).__name__}: {e}")
            else:
                verdict = watch.judged(lambda at=at, how=how: self.target.run(at, how), seen, at,
                                       how in self.target.NAMED, str(_root()))  # fmt: skip
            victim = folder / "outside" / "victim"
            if not victim.is_file() or victim.read_text() != "precious" or len(os.listdir(victim.parent)) != 1:
                verdict = watch.Verdict("outside", "the victim", "a file outside was changed")
            print(json.dumps({"number": number, "how": how, **asdict(verdict)}), file=out, flush=True)
            os.chdir(folder)
            if not verdict.fault:
                _removed(at)
            elif verdict.kind in ("hang", "memory") or verdict.place == "the victim":
                return  # what it left behind is not for the next one

    def _count(self, folder: Path, told: dict) -> None:
        report, kind, at = self.report, told["kind"], folder / f"input-{told['number']}"
        report.inputs += 1
        report.kinds[kind] += 1
        report.slowest = max(report.slowest, told["seconds"])
        if kind not in ("ok", "refused"):
            fault = report.faults.setdefault(
                (kind, told["place"]), Fault(kind, told["place"], told["text"], told["number"])
            )
            fault.count += 1
            if self.keep is not None and fault.count <= EXAMPLES:
                fault.kept.append(str(self._kept(at, told)))
            _removed(at)
            (folder / "outside" / "victim").parent.mkdir(exist_ok=True)
            (folder / "outside" / "victim").write_text("precious")

    def _kept(self, at: Path, told: dict) -> Path:
        name = hashlib.sha256(f"{told['kind']} {told['place']}".encode()).hexdigest()[:8]
        to = self.keep / self.name / f"{told['kind']}-{name}-{self.seed}-{told['number']}"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        with contextlib.suppress(shutil.Error, OSError):  # a pipe cannot be copied
            shutil.copytree(at, to / "input", symlinks=True, ignore=_pipes)
        again = f"python -m tests.fuzz {self.name} --seed {self.seed} --at {told['number']}"
        (to / "why.json").write_text(json.dumps({"again": again, **told}, indent=1) + "\n")
        return to


@functools.cache
def _root() -> Path:
    """The folder of this process, whose ``base`` has the sound inputs of all targets. On a disk in memory, where there
    is one: what is made here lives for milliseconds, and writers wait for disks."""
    memory = os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2 << 30
    folder, owner = Path(tempfile.mkdtemp(prefix="ditkit-fuzz-", dir="/dev/shm" if memory else None)), os.getpid()
    (folder / "base").mkdir()
    atexit.register(lambda: _removed(folder) if os.getpid() == owner else None)
    return folder


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not os.path.islink(p := os.path.join(folder, name))
            and not os.path.isfile(p) and not os.path.isdir(p)]  # fmt: skip


def _removed(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def warm() -> None:
    """Import now what would be imported within an input."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import av  # noqa: F401
    import filelock  # noqa: F401
    import PIL.Image
    import rich.console  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers
    import typer

    import ditkit.cli.main
    import ditkit.models
    import ditkit.replay
    import ditkit.runs

    typer.main.get_command = functools.cache(typer.main.get_command)  # it takes most of the time of a command
    for each in pkgutil.iter_modules(ditkit.models.__path__, "ditkit.models."):
        importlib.import_module(each.name)
    PIL.Image.init()
    for name in ("UMT5EncoderModel", "CLIPVisionModel", "AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
