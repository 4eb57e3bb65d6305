"""Keys of configs: taken one by one, checked, and what nobody took is noted.

The rule for keys: those that shape the arithmetic are read or, where we have no such arithmetic, refused; those known
to have no effect on inference, and all that begin with ``_``, are ignored. Any other key is unknown, such as one that a
newer version writes: the tensors decide, so it is noted with its value and stops nothing, unless ``strict_config`` is
among the rules. Leaves out: which keys a config has (the files of the kinds).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ditkit.errors import LoadError, nearest

REQUIRED: Any = object()
STRICT = "strict_config"
"""Rule: a key that is not known is an error."""
REFUSED = ("quantization_config",)
"""Keys of any config that change what its tensors mean."""


def note_unknown(
    asked: str, file: str, unknown: Mapping[str, Any], known: Iterable[str], rules: Collection[str] = ()
) -> tuple[str, ...]:
    """One sentence for each key that ``file`` has and nobody knows. Raises LoadError where the rules are strict."""
    if STRICT in rules and unknown:
        key = next(iter(unknown))
        raise LoadError(
            asked, f"the key {key!r} of {file} is unknown{nearest(key, known)}", "Remove it if it has no effect"
        )
    return tuple(
        f"{file} has {key} = {json.dumps(value, default=str)[:80]}, which is not known here and was left out"
        f"{nearest(key, known)}"
        for key, value in unknown.items()
    )


class ConfigKeys:
    """The keys of one config, taken one by one. ``rules``: named exceptions, such as ``strict_config``.
    ``notes`` grows by what is unknown."""

    def __init__(
        self, config: Mapping[str, Any], asked: str, rules: Collection[str] = (), notes: list[str] | None = None
    ):
        self.asked, self.rules, self.notes = asked, rules, [] if notes is None else notes
        self.rest = {key: value for key, value in config.items() if not key.startswith("_")}
        self.known: list[str] = []
        for key in REFUSED:
            if self.rest.get(key) is not None:
                raise self.error(f"it has a {key}, and ditkit does not compute such weights")

    def error(self, found: str, do: str = "Use a model of a supported kind") -> LoadError:
        return LoadError(self.asked, found, do)

    def any(self, key: str, default: Any) -> Any:
        self.known.append(key)
        value = self.rest.pop(key, default)
        if value is REQUIRED:
            raise self.error(f"the config has no {key}", "Use the config.json that belongs to the weights")
        return value

    def integer(self, key: str, default: Any, least: int = 1) -> int:
        value = self.any(key, default)
        if type(value) is not int or value < least:
            raise self.error(f"{key} is {value!r}, not a whole number of at least {least}", "Correct the config")
        return value

    def integer_or_none(self, key: str) -> int | None:
        value = self.any(key, None)
        if value is not None and (type(value) is not int or value < 1):
            raise self.error(f"{key} is {value!r}, neither null nor a whole number above 0", "Correct the config")
        return value

    def number(self, key: str, default: Any) -> float:
        value = self.any(key, default)
        if not is_number(value):
            raise self.error(f"{key} is {value!r}, not a finite number", "Correct the config")
        return float(value)

    def epsilon(self, key: str, default: float) -> float:
        """What a norm adds to a variance: without it, or below 0, a row of zeros becomes undefined numbers."""
        value = self.number(key, default)
        if not 0 < value < 1:
            raise self.error(f"{key} is {value!r}, not a number between 0 and 1", "Correct the config")
        return value

    def list_of(self, key: str, default: Sequence[Any], fits: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
        value = self.any(key, default)
        if not isinstance(value, list | tuple) or not all(map(fits, value)):
            raise self.error(f"{key} is {value!r}, not a list of {what}", "Correct the config")
        return tuple(value)

    def only(self, key: str, *supported: Any, default: Any = None) -> None:
        """The key may only have one of these values; the first is the default."""
        value = self.any(key, supported[0])
        value = tuple(value) if isinstance(value, list) else value
        if not any(value == option and type(value) is type(option) for option in supported):
            listed = " or ".join(repr(option) for option in supported)
            raise self.error(f"{key} is {value!r}, and only {listed} is supported")

    def ignore(self, keys: Collection[str]) -> None:
        for key in keys:
            self.any(key, None)

    def require(self, fine: bool, found: str) -> None:
        """For values that are each possible and together are not."""
        if not fine:
            raise self.error(found, "Correct the config")

    def done(self, file: str = "config.json") -> None:
        """Note the keys that nobody took. Raises LoadError where the rules are strict."""
        unknown = {key: value for key, value in self.rest.items() if value is not None}
        self.notes += note_unknown(self.asked, file, unknown, self.known, self.rules)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
