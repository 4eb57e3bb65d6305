"""Options of plugs, stages and schedulers, and settings of stages: the fields of a dataclass, given as one text
(``every=2,mode=fast``) or as plain values, held against their types."""

import json
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ditkit.errors import DitkitError, SetupError, UserError, nearest
from ditkit.plain import plain, shown, whole
from ditkit.reading import check_value

_TOKEN = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*'|.)""", re.S)


def fields_of(cls: Any) -> dict[str, Field[Any]]:
    """The options that ``cls`` takes, by name; none where it is no class of data."""
    return {f.name: f for f in fields(cls) if f.init} if isinstance(cls, type) and is_dataclass(cls) else {}


def typed(
    cls: Any, given: str | Mapping[str, Any], what: str, error: type[UserError] = SetupError, whole: bool = True
) -> dict[str, Any]:
    """``given`` as ``cls`` takes it. ``what`` has these options, for messages. Raises ``error`` for an option that is
    unknown, of another type, or missing where it is to be the ``whole``."""
    known = fields_of(cls)
    meant = _read(given, what, error) if isinstance(given, str) else {k: (v,) for k, v in given.items()}
    for name in meant:
        if name not in known:
            do = f"Use one of: {', '.join(known)}" if known else "It has no options; leave it out"
            raise error(f"option {name!r} of {what}", f"there is none of that name{nearest(name, known)}", do)
    for name, one in known.items() if whole else ():
        if name not in meant and one.default is MISSING and one.default_factory is MISSING:
            raise error(what, f"it needs its option {name}", f"Give {name}=VALUE")
    hints = typing.get_type_hints(cls) if known else {}
    return {name: _fitting(name, hints[name], values, what, error) for name, values in meant.items()}


def made(cls: Any, given: str | Mapping[str, Any], what: str, error: type[UserError] = SetupError) -> Any:
    """A ``cls`` with these options. Raises ``error`` also for what its own checks refuse."""
    values = typed(cls, given, what, error)
    try:
        return cls(**values)
    except DitkitError:
        raise
    except (TypeError, ValueError) as e:
        raise error(what, f"it refuses its options ({e})", "Correct them") from e
    except Exception as e:
        raise error(what, f"making it fails with {type(e).__name__}: {e}", "Correct it, or leave it out") from e


def as_text(values: Mapping[str, Any]) -> str:
    """The way back from values to one text."""
    return ",".join(f"{name}={_toml(value)}" for name, value in values.items())


def _read(text: str, what: str, error: type[UserError]) -> dict[str, tuple[Any, ...]]:
    """Each option with what its text may mean: a TOML value, or else the bare text."""
    found: dict[str, tuple[Any, ...]] = {}
    if not text.strip():
        return found
    for piece in _pieces(text):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name or name in found:
            raise error(f"options {text!r} of {what}", f"{piece.strip()!r} is not one of the form OPTION=VALUE, once "
                        "each", "Write OPTION=VALUE,OPTION=VALUE")  # fmt: skip
        found[name] = (*([None] if value == "none" else toml_values(value)), value)
    return found


def _pieces(text: str) -> list[str]:
    """``text``, cut at the commas that stand in no quotes and no brackets."""
    pieces, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces


def toml_values(text: str) -> list[Any]:
    """What ``text`` is as a TOML value, or as one of JSON with null in it; nothing where it is none."""
    with suppress(ValueError, RecursionError):
        parsed = tomllib.loads(f"value = {text}")
        check_value(parsed)
        return [parsed["value"]] if len(parsed) == 1 else []
    with suppress(ValueError, RecursionError):
        value = json.loads(text) if text.startswith(("[", "{")) else None
        check_value(value)
        return [] if value is None else [value]
    return []


def _fitting(name: str, annotation: Any, values: tuple[Any, ...], what: str, error: type[UserError]) -> Any:
    fault = ""
    for value in values:
        try:
            said = json.dumps(whole(plain(value), annotation))
            return adapter(annotation).validate_json(said, strict=True)
        except (ValidationError, TypeError, ValueError, RecursionError) as e:
            fault = fault or (e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e))
        except PydanticSchemaGenerationError:
            fault = "its type cannot be written as a text"
    do = f"Give {getattr(annotation, '__name__', annotation)}"
    raise error(f"{name}={shown(values[-1])} of {what}", fault[:1].lower() + fault[1:], do)


@cache
def adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _has_none(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return any(map(_has_none, value.values() if isinstance(value, Mapping) else value))
    return value is None


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping | list | tuple) and _has_none(value):
        return json.dumps(value)  # TOML has no word for it
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf, nan
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
