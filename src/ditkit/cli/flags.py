"""Flags: one for each field of Request and Setup, made from the fields themselves; those that commands share; and
RunOptions, which part of a run they ask for and where its results go. Importing this does not import torch."""

from __future__ import annotations

import inspect
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit import config
from ditkit.config import FIELDS, Layer
from ditkit.errors import LoadError, OutputError, SetupError
from ditkit.filenames import check_file_name, fault_of_path, shortened
from ditkit.trust import ALLOWED

if TYPE_CHECKING:
    from ditkit.receipt import Recorder
    from ditkit.runs import Run


class PastClick(Exception):
    """Its cause, as it is. Of an error of a file or of a value click would make one of its own: every broken pipe would
    be stdout's, the end of any file would be Ctrl-C, and a ValueError a wrong flag."""


def to_path(text: str | Path) -> Path:
    """What a path option means: a ``~`` at its start is the home folder, also where the shell did not see it."""
    return Path(os.path.expanduser(text))


def to_input(text: str | Path) -> Path:
    """Raises PastClick for what cannot be a path."""
    if fault := fault_of_path(text):
        raise PastClick from LoadError(f"reading {shortened(str(text))}", fault, "Check the path")
    return to_path(text)


def to_output(text: str | Path, folder: bool = False) -> Path:
    """Raises PastClick for what cannot be the name of a file that is written."""
    path = os.path.expanduser(text)
    try:
        check_file_name(path, f"writing {shortened(str(text))!r}", folder=folder)
    except OutputError as e:
        raise PastClick from e
    return Path(path)


def to_folder(text: str | Path) -> Path:
    """Raises PastClick for what cannot be the name of a folder that is written."""
    return to_output(text, folder=True)


PathOption = partial(typer.Option, parser=to_input)
OutputOption = partial(typer.Option, parser=to_output)
PathArgument = partial(typer.Argument, parser=to_input)
FolderArgument = partial(typer.Argument, parser=to_folder)

Prompt = Annotated[str | None, typer.Argument(help="What the clip should show.", show_default=False)]
ConfigFile = Annotated[Path | None, PathOption("--config", metavar="FILE", help="A TOML file of settings.")]
Plugs = Annotated[list[str] | None, typer.Option(
    "--plug", metavar="VALUE", help=f"Code to know of: {FIELDS['plugs'].description}.", show_default=False,
)]  # fmt: skip
Allowed = Annotated[list[str] | None, typer.Option("--allow-from-file", metavar="SETTING", show_default=False, help=(
    f"What a file of your own may decide: {', '.join(ALLOWED)}."
))]  # fmt: skip
Out = Annotated[Path | None, OutputOption(metavar="PATH", help=(
    "An .mp4, .gif or .npz file, or .png for a folder of frames; what is there is replaced. Default: "
    "outputs/PROMPT-SEED.mp4, or the next name that is free."
))]  # fmt: skip
Sheet = Annotated[Path | None, OutputOption(metavar="FILE.png", help="The contact sheet. Default: beside the clip.")]
NoSheet = Annotated[bool, typer.Option("--no-sheet", help="Make no contact sheet.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of what was written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; whatever else is shown goes to stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelName = Annotated[str, typer.Option(help="A model's name or folder.")]
RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="NAME|PATH", help="Keep the run in this folder; a NAME lies in runs/.")
]
Every = Annotated[
    int | None, typer.Option(metavar="K", help="With --run: keep a State every K denoising steps. Default: 1.")
]
KeepSteps = Annotated[str | None, typer.Option(metavar="last|all", help=(
    "With --run: keep the newest State only, or one for each kept step, to fork from. Default: last."
))]  # fmt: skip


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
    """Settings as they were typed: texts by field (``true`` and ``false`` for a switch), ``--set`` and ``--config``."""

    flags: Mapping[str, Sequence[str]]
    sets: Sequence[str] = ()
    file: Path | None = None
    allowed: Sequence[str] = ()

    def named(self) -> list[str]:
        """The settings that the command line itself names."""
        return list(self._typed().values)

    def layers(self) -> list[Layer]:
        """Config file, environment, command line. Raises SetupError for what is unknown, malformed or given twice."""
        file = [] if self.file is None else [config.file_layer(self.file)]
        return [*file, config.environment_layer(os.environ), self._typed()]

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
                        do = f"Give {FIELDS[key].description}"
                        raise SetupError(f"{origin} {text}", "it is not of the form NAME=VALUE", do)
                    given.append((f"{key}.{entry}", value, origin, False))
            else:
                given += [(key, text, origin, True) for text in texts]
        for text in self.sets:
            key, equals, value = text.partition("=")
            if not equals:
                raise SetupError(f"--set {text}", "it is not of the form KEY=VALUE", "Write it as --set steps=4")
            given.append((key.strip(), value.strip(), f"--set {key.strip()}", False))
        layer = config.text_layer(given)
        for key in whole:
            if key in layer.values:
                both = f"{origins[key]} and {layer.origins[key]}"
                raise SetupError(both, "one setting was given twice", "Give it once")
        return Layer({**layer.values, **whole}, {**layer.origins, **origins})


def with_settings(command: Callable[..., Any], keys: Sequence[str] = tuple(FIELDS)) -> Callable[..., Any]:
    """``command(given, ...)`` as a typer command: ``given`` is made of an option for each setting, --set and --config.
    ``keys``: the settings that it has a use for.

    A parameter ``prompt`` stays what it is and goes into ``given`` too."""
    options: dict[str, Any] = {key: _annotation(key) for key in keys if key != "prompt"}
    every = "Any setting, or an entry of one: devices.vae=cpu."
    options["sets"] = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=every)]
    options["file"] = ConfigFile
    options["allowed"] = Allowed
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(command, eval_str=True).parameters
    kept = [p.replace(kind=keyword) for name, p in own.items() if name != "given"]
    added = [inspect.Parameter(name, keyword, default=None, annotation=a) for name, a in options.items()]

    def run(**values: Any) -> Any:
        typed = {key: values.pop(key) for key in options}
        sets, file, allowed = typed.pop("sets") or (), typed.pop("file"), typed.pop("allowed") or ()
        texts = {k: [str(v).lower()] if isinstance(v, bool) else v for k, v in typed.items() if v not in (None, [])}
        if values.get("prompt") is not None:
            texts["prompt"] = [values["prompt"]]
        return command(given=RawSettings(texts, sets, file, allowed), **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(kept + added)  # type: ignore[attr-defined]
    return run


def _annotation(key: str) -> Any:
    """The option of a setting."""
    field, name = FIELDS[key], kebab(key)
    source, default = typing.cast("dict[str, Any]", field.json_schema_extra)["source"], field.get_default()
    shown = str(default).lower() if isinstance(default, bool) else "none" if default in (None, "", {}) else default
    text = f"{field.description}. Default: {shown}{'' if source == 'none' else f' ({source})'}."
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(f"--{name}/--no-{name}", help=text, show_default=False)]
    metavar = "NAME=VALUE" if typing.get_origin(field.annotation) is dict else "VALUE"
    return Annotated[list[str] | None, typer.Option(f"--{name}", help=text, metavar=metavar, show_default=False)]


def kebab(key: str) -> str:
    """The flag of ``plugs``, which may be repeated, names one of them."""
    return "plug" if key == "plugs" else key.replace("_", "-")


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


@dataclass(frozen=True)
class RunOptions:
    """``setup``: the settings that somebody gave. ``run``: the folder that keeps the States, if one does; ``kept``: one
    does, and may not be there yet. ``recorder``: that of a part which has run."""

    out: Path
    sheet: Path | None
    state: Path | None = None
    start: str | None = None
    until: str | None = None
    stop_at_step: int | None = None
    setup: Mapping[str, Any] | None = None
    quiet: bool = False
    json: bool = False
    run: Run | None = None
    kept: bool = False
    recorder: Recorder | None = None

    def sheets(self, count: int) -> list[Path]:
        return [] if self.sheet is None else numbered(self.sheet, count)


def sheet_for(out: Path, sheet: Path | None, no_sheet: bool) -> Path | None:
    if sheet is not None and no_sheet:
        raise OutputError(f"--sheet {sheet} with --no-sheet", "they contradict each other", "Give one of them")
    return None if no_sheet else sheet or out.with_name(f"{out.stem}-sheet.png")


def numbered(path: Path, count: int) -> list[Path]:
    """The names that ``Result.save`` gives to the clips of a run."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
