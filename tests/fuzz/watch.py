"""What reading an odd input may not do, and how that is seen: leave ditkit's errors, take long, take much memory, run
code, start a process, connect, write outside of its folder, or say something that nobody understands.

``confine`` is for a process that does nothing else: its limits and its audit hook stay to its end."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10  # of computing
WAITING = 20  # seconds of anything
MEMORY = 1 << 30  # bytes more than before
ROOM = 3 << 30  # bytes of addresses more than before; what wants more is told so
SENTENCE = 5000  # letters: asked and found have 2,000 at most, and a little stands around them
OURS = f"{os.sep}ditkit{os.sep}"

_WRITES = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "shutil.move", "os.mkdir", "os.symlink", "os.link",
           "os.truncate", "os.chmod", "os.chown", "os.utime")  # fmt: skip
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "os.startfile",
           "socket.connect", "socket.getaddrinfo", "urllib.Request")  # fmt: skip
_FREE = ("/dev/null", "/dev/tty")
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")
_FAULT = re.compile(r"fault of ditkit|failed with (?!RuntimeError: planted)\w*(?:Error|Exception|Warning)\b")


class TooLong(BaseException):
    """No ``except Exception`` holds it up."""


class Refused(Exception):
    """The command line said no: ``text`` is what it said on stderr."""


@dataclass
class Verdict:
    """``kind``: ``ok``, ``refused`` (by ditkit, in a sentence) or the fault. ``place``: where it came from; equal
    places are one fault."""

    kind: str
    place: str = ""
    text: str = ""
    seconds: float = 0.0

    @property
    def fault(self) -> bool:
        return self.kind not in ("ok", "refused")


class Watch:
    """Over one process. ``inside``: the only folder that may be changed."""

    def __init__(self, inside: Path, allowed=()):
        self.inside, self.allowed, self.seen, self.on = str(inside), tuple(allowed), [], False
        self._free = (self.inside, os.path.join("/tmp", "torchinductor"), *_FREE)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on or event in self.allowed:
            return
        with contextlib.suppress(Exception):
            if event == "open":
                path, _, flags = args
                if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    self._outside("writes", path)
            elif event == "sqlite3.connect":
                self._outside("writes", args[0])
            elif event in _WRITES:
                for path in args[: 2 if event in ("os.rename", "shutil.move", "os.link") else 1]:
                    self._outside(event, path)
            elif event in _STARTS:
                self.seen.append(f"{event} {args!r}"[:200])
            elif event in ("exec", "compile", "import"):
                name = getattr(args[0], "co_filename", None) or (args[1] if len(args) > 1 else None)
                if isinstance(name, str) and name.startswith(self.inside):
                    self.seen.append(f"code runs: {name}")

    def _outside(self, what: str, path) -> None:
        if isinstance(path, str | bytes):
            where = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            if not os.path.join(where, "").startswith(self._free) and os.fsdecode(path) not in _FREE:
                self.seen.append(f"{what} {os.fsdecode(path)}")


def confine(inside: Path, allowed=()) -> Watch:
    """Limits for the rest of this process."""
    watch = Watch(inside, allowed)
    sys.addaudithook(watch)
    room = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_long)
    return watch


def _too_long(*_) -> None:
    raise TooLong


def most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(call, watch: Watch, folder: Path, named: bool = True, root: str = "") -> Verdict:
    """What ``call`` comes to. ``named``: an error has to name a file of the folder, or one below ``root``."""
    from ditkit.errors import DitkitError

    watch.seen.clear()
    begun, before, verdict = time.perf_counter(), most_memory(), Verdict("ok")
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WAITING)
            watch.on = True
            call()
        finally:
            watch.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (DitkitError, Refused) as e:
        complaint = unclear(str(e), folder, named, root)
        if isinstance(e, Refused) and complaint:
            place = _numberless(str(e).rpartition("error:")[2])[:90]
        else:
            place = place_of(e)
        verdict = Verdict(complaint or "refused", place if complaint else "", str(e))
    except TooLong as e:
        verdict = Verdict("hang", place_of(e))
    except MemoryError as e:
        verdict = Verdict("memory", place_of(e), str(e))
    except BaseException as e:
        verdict = Verdict("foreign", place_of(e), f"{type(e).__name__}: {e}")
    if watch.seen:
        verdict = Verdict(
            "outside", _numberless(watch.seen[0].replace(str(folder), ""))[:90], "; ".join(watch.seen[:5])
        )
    elif (more := most_memory() - before) > MEMORY and not verdict.fault:
        verdict = Verdict("memory", verdict.place or "in all", f"{more / 1e9:.1f} GB more")
    verdict.seconds = time.perf_counter() - begun
    return verdict


def _numberless(text: str) -> str:
    return re.sub(r"'[^']*'|[0-9a-f]{6,}|\d+", "N", text)


def place_of(error: BaseException) -> str:
    """Its class, the innermost line of ditkit's that it passed, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if OURS in frame.filename] or frames
    mine, last = own[-1], frames[-1]
    where = f"{mine.filename.rpartition(OURS)[2]}:{mine.lineno} {mine.name}"
    return f"{type(error).__name__} in {where}" + ("" if mine is last else f" < {Path(last.filename).name} {last.name}")


def unclear(text: str, folder: Path, named: bool = True, root: str = "") -> str:
    """What is wrong with a sentence for a person, or nothing."""
    if len(text) > SENTENCE:
        return "long"
    if _STEERING.search(text):
        return "steering"
    if _FAULT.search(text):
        return "foreign"
    known = (root or str(folder)) in text or any(name in text for name in _names(folder))
    return "" if known or not named else "nameless"


def _names(folder: Path) -> list[str]:
    found = [name for _, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [name for name in found if len(name) > 2]


def command(*words: str) -> None:
    """One ``ditkit`` command in this process. Raises Refused with what it says where it fails, and AssertionError for
    an exit code, a traceback or a stray error of the system that should not be."""
    from ditkit.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    said = err.getvalue()
    if "Traceback" in said or "error: the output:" in said:
        raise AssertionError(f"ditkit {words[0]}: {said[-600:]}")
    if code == 0:
        return
    if (code, words[0]) in ((2, "inspect"), (1, "replay")) and not said and out.getvalue():
        return  # its report lists what is wrong, or what is different
    error = said.rpartition("error: ")[2].rstrip("\n")
    if code not in (1, 2) or not error:
        raise AssertionError(f"ditkit {words[0]}: exit code {code} with {said[-300:]!r}")
    raise Refused(error)
