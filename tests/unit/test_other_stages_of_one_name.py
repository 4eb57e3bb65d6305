"""Two stages of one name never get each other's results out of the cache, and neither do the stages after them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import pytest
import torch

from ditkit.events import Events
from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.state import Field, State
from ditkit.store.cache import Cache

X = Field("x", "tensor", "float32", "1", "", "tests", "a number")
WORD = Field("word", "plain", "str", "", "", "tests", "what a language model said")
Y = Field("y", "tensor", "float32", "1", "", "tests", "what is made of them")


class Make(BaseStage):
    name, writes, may_write, fields, value = "make", ("x",), ("word",), (X, WORD), 1.0

    def run(self, inputs, ctx):
        return {"x": torch.tensor([self.number(ctx)])}

    def number(self, ctx):
        return self.value


class Helped(Make):
    def number(self, ctx):
        return 2.0


class Attribute(Make):
    value = 3.0


class Instance(Make):
    def __init__(self, value):
        self.value = value


class Called(Make):
    components = ("part",)

    def number(self, ctx):
        return ctx.components["part"]


class Makeshift(Make):
    def number(self, ctx):
        ctx.cacheable = False
        return next(ANSWERS)


class Speaks(Make):
    writes, may_write = ("word",), ()

    def run(self, inputs, ctx):
        return {"word": next(ANSWERS)}


ANSWERS = iter(())


@dataclass(frozen=True)
class Double(BaseStage):
    name, optional, writes, fields = "double", ("x", "word"), ("y",), (Y,)

    def run(self, inputs, ctx):
        return {"y": inputs["x"] * 2 if "x" in inputs else torch.tensor([2 * inputs["word"]])}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10**6)


def made(stage, cache=None, **components):
    start = State({"prompt": ["a"], "negative_prompt": [""], "seed": [1], "request": {}})
    return float(StageList([stage, Double()]).run(start, components, results=cache)["y"])


def of_a_file(path, value):
    """A stage from a file that was just written: the same name, another text."""
    text = f"from {__name__} import Make\n\n\nclass Own(Make):\n    def number(self, ctx):\n        return {value}\n"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("own_stage", path)
    module = sys.modules["own_stage"] = importlib.util.module_from_spec(spec)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module.Own()


def of_no_file(value):
    """As in a notebook."""
    space = {"__name__": "notebook", "Make": Make}
    exec(f"class Own(Make):\n    def number(self, ctx):\n        return {value}\n", space)
    return space["Own"]()


def in_a_function(value):
    class Own(Make):
        def number(self, ctx):
            return value

    return Own()


def test_classes_of_one_file(cache):
    assert [made(stage, cache) for stage in (Make(), Helped(), Attribute())] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("of", [Instance, in_a_function, of_no_file])
def test_what_has_no_name_is_computed_each_time(cache, of):
    assert [made(of(value), cache) for value in (5.0, 6.0, 5.0)] == [10.0, 12.0, 10.0]


def test_a_file_that_was_changed(cache, tmp_path):
    assert [made(of_a_file(tmp_path / "own.py", value), cache) for value in (5.0, 6.0)] == [10.0, 12.0]


def test_a_component_without_a_fingerprint(cache):
    assert [made(Called(), cache, part=value) for value in (5.0, 6.0)] == [10.0, 12.0]


@pytest.mark.parametrize("stage", [Makeshift(), Speaks()])
def test_an_answer_that_is_another_one_each_time(tmp_path, monkeypatch, stage):
    """A makeshift is not kept, an answer may have been let go of: what was made of the first is not the second's."""
    monkeypatch.setattr(sys.modules[__name__], "ANSWERS", iter([5.0, 6.0]))
    cache = Cache(tmp_path / "cache", 10**6)
    results = []
    for _ in range(2):
        results.append(made(stage, cache))
        with cache.index.writing() as db:
            db.execute("UPDATE entries SET gone = 'was evicted' WHERE stage = 'make'")
    assert results == [10.0, 12.0]


def test_what_can_be_told_apart_is_found(cache):
    heard = []
    for _ in range(2):
        start = State({"prompt": ["a"], "negative_prompt": [""], "seed": [1], "request": {}})
        StageList([Helped(), Double()]).run(start, {}, results=cache, events=Events(lambda e: heard.append(e.name)))
    assert [name for name in heard if name.startswith("cache")] == ["cache.miss"] * 2 + ["cache.hit"] * 2
