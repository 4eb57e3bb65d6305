"""One flag for each field of Request and Setup, made from the fields themselves.

Importing this does not import torch. Leaves out: what the settings are for (``request.py``, ``setup.py``), and the
layers that they end in (``opening.py``).
"""

from __future__ import annotations

import inspect
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit import config
from ditkit.config import FIELDS, Layer
from ditkit.errors import SetupError

Prompt = Annotated[str | None, typer.Argument(help="What the clip should show.", show_default=False)]


def to_path(text: str | Path) -> Path:
    """What a path option means: a ``~`` at its start is the home folder, also where the shell did not see it."""
    return Path(os.path.expanduser(text))


Plugs = Annotated[
    list[str] | None,
    typer.Option(
        "--plug", metavar="VALUE", help=f"Code to know of: {FIELDS['plugs'].description}.", show_default=False
    ),
]


def bring_plugs(plugs: list[str] | None) -> list[str]:
    """Make all rows of ``plugs`` known, or of DITKIT_PLUGS; for a command that takes no other settings."""
    from ditkit.assembly.plugs import plugs_of

    named = {k: v for k, v in os.environ.items() if k == config.PREFIX + "PLUGS"}
    layers = config.environment_layer(named), Layer.of({"plugs": plugs} if plugs else {}, "flag --plug")
    known = config.settle(*layers).setup().plugs
    plugs_of(known)
    return known


@dataclass(frozen=True)
class RawSettings:
    """Settings as they were typed: texts by field (``on`` and ``off`` for a switch), ``--set`` and ``--config``."""

    flags: Mapping[str, tuple[str, ...]]
    sets: tuple[str, ...] = ()
    file: Path | None = None

    def named(self) -> list[str]:
        """The settings that the command line itself names."""
        return list(self._typed().values)

    def layers(self, environment: Mapping[str, str] | None = None) -> list[Layer]:
        """Config file, environment, command line. Raises SetupError for what is unknown, malformed or given twice."""
        file = [] if self.file is None else [config.file_layer(self.file)]
        return [*file, config.environment_layer(os.environ if environment is None else environment), self._typed()]

    def _typed(self) -> Layer:
        given: list[tuple[str, str, str, bool]] = []
        whole: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, texts in self.flags.items():
            origin = "PROMPT" if key == "prompt" else f"flag --{kebab(key)}"
            if len(texts) > 1 and (item := config.item_of(key)) is not None:
                whole[key], origins[key] = [config.from_text(t, item, literal=True) for t in texts], origin
            elif typing.get_origin(FIELDS[key].annotation) is dict and not texts[0].lstrip().startswith("{"):
                for text in texts:
                    entry, equals, value = text.partition("=")
                    if not equals or not entry:
                        raise SetupError(f"{origin} {text}", "it is not of the form NAME=VALUE",
                                         f"Give {FIELDS[key].description}")  # fmt: skip
                    given.append((f"{key}.{entry}", value, origin, False))
            else:
                given += [(key, text, origin, True) for text in texts]
        for text in self.sets:
            key, equals, value = text.partition("=")
            if not equals:
                raise SetupError(f"--set {text}", "it is not of the form KEY=VALUE", "Write it as --set steps=4")
            given.append((key.strip(), value.strip(), f"--set {key.strip()}", False))
        layer = config.text_layer(given)
        if twice := next((key for key in whole if key in layer.values), None):
            raise SetupError(
                f"{origins[twice]} and {layer.origins[twice]}", "one setting was given twice", "Give it once"
            )
        return Layer({**layer.values, **whole}, {**layer.origins, **origins})


def with_settings(command: Callable[..., Any], keys: Sequence[str] = tuple(FIELDS)) -> Callable[..., Any]:
    """``command(given, ...)`` as a typer command: ``given`` is made of an option for each setting, --set and --config.
    ``keys``: the settings that it has a use for.

    A parameter ``prompt`` stays what it is and goes into ``given`` too."""
    own = inspect.signature(command, eval_str=True).parameters
    kept = [p for name, p in own.items() if name != "given"]
    added = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(key))
        for key in keys
        if key != "prompt"
    ]
    added.append(
        _parameter("sets", list[str], "--set", "KEY=VALUE", "Any setting, or an entry of one: devices.vae=cpu.")
    )
    added.append(_parameter("file", Path, "--config", "FILE", "A TOML file of settings."))

    def run(**values: Any) -> Any:
        flags = {key: values.pop(key) for key in keys if key != "prompt"}
        texts = {k: _texts(v) for k, v in flags.items() if v is not None and v != []}
        if values.get("prompt") is not None:
            texts["prompt"] = (values["prompt"],)
        sets, file = tuple(values.pop("sets") or ()), values.pop("file")
        return command(given=RawSettings(texts, sets, file), **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept] + added)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, kind: Any, flag: str, metavar: str, text: str) -> inspect.Parameter:
    parser = to_path if kind is Path else None
    option = typer.Option(flag, metavar=metavar, help=text, show_default=False, parser=parser)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _annotation(key: str) -> Any:
    field = FIELDS[key]
    source = typing.cast("dict[str, Any]", field.json_schema_extra)["source"]
    because = "" if source == "none" else f" ({source})"
    text = f"{field.description}. Default: {_shown(field.get_default())}{because}."
    if field.annotation is bool:
        flag = f"--{kebab(key)}/--no-{kebab(key)}"
        return Annotated[bool | None, typer.Option(flag, help=text, show_default=False)]
    metavar = "NAME=VALUE" if typing.get_origin(field.annotation) is dict else "VALUE"
    option = typer.Option(f"--{kebab(key)}", help=text, metavar=metavar, show_default=False)
    return Annotated[list[str] | None, option]


def _shown(default: Any) -> str:
    if default is None or default == "" or default == {}:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("true" if value else "false",)
    return tuple(value)


SINGULAR = {"plugs": "plug"}
"""Settings whose flag, which may be repeated, names one of them."""


def kebab(key: str) -> str:
    return SINGULAR.get(key, key).replace("_", "-")


def flag_of(key: str, value: Any) -> list[str]:
    """The words that set ``key`` to ``value`` again: the way back from a value to a flag."""
    if isinstance(value, bool):
        return [f"--{kebab(key)}" if value else f"--no-{kebab(key)}"]
    if isinstance(value, list) and value:
        return [word for item in value for word in (f"--{kebab(key)}", str(item))]
    if isinstance(value, Mapping):
        entries = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())
        return [f"--{kebab(key)}", "{" + entries + "}"]
    return [f"--{kebab(key)}", "none" if value is None else str(value)]
