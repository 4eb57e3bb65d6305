"""Names of plugs: equal only for what computes the same. Each case is a plug and an edit of it."""

import importlib
import sys
from dataclasses import dataclass, make_dataclass
from functools import partial

import pytest
import torch

import ditkit
from ditkit import Seams
from ditkit.identify import described, forgets, identify

CELL = """
from dataclasses import dataclass
import functools
SCALE = {scale}
TABLE = {{"a": {scale}}}
def helper(x):
    return x * {scale}
class Base:
    def base(self, x):
        return x + {scale}
@dataclass(frozen=True)
class {name}(Base):
    on: bool = True
    {body}
"""
BODIES = {
    "a method": "def __call__(self, inner): return lambda blocks, x, ctx: inner(blocks, x, ctx) * {scale}",
    "a helper function": "def __call__(self, inner): return lambda blocks, x, ctx: helper(inner(blocks, x, ctx))",
    "a global value": "def __call__(self, inner): return lambda blocks, x, ctx: inner(blocks, x, ctx) * SCALE",
    "a global table": "def __call__(self, inner): return lambda blocks, x, ctx: inner(blocks, x, ctx) * TABLE['a']",
    "a base class": "def __call__(self, inner): return lambda blocks, x, ctx: self.base(inner(blocks, x, ctx))",
    "a static method": "@staticmethod\n    def f(x): return x * {scale}\n    def __call__(self, inner): return inner",
    "a property": "@property\n    def f(self): return {scale}\n    def __call__(self, inner): return inner",
    "a cached property": "@functools.cached_property\n    def f(self): return {scale}",
    "a class attribute": "factor = {scale}\n    def __call__(self, inner): return inner",
    "a default": "def __call__(self, inner, *, by={scale}): return inner",
}


def cell(body: str, scale: float, name: str = "Plug"):
    """An instance of a class that is written in a notebook's cell."""
    space = {"__name__": "__main__"}
    exec(CELL.format(body=BODIES[body].format(scale=scale), scale=scale, name=name), space)
    return space[name]()


@pytest.mark.parametrize("body", BODIES)
def test_an_edit_changes_the_name(body):
    assert identify(cell(body, 2.0)) == identify(cell(body, 2.0))
    assert identify(cell(body, 2.0)) != identify(cell(body, 3.0))
    assert "Plug" in identify(cell(body, 2.0))


@pytest.mark.slow
def test_the_result_cache_does_not_answer_for_an_edited_plug(tmp_path):
    job = {"prompt": "a red circle", "seed": 7, "steps": 2}
    first, second = (Seams(run_blocks=(cell("a helper function", scale),)) for scale in (0.9, 1.1))
    load = partial(ditkit.load, "shapes", cache=str(tmp_path / "cache"))
    one, again, two = load(seams=first)(**job), load(seams=first)(**job), load(seams=second)(**job)
    honest = ditkit.load("shapes", seams=second)(**job)
    assert again.receipt["cached"]["denoise"]
    assert torch.equal(two.state["latents"], honest.state["latents"])
    assert not torch.equal(two.state["latents"], one.state["latents"])


def test_code_of_a_module_beside_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_a.py").write_text("def f(x):\n    return x * 2\n")
    (tmp_path / "plug_a.py").write_text("import beside_a\ndef plug(inner):\n    return beside_a.f(inner)\n")
    before = identify(importlib.import_module("plug_a").plug)
    assert identify(importlib.import_module("plug_a").plug) == before
    (tmp_path / "beside_a.py").write_text("def f(x):\n    return x * 33\n")
    assert identify(importlib.import_module("plug_a").plug) == before, "what was imported is what runs"
    importlib.reload(sys.modules["beside_a"])
    assert identify(importlib.import_module("plug_a").plug) != before
    for name in ("plug_a", "beside_a"):
        del sys.modules[name]


def test_comments_and_places_do_not_count():
    spaces = [{}, {}]
    exec("def f(inner):\n    return inner", spaces[0])
    exec("\n\n# a comment\n\ndef f(inner):\n    # another\n    return inner", spaces[1])
    assert identify(spaces[0]["f"]) == identify(spaces[1]["f"])


def test_options_count():
    @dataclass(frozen=True)
    class Local:
        scale: object = 1.0

    assert identify(Local(1.0)) == identify(Local(1.0)) != identify(Local(2.0))
    assert identify(Local(torch.ones(2))) == identify(Local(torch.ones(2))) != identify(Local(torch.zeros(2)))
    assert identify(Local(lambda x: x)) != identify(Local(lambda x: x + 1))


READS = "{head}\n{value}\ndef plug(inner):\n    return inner, V"
VALUES = {
    "a set": ("", "V = {1, 2}", "V = {2}"),
    "a range": ("", "V = range(3)", "V = range(4)"),
    "an array": ("import numpy as np", "V = np.ones(3)", "V = np.zeros(3)"),
    "a number of numpy": ("import numpy as np", "V = np.float32(1)", "V = np.float32(2)"),
    "a path": ("from pathlib import Path", "V = Path('a')", "V = Path('b')"),
    "a pattern": ("import re", "V = re.compile('a')", "V = re.compile('b')"),
    "a dtype": ("import torch", "V = torch.float16", "V = torch.float32"),
    "a view of a dict": ("from types import MappingProxyType as M", "V = M({1: 2})", "V = M({1: 3})"),
    "a dict of sets": ("", "V = {1: {2}}", "V = {1: {3}}"),
    "a partial": ("from functools import partial", "V = partial(max, 1)", "V = partial(max, 2)"),
    "a method of a dict": ("", "V = {1: 2}.get", "V = {1: 3}.get"),
    "a method of a tensor": ("import torch", "V = torch.ones(2).mul", "V = torch.zeros(2).mul"),
    "the end of a long pattern": ("import re", "V = re.compile('a' * 300 + 'b')", "V = re.compile('a' * 300 + 'c')"),
    "a number with code": (
        "",
        "V = type('F', (float,), {'__mul__': lambda s, o: 2})(1)",
        "V = type('F', (float,), {'__mul__': lambda s, o: 3})(1)",
    ),
    "a method of a network": ("import torch", "V = torch.nn.Linear(2, 2).forward", "V = torch.nn.Linear(3, 2).forward"),
    "a network": ("import torch\ntorch.manual_seed(1)", "V = torch.nn.Linear(2, 2)", "V = torch.nn.Linear(2, 2)"),
    "a queue": ("from collections import deque", "V = deque([1])", "V = deque([2])"),
}
KNOWN_BY_CONTENT = VALUES.keys() - {"a network", "a method of a network", "a queue"}


@pytest.mark.parametrize("what", VALUES)
def test_a_global_value_of_any_type_counts(what):
    head, one, other = VALUES[what]

    def plug(value):
        space = {"__name__": "__main__"}
        exec(READS.format(head=head, value=value), space)
        return space["plug"]

    first, again, edited = plug(one), plug(one), plug(other)
    assert identify(first) != identify(edited)
    assert (identify(first) == identify(again)) == (what in KNOWN_BY_CONTENT)


EDITS = {
    "a decorator that is a class": ("class By:\n    def __init__(self, f): self.__wrapped__ = f\n"
                                    "    def __call__(self, *a): return self.__wrapped__(*a) * {0}\n"
                                    "class plug:\n    @By\n    def f(self): return 1\n"),
    "an enumeration": "import enum\nclass E(enum.IntEnum):\n    A = {0}\ndef plug(inner): return inner, E.A",
    "a decorator": ("import functools\ndef by(n):\n    def around(f):\n        @functools.wraps(f)\n"
                    "        def g(*a): return n * f(*a)\n        return g\n    return around\n"
                    "class P:\n    @by({0})\n    def f(self): return 1\nplug = P"),
    "an attribute of a function": "def plug(inner): return inner, plug.by\nplug.by = {0}",
    "a metaclass": "class M(type):\n    def f(cls): return {0}\nclass plug(metaclass=M): pass",
    "what hides a builtin": "def round(x): return {0}\ndef plug(inner): return round(inner)",
    "the kind of an argument": "def plug(inner, {1}run): return inner",
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_all_that_a_plug_is_made_of_counts(what):
    spaces = [{"__name__": "__main__"} for _ in range(2)]
    for space, values in zip(spaces, ((1, ""), (2, "*")), strict=True):
        exec(EDITS[what].format(*values), space)
    assert identify(spaces[0]["plug"]) != identify(spaces[1]["plug"])


def test_a_decorator_of_torch_is_known():
    source = "import torch\nclass plug:\n    @torch.no_grad()\n    def f(self): return {}"
    spaces = [{"__name__": "__main__"} for _ in range(3)]
    for space, value in zip(spaces, (1, 1, 2), strict=True):
        exec(source.format(value), space)
    one, same, other = (identify(space["plug"]) for space in spaces)
    assert one == same != other
    assert "#" not in one


def test_a_module_behind_a_module_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "behind_b.py").write_text("def f(x):\n    return x * 2\n")
    (tmp_path / "beside_b.py").write_text("from behind_b import f\n")
    (tmp_path / "plug_b.py").write_text(
        "import beside_b\ndef plug(inner):\n    return beside_b.f(inner)\n"
        "def late(inner):\n    import behind_b\n    return behind_b.f(inner)\n"
    )
    module = importlib.import_module("plug_b")
    before = identify(module.plug), identify(module.late)
    assert before == (identify(module.plug), identify(module.late))
    (tmp_path / "behind_b.py").write_text("def f(x):\n    return x * 33\n")
    importlib.reload(sys.modules["behind_b"])
    after = identify(module.plug), identify(module.late)
    assert before[0] != after[0]
    assert before[1] != after[1]
    for name in ("plug_b", "beside_b", "behind_b"):
        sys.modules.pop(name, None)


def test_what_could_hide_a_difference_has_a_name_of_its_own():
    def closing(value):
        return lambda inner: value

    class Mutable:
        def __call__(self, inner):
            return inner

    @dataclass(frozen=True)
    class Hiding:
        def __post_init__(self):
            object.__setattr__(self, "secret", 3)

    inside = 3

    @dataclass(frozen=True)
    class Closing:
        def __call__(self, inner):
            return inside

    for make in (lambda: closing(1), Mutable, Hiding, Closing, lambda: partial(closing(1), 1)):
        one, other = make(), make()
        assert identify(one) == identify(one) != identify(other)


def test_a_function_that_calls_itself_and_its_class():
    class Countdown:
        def down(self, n):
            return 0 if n == 0 else Countdown().down(n - 1)

    assert isinstance(identify(Countdown), str)
    space = {"__name__": "__main__"}
    exec("def f(n):\n    return 0 if n == 0 else g(n - 1)\ndef g(n):\n    return f(n)", space)
    assert identify(space["f"]) != identify(space["g"])
    assert identify(space["f"]) == identify(space["f"])


def test_slots_and_plain_dataclasses():
    made = make_dataclass("Made", [("a", int)], frozen=True)
    slotted = dataclass(frozen=True, slots=True)(type("Slotted", (), {"__annotations__": {"a": int}}))
    assert identify(made(1)) == identify(made(1)) != identify(made(2))
    assert identify(slotted(1)) == identify(slotted(1)) != identify(slotted(2))


def test_ditkits_own_are_named_without_code():
    from ditkit.schedulers import make

    assert "@" not in identify(make("unipc"))


def test_a_fingerprint_is_believed():
    class Named:
        fingerprint = "mine 1"

    assert identify(Named()) == "mine 1"


def test_a_plug_that_forgets_says_so_in_its_description():
    class Forgetful:
        fingerprint, saves_memory = "mine 1", False

    assert described(Forgetful()) == "forgets its memory: mine 1"
    assert forgets({"run_blocks": [described(Forgetful())]})
    assert not forgets({"run_blocks": ["mine 1"]})
