"""Which value a setting has, and who said so.

The settings are the fields of Request and Setup, by one flat name each. Layers, the lowest first: ditkit's defaults,
the model's own, a config file (TOML), the environment (``DITKIT_STEPS=4``), flags. A whole table replaces the one below
it; a dotted key (``devices.vae=cpu``) changes one entry. Leaves out: the names of flags (``cli/``)."""

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ditkit import options
from ditkit.errors import RequestError, SetupError, nearest
from ditkit.hiding import KEY, TOKEN
from ditkit.reading import parse_toml, read_bytes
from ditkit.request import OLD_NAMES, Request, Settings, renamed
from ditkit.setup import Setup

FIELDS: dict[str, FieldInfo] = {**Request.model_fields, **Setup.model_fields}
"""Every setting by its name. Request and Setup share none."""

PREFIX = "DITKIT_"


class Entries(dict[str, Any]):
    """Entries of a table that are set one by one: they join the table below instead of replacing it."""


@dataclass(frozen=True)
class Layer:
    """``values`` by setting; ``origins`` says in words where each comes from."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any], origin: str) -> Self:
        for key in values:
            check_key(OLD_NAMES.get(key, key), f"{origin}: {key}")
        try:
            values = renamed(values)
        except ValueError as e:
            raise SetupError(origin, str(e), "Give it once, by today's name") from None
        return cls(values, dict.fromkeys(values, origin))


@dataclass(frozen=True)
class Settled:
    """All layers above the defaults, put together. ``given`` lists for each setting who gave what, the lowest first."""

    given: Mapping[str, tuple[tuple[str, Any], ...]]

    @cached_property
    def values(self) -> Mapping[str, Any]:
        return {key: told[-1][1] for key, told in self.given.items()}

    @cached_property
    def origins(self) -> Mapping[str, str]:
        return {key: told[-1][0] for key, told in self.given.items()}

    def of(self, settings: type[Settings]) -> dict[str, Any]:
        """The values that somebody gave for the fields of Request or of Setup."""
        return {k: v for k, v in self.values.items() if k in settings.model_fields}

    def setup(self) -> Setup:
        """Raises SetupError that names the origin of the faulty value."""
        return Setup.parse(self.of(Setup), self.origins, SetupError)

    def request(self) -> Request:
        """Raises RequestError that names the origin of the faulty value."""
        return Request.parse(self.of(Request), self.origins, RequestError)

    def explain(self, key: str) -> list[tuple[str, Any]]:
        """(origin, value) of one setting in every layer that has it, ditkit's default first; the last one counts."""
        key = OLD_NAMES.get(key, key)
        check_key(key, f"explaining {key}")
        field = FIELDS[key]
        extra = typing.cast("dict[str, Any]", field.json_schema_extra)
        return [(f"default ({extra['source']})", field.get_default()), *self.given.get(key, ())]


def settle(*layers: Layer) -> Settled:
    """Put layers together, the lowest first."""
    given: dict[str, tuple[tuple[str, Any], ...]] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if isinstance(value, Entries):
                below = given[key][-1][1] if key in given else FIELDS[key].get_default()
                value = _joined(below if isinstance(below, dict) else {}, value, nested=key == "stage_settings")
            given[key] = (*given.get(key, ()), (layer.origins[key], value))
    return Settled(given)


def _joined(below: dict[str, Any], entries: Entries, nested: bool) -> dict[str, Any]:
    """``entries`` over ``below``; of a ``nested`` table ``a.b`` is the entry b of its table a."""
    found = dict(below)
    for name, value in entries.items():
        outer, dot, inner = name.partition(".")
        if nested and dot:
            found[outer] = {**found.get(outer, {}), inner: value}
        else:
            found[name] = value
    return found


def file_layer(path: str | Path) -> Layer:
    """The settings in a TOML file. Raises SetupError when it is missing, not TOML, or has an unknown key."""
    asked = f"config file {path}"
    try:
        data = read_bytes(path, asked, SetupError)
    except FileNotFoundError:
        raise SetupError(asked, "there is no such file", "Check the path") from None
    return Layer.of(parse_toml(data, asked, SetupError, do="Correct it"), asked)


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """``DITKIT_NAME=VALUE`` for every setting; any other name that begins so is refused."""
    names = sorted(name for name in environment if name.startswith(PREFIX) and name not in (TOKEN, KEY))
    return text_layer(
        (name.removeprefix(PREFIX).lower(), environment[name], f"environment {name}", False) for name in names
    )


def text_layer(given: Iterable[tuple[str, str, str, bool]]) -> Layer:
    """A layer from (key, text, origin, literal), where key may be dotted; for ``literal`` see ``from_text``.

    Raises SetupError for an unknown key and for one that is given twice."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, text, origin, literal in given:
        name, _, entry = key.partition(".")
        name = OLD_NAMES.get(name, name)
        if entry and name not in FIELDS:  # SHARPNESS.AMOUNT: what a stage of that name makes of it, shows later
            name, entry = "stage_settings", key
        check_key(name, origin)
        annotation = FIELDS[name].annotation
        table = typing.get_origin(annotation) is dict
        if entry and not table:
            raise SetupError(origin, f"{name} is not a table", f"Give {name} itself")
        entries = values.get(name)
        if name in values and not (entry and isinstance(entries, Entries) and entry not in entries):
            raise SetupError(origin, f"it was given before, by {origins[name]}", "Give it once")
        if entry:
            nested = name == "stage_settings" and "." in entry
            value = from_text(text, Any if nested else typing.get_args(annotation)[1], literal)
            values[name] = Entries({**(entries or {}), entry: value})
        else:
            values[name] = from_text(text, annotation, literal)
        origins[name] = origin if name not in origins or origins[name] == origin else f"{origins[name]}, {origin}"
    return Layer(values, origins)


def from_text(text: str, annotation: Any, literal: bool = False) -> Any:
    """What a text means for a setting of that type: a TOML value, or else the bare text.

    With ``literal`` the bare text comes first where the type takes it: on a command line the shell has already removed
    the quotes. ``none`` unsets what may be unset; 1 and 0 stand for true and false. A text that nothing fits is handed
    on for the check of the whole to refuse."""
    if annotation is bool and text in ("0", "1"):
        return text == "1"
    if text.lower() == "none" and type(None) in typing.get_args(annotation):
        return None
    values = options.toml_values(text.strip())  # a .env file of Windows leaves a return at the end of its lines
    if typing.get_origin(annotation) is list and not (text.lstrip().startswith("[") and values):  # its only entry
        return [from_text(text, typing.get_args(annotation)[0], literal)]
    meanings = [text, *values] if literal else [*values, text]
    for meaning in meanings:
        if _fits(meaning, annotation):
            return meaning
    return next((value for value in values if not isinstance(value, str)), text)


def _fits(value: Any, annotation: Any) -> bool:
    try:
        options.adapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def item_of(key: str) -> Any:
    """The type of one entry of a setting that may hold several, so that its flag may be repeated; else None."""
    annotation = FIELDS[key].annotation
    lists = (t for t in (annotation, *typing.get_args(annotation)) if typing.get_origin(t) is list)
    return next((typing.get_args(found)[0] for found in lists), None)


def check_key(key: str, asked: str) -> None:
    if key not in FIELDS:
        hint = nearest(key, FIELDS)
        do = "Use that, or leave it out" if hint else f"The known ones are {', '.join(FIELDS)}"
        raise SetupError(asked, f"there is no setting {key!r}{hint}", do)
