"""Plugs and stages with faults in them: what a person meets who writes one."""

from dataclasses import dataclass

from ditkit import BaseStage, Field


@dataclass(frozen=True)
class NotMade:
    seam = "run_blocks"

    def __post_init__(self):
        raise RuntimeError("no such device")

    def __call__(self, run_blocks):
        return run_blocks


class NotWrapped:
    seam = "predict"

    def __call__(self, predict):
        raise ValueError("not today")


class NotGiven:
    seam = "attend"

    def __call__(self, attend):
        return None


class NotRun:
    seam = "run_blocks"

    def __call__(self, run_blocks):
        return lambda blocks, x, ctx: {}["missing"]


class NotMatched:
    seam = "swap"

    def match(self, name, module):
        raise ZeroDivisionError("by nothing")

    def make(self, module):
        return module


class NotHeard:
    seam = "listener"

    def __call__(self, event):
        raise LookupError(event.name)


class Forgotten(BaseStage):
    name = "forgotten"
    after = "encode_text"
    reads = ("prompt",)
    writes = ("words",)
    fields = (Field("words", "plain", "list", "", "", "forgotten", "the words of each prompt"),)

    def run(self, inputs, ctx):
        return None


class Listed(Forgotten):
    name = "listed"

    def run(self, inputs, ctx):
        return ["words"]


class Raised(Forgotten):
    name = "raised"

    def run(self, inputs, ctx):
        raise KeyError("no such word")


class NotBegun(Forgotten):
    name = "not_begun"

    def __init__(self):
        raise ValueError("not even begun")


class Left(Forgotten):
    name = "left"

    def run(self, inputs, ctx):
        raise SystemExit(3)


class Numbered(Forgotten):
    name = 5
