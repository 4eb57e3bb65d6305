"""What peft's ``rank_pattern`` and ``alpha_pattern`` say of one module.

peft takes their keys for regular expressions, and the first that is the whole name of a module, or its end at a dot,
counts. Nearly all are plain names. A pattern of somebody else can keep Python's ``re`` busy for ever, so only what can
be matched in one pass is understood: names, ``.``, ``\\d``, ``[0-9]``, ``\\w``, ``[^.]``, ``*`` or ``+`` after one,
``(a|b)``, and ``^`` and ``$`` at the ends. Leaves out: what the numbers mean (scale.py).
Sources: peft ``utils/other.py`` (``get_pattern_key``); diffusers ``utils/peft_utils.py`` (whole names)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ditkit import limits
from ditkit.errors import LoadError

CORRECT = "Correct the LoRA's settings"
PLAIN = re.compile(r"\^?[\w.-]+\$?")
ATOM = re.compile(r"(\\[dw.]|\[0-9\]|\[\^\.\]|[\w.-])([*+]?)", re.ASCII)
GROUP = re.compile(r"(\((?:\?:)?[^()]*\))")
CHARACTERS = {r"\d": "0123456789".__contains__, "[0-9]": "0123456789".__contains__, ".": lambda char: True,
              r"\w": lambda char: char.isalnum() or char == "_", "[^.]": lambda char: char != ".",
              r"\.": ".".__eq__}  # fmt: skip
MOST = 64  # ways that the alternatives of one pattern can be combined

Atoms = list[tuple[Callable[[str], bool], str]]


@dataclass(frozen=True)
class Patterns:
    """One table. ``names``: plain ends of names -> (place in the table, value); ``others``: place, whether it has to be
    the whole name, alternatives, value."""

    names: Mapping[str, tuple[int, Any]] = field(default_factory=dict)
    others: tuple[tuple[int, bool, list[Atoms], Any], ...] = ()

    @classmethod
    def read(cls, table: str, told: Any, check: Callable[[str, Any, str], None], asked: str) -> Patterns:
        """``told``: what stands in the settings; ``check`` raises for a value. Raises LoadError."""
        if not isinstance(told or {}, dict):
            raise LoadError(asked, f"{table} is {told!r:.200}, not a table", CORRECT)
        names: dict[str, tuple[int, Any]] = {}
        others: list[tuple[int, bool, list[Atoms], Any]] = []
        for place, (pattern, value) in enumerate((told or {}).items()):
            check(f"{table} of {pattern:.200}", value, asked)
            if PLAIN.fullmatch(pattern):
                names.setdefault(pattern.removesuffix("$"), (place, value))
                continue
            whole = pattern.startswith("^")
            found = _alternatives(pattern.removeprefix("^").removesuffix("$"))
            if found is None or len(others) == limits.PATTERNS:
                what = f"{table} has {pattern!r:.200}, which is more than names with wildcards"
                raise LoadError(asked, what if found is None else f"{table} has too many wildcards", CORRECT)
            others.append((place, whole, found, value))
        return cls(names, tuple(others))

    def of(self, name: str, default: Any) -> Any:
        """The value of the first pattern that fits ``name``, or ``default``."""
        starts = [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
        fitting = [self.names[key] for key in (f"^{name}", *(name[i:] for i in starts)) if key in self.names]
        best = min(fitting, key=lambda one: one[0], default=None)
        for place, whole, alternatives, value in self.others:
            if best is not None and place > best[0]:
                break
            if any(_matches(atoms, name, [0] if whole else starts) for atoms in alternatives):
                return value
        return default if best is None else best[1]


def _alternatives(pattern: str) -> list[Atoms] | None:
    """All that a pattern may stand for; None for one that is not understood."""
    texts: list[str] = []
    branches = pattern.split("|") if "(" not in pattern else [pattern]
    for branch in branches:
        pieces = [
            piece[1:-1].removeprefix("?:").split("|") if GROUP.fullmatch(piece) else [piece]
            for piece in GROUP.split(branch)
        ]
        count = 1
        for piece in pieces:
            count *= len(piece)
        if count > MOST or len(texts) > MOST:
            return None
        texts += ["".join(parts) for parts in product(*pieces)]
    if any(ATOM.sub("", text) for text in texts) or len(pattern) > limits.NAME:
        return None
    return [[(_character(one), many) for one, many in ATOM.findall(text)] for text in texts]


def _character(atom: str) -> Callable[[str], bool]:
    return CHARACTERS.get(atom, atom.__eq__)


def _matches(atoms: Atoms, name: str, starts: list[int]) -> bool:
    """Whether ``atoms`` are ``name`` from one of ``starts`` to its end: each is taken at all places at once."""
    places = set(starts)
    for fits, many in atoms:
        after = set(places) if many == "*" else set[int]()
        for place, char in enumerate(name):
            if (place in places or (many and place in after)) and fits(char):
                after.add(place + 1)
        places = after
    return len(name) in places
