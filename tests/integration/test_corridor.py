"""The way from a command to the network: how many functions of ditkit stand on the stack in between."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

import ditkit
from ditkit.models.wan import WanTransformer

PACKAGE = Path(ditkit.__file__).parent
MOST = 6


def functions(monkeypatch) -> list[list[str]]:
    """Fills as networks are called: the functions of ditkit on the stack, the outermost first."""
    found: list[list[str]] = []
    forward = WanTransformer.forward

    def seen(*args, **kwargs):
        frame, names = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            if PACKAGE in Path(code.co_filename).parents:
                names.append(code.co_qualname.removesuffix(".<locals>").split(".<locals>.")[-1])
            frame = frame.f_back
        found.append(names[::-1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward", seen)
    return found


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("generate", ["--seed", 1]),
        ("generate", ["--seed", 1, "--seed", 2]),
        ("run", ["--seed", 1]),
        ("run", ["--run", "d"]),
    ],
)
def test_from_a_command_to_the_network(call, model, monkeypatch, command, more):
    found = functions(monkeypatch)
    words = ["a red circle", "--model", model, "--steps", 2, "--no-sheet", "--quiet", "--out", "a.npz"]
    assert call(command, *words, *more).code == 0
    assert len(found) >= 4
    for names in found:
        way = names[names.index("Pipeline.run") - 1 :]
        assert way[:4] == [command, "Pipeline.run", "Execution.run", "Denoise.run"]
        assert len(way) <= MOST, way


def test_from_a_call_in_python(tiny_model, monkeypatch):
    found = functions(monkeypatch)
    ditkit.load(tiny_model)("a red circle", steps=2)
    assert {tuple(names[:4]) for names in found} == {
        ("Pipeline.__call__", "Pipeline.run", "Execution.run", "Denoise.run")
    }
    assert max(map(len, found)) <= MOST


def test_two_experts_need_no_longer_way(tmp_path, monkeypatch):
    found = functions(monkeypatch)
    pipe = ditkit.load(tiny.write(tmp_path / "model", "t2v_a14b"))
    pipe("a red circle", steps=2, width=32, height=32, frames=5)
    assert max(map(len, found)) <= MOST
