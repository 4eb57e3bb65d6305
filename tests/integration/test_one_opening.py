"""A command opens its model once, and asks each host once who it is."""

from __future__ import annotations

import pytest
from hosting import in_thread

from ditkit.assembly import Model
from ditkit.placement.worker import Worker, worker_of
from ditkit.setup import Setup

PROMPT = "a red circle"
QUIET = ("--no-sheet", "--quiet")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Fills with the names of models as they are opened."""
    found: list[str] = []
    whole = Model._of.__func__

    def seen(cls, name, *rest):
        found.append(str(name))
        return whole(cls, name, *rest)

    monkeypatch.setattr(Model, "_of", classmethod(seen))
    return found


def made(call, *words) -> None:
    said = call(*words)
    assert said.code == 0, said.err


COMMANDS = {
    "generate": ("generate", PROMPT, "--out", "b.npz", *QUIET),
    "run": ("run", PROMPT, "--out", "b.npz", *QUIET),
    "run --from": ("run", "--from", "s.st", "--out", "b.npz", *QUIET),
    "run --run": ("run", PROMPT, "--run", "kept", *QUIET),
    "run --resume": ("run", "--resume", "one", *QUIET),
    "fork": ("fork", "one", "--guidance-scale", 2, *QUIET),
    "fork --at-step": ("fork", "one", "--at-step", 1, "--guidance-scale", 2, *QUIET),
    "fork --clip": ("fork", "two", "--clip", 1, "--guidance-scale", 2, *QUIET),
    "fork --clip --at-step": ("fork", "two", "--clip", 1, "--at-step", 1, "--guidance-scale", 2, *QUIET),
    "plan": ("plan", PROMPT),
    "replay": ("replay", "a.npz", "--quiet"),
    "config explain": ("config", "explain", "steps"),
    "stages": ("stages",),
}


@pytest.fixture
def begun(call, model):
    """A State, a clip, a run of one clip and a run of two, all of two steps."""
    words = (PROMPT, "--model", model, "--steps", 2, *QUIET)
    made(call, "run", *words, "--until", "encode_text", "--save-state", "s.st")
    made(call, "generate", *words, "--out", "a.npz")
    made(call, "run", *words, "--run", "one")
    made(call, "run", *words, "--run", "two", "--seed", 1, "--seed", 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_is_opened_once(call, model, begun, opened, command):
    words = COMMANDS[command]
    known = words[0] == "fork" or any(flag in words for flag in ("--from", "--resume", "a.npz"))
    opened.clear()
    made(call, *words, *(() if known else ("--model", model)))
    assert opened == [str(model)]


@pytest.fixture
def host(model, monkeypatch):
    """A host that is asked; its address, and how often it said who it is."""
    asked: list[str] = []
    describe = Worker.describe

    def seen(self):
        asked.append("describe")
        return describe(self)

    with in_thread(worker_of(Setup(model=str(model)))) as host:
        monkeypatch.setattr(Worker, "describe", seen)
        yield host.url, asked


@pytest.mark.parametrize("whole", [True, False])
def test_a_host_is_asked_once(call, model, host, opened, whole):
    url, asked = host
    where = ("--model", url) if whole else ("--model", model, "--placement", f"denoise={url}")
    opened.clear()
    made(call, "generate", PROMPT, *where, "--steps", 2, "--out", "a.npz", *QUIET)
    assert asked == ["describe"]
    assert opened == [url if whole else str(model)]
