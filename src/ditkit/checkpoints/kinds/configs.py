"""Keys of configs: taken one by one, checked, and what nobody took is noted.

The rule for keys: those that shape the arithmetic are read or, where we have no such arithmetic, refused; those known
to have no effect on inference, and all that begin with ``_``, are ignored. Any other key is unknown, such as one that a
newer version writes: the tensors decide, so it is noted with its value and stops nothing, unless ``strict_config`` is
among the rules. Leaves out: which keys a config has (the files of the kinds)."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ditkit.errors import LoadError, nearest, shortened

REQUIRED: Any = object()
UNSET: Any = object()
"""Default of a key whose field is left to the config class."""
DIFFUSERS_VERSION = "0.42.1"  # the release whose layout is written
Rules = Collection[str]
"""Named exceptions: the ``claims`` of kinds, and ``strict_config``."""
STRICT = "strict_config"
"""Rule: a key that is not known is an error."""


def of_class(name: str) -> dict[str, Any]:
    """How a file of diffusers begins."""
    return {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}


def note_unknown(asked: str, file: str, unknown: Mapping[str, Any], known: Iterable[str], rules: Rules) -> list[str]:
    """One sentence for each key that ``file`` has and nobody knows. Raises LoadError where the rules are strict."""
    notes = []
    for key, value in unknown.items():
        hint = nearest(key, known)
        if STRICT in rules:
            raise LoadError(asked, f"the key {key!r} of {file} is unknown{hint}", "Remove it if it has no effect")
        shown = json.dumps(value, default=str)[:80]
        notes.append(f"{file} has {key} = {shown}, which is not known here and was left out{hint}")
    return notes


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class Check:
    """What a value has to be (``fits``), in words for an error (``wanted``), and what is made of it."""

    fits: Callable[[Any], bool]
    wanted: str
    make: Callable[[Any], Any] = lambda value: value


def _list(fits: Callable[[Any], bool], what: str, make: Callable[[Any], Any] = tuple) -> Check:
    return Check(lambda value: isinstance(value, list | tuple) and all(map(fits, value)), f"not a list of {what}", make)


QUANTIZED: Mapping[str, tuple[str, ...]] = MappingProxyType({
    **dict.fromkeys(("fp8", "fp8_scaled"), ("fp8", "float8", "e4m3", "e5m2", '"type": "float"')),
    "int8": ("int8", '"type": "int"'), "gguf": ("gguf",),
})  # fmt: skip
"""How weights are stored -> words for it in a ``quantization_config`` (ModelOpt, compressed-tensors, diffusers)."""
WITH_SCALES = ("modelopt", "compressed-tensors", "fbgemm")  # methods whose 8-bit weights always have scales


def check_quantization(told: Any, stored: str, asked: str) -> None:
    """Raise LoadError where a ``quantization_config`` says something else than the tensors, which are ``stored`` so."""
    text = json.dumps(told, default=str, sort_keys=True).lower()
    said = any(word in text for word in QUANTIZED[stored.split()[0]])
    lost = stored == "fp8" and any(method in text for method in WITH_SCALES)
    if not isinstance(told, dict) or not said or lost or re.search(r"fp4|int4|w4a|\"num_bits\": [1-7]\b", text):
        shown = shortened(json.dumps(told, default=str), 200)
        without = " without scales" if lost else ""
        found = f"its quantization_config says {shown}, and the tensors are {stored}{without}"
        raise LoadError(asked, found, "Use the config of these weights, or remove that key if it is not theirs")


COUNT = Check(_is_count, "not a whole number of at least 1")
MAYBE_COUNT = Check(lambda value: value is None or _is_count(value), "neither null nor a whole number above 0")
COUNTS, BOOLS = _list(lambda x: type(x) is int, "whole numbers"), _list(lambda x: type(x) is bool, "true and false")
FLOATS = _list(is_number, "finite numbers", lambda value: tuple(map(float, value)))
EPSILON = Check(lambda value: is_number(value) and 0 < value < 1, "not a finite number between 0 and 1", float)
"""What a norm adds to a variance: without it, or below 0, a row of zeros becomes undefined numbers."""


class ConfigKeys:
    """The keys of one config, taken one by one. ``notes`` grows by what is unknown; ``said``: field -> what the config
    calls it, for messages."""

    def __init__(self, config: Mapping[str, Any], asked: str, rules: Rules, notes: list[str]):
        self.asked, self.rules, self.config, self.notes = asked, rules, config, notes
        self.rest = {key: value for key, value in config.items() if not key.startswith("_")}
        self.known: list[str] = []
        self.names: dict[str, str] = {}
        if self.rest.get("quantization_config") is not None:  # it changes what the tensors mean
            raise self.error("it has a quantization_config, and its tensors are not quantised")

    def error(self, found: str, do: str = "Use a model of a supported kind") -> LoadError:
        return LoadError(self.asked, found, do)

    def any(self, key: str, default: Any = REQUIRED) -> Any:
        self.known.append(key)
        value = self.rest.pop(key, default)
        if value is REQUIRED:
            raise self.error(f"the config has no {key}", "Use the config.json that belongs to the weights")
        return value

    def take(self, key: str, default: Any = REQUIRED, check: Check = COUNT) -> Any:
        value = self.any(key, default)
        if value is UNSET:
            return value
        if not check.fits(value):
            raise self.error(f"{key} is {value!r}, {check.wanted}", "Correct the config")
        return check.make(value)

    def only(self, key: str, *supported: Any) -> Any:
        """The key may only have one of these values; the first is the default."""
        value = self.any(key, supported[0])
        value = tuple(value) if isinstance(value, list) else value
        if not any(value == option and type(value) is type(option) for option in supported):
            raise self.error(f"{key} is {value!r}, and only {' or '.join(map(repr, supported))} is supported")
        return value

    def ignore(self, keys: Iterable[str]) -> None:
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


@dataclass(frozen=True)
class Key:
    """The field that a key of a config gives."""

    field: str
    default: Any = REQUIRED
    check: Check = COUNT


def same(check: Check = COUNT, **defaults: Any) -> dict[str, Key]:
    """Keys that are called like their fields."""
    return {name: Key(name, default, check) for name, default in defaults.items()}


@dataclass(frozen=True)
class ConfigFormat:
    """The config.json of one layout of one kind, read and written by one table.

    ``keys``: key -> field. ``fixed``: key -> the values that it may have, the first is the default and is written.
    ``derived``: key -> the value that follows from the fields, and the only one that it may have. ``read`` and
    ``write``: what else is made of several keys or fields. ``written``: keys without effect on inference, as
    they are written; ``ignored``: more of these. ``silent``: keys that are not written at these values. ``nested``:
    model type of a larger network -> the key under which ours is."""

    keys: Mapping[str, Key]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[ConfigKeys, dict[str, Any]], None] = lambda keys, fields: None
    write: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: {}
    written: Mapping[str, Any] = field(default_factory=dict)
    ignored: Collection[str] = ()
    silent: Mapping[str, Any] = field(default_factory=dict)
    nested: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)

    def inner(self, config: Mapping[str, Any], asked: str) -> Mapping[str, Any]:
        """The part of ``config`` that is about our network. Raises LoadError."""
        name = self.nested.get(str(config.get("model_type")))
        found = config if name is None else config.get(name)
        if not isinstance(found, Mapping):
            raise LoadError(asked, f"it is of a whole {config['model_type']} and has no {name}", "Correct the config")
        return found

    def fields(self, keys: ConfigKeys) -> dict[str, Any]:
        for name, values in self.fixed.items():
            keys.only(name, *values)
        fields = {key.field: keys.take(name, key.default, key.check) for name, key in self.keys.items()}
        fields = {name: value for name, value in fields.items() if value is not UNSET}
        keys.names.update({key.field: name for name, key in self.keys.items()})
        self.read(keys, fields)
        for name, value in self.derived.items():
            keys.only(name, value(fields))
        keys.ignore([*self.written, *self.ignored])
        keys.done()
        return fields

    def config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: fields[key.field] for name, key in self.keys.items()}
        values |= {name: options[0] for name, options in self.fixed.items()}
        values |= {name: value(fields) for name, value in self.derived.items()}
        values |= {**self.written, **self.write(fields)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in self.silent or self.silent[name] != value
        }
