"""Values of other libraries as plain ones: what JSON and TOML can say, so that two spellings of a value are one.

A number is taken where nothing of it is lost: ``numpy.int64(7)``, ``Decimal("7")`` and ``7.0`` are 7 where a whole
number is meant. Leaves out: whether a value is allowed (``request.py``, ``options.py``)."""

import decimal
import fractions
import math
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ditkit import limits
from ditkit.errors import DitkitError
from ditkit.hiding import hidden

EXACT = 2**53  # up to here a float is the whole number that somebody wrote; beyond, digits may be gone
SHOWN = 200  # characters of a value in a sentence
RANGE = 10_000  # entries of a range that stands for a list


def plain(value: Any) -> Any:
    """Numbers, arrays, dtypes, devices and paths as numbers, lists and texts, also within lists and tables. What
    has no such form stays what it is, for whoever checks it to refuse."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, range) and len(value) <= RANGE):
        return [plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        return _number(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return value


def _number(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        if value.is_nan():
            return math.nan
        if value.is_infinite() or value.adjusted() > limits.DIGITS:
            return float(value)
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, fractions.Fraction):
        return value.numerator if value.denominator == 1 else float(value)
    library = type(value).__module__.partition(".")[0]
    if library == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if library in ("numpy", "torch") and hasattr(value, "tolist"):
        made = value.tolist()
        return float(value) if type(made) is type(value) else plain(made)  # numpy's long double gives itself
    return operator.index(value)


def shown(value: Any) -> str:
    """A value in a sentence, whatever somebody gave; secrets go before it is cut, for a half of one is not known."""
    try:
        text = hidden(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits
        return "a value that is too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def counted(value: Any, asked: str, error: type[DitkitError]) -> int:
    """A number of steps or of clips that somebody gave in Python, where a float is a mistake. Raises ``error``."""
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise error(f"{asked}={shown(value)}", "it is no whole number", "Give a whole number, 0 or more")
    return number


def whole(value: Any, *annotations: Any) -> Any:
    """``value``, which is plain, with floats as whole numbers where ``annotations`` ask for these (int by default),
    also within lists and tables, and nothing of them is lost."""
    members = [member for each in annotations or (int,) for member in _members(each)]
    kinds = [kind for kind, _ in members]
    if isinstance(value, float):
        asked = int in kinds and float not in kinds
        return int(value) if asked and value.is_integer() and abs(value) <= EXACT else value
    if isinstance(value, list) and (inner := [a for kind, args in members if _is(kind, Sequence) for a in args]):
        return [whole(each, *inner) for each in value]
    if isinstance(value, dict) and (inner := [args[-1] for kind, args in members if _is(kind, Mapping) and args]):
        return {key: whole(each, *inner) for key, each in value.items()}
    return value


def _members(annotation: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """(class, what it holds) of each type that ``annotation`` allows."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(args[0])
    if origin in (typing.Union, types.UnionType):
        return [member for each in args for member in _members(each)]
    return [(origin or annotation, tuple(arg for arg in args if arg is not Ellipsis))]


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base) and not issubclass(kind, str)
