"""What a model consists of when it is written: files, configs and names, in diffusers' layout and in the native one.

The native layout is what the official code opens: ``.pth`` state dicts for all but the transformers, under fixed names
that say nothing about their types, and no config for them. Leaves out: writing (convert.py, writing.py) and reading.
Sources: Wan2.1 and Wan2.2 ``wan/configs``, the file lists of the published repositories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.files.text import read_json, some
from ditkit.checkpoints.kinds.configs import DIFFUSERS_VERSION
from ditkit.checkpoints.kinds.kind import side_of
from ditkit.checkpoints.model.fits import NATIVE_TOKENIZER
from ditkit.checkpoints.model.part import EXPERTS, ModelParts, Part, main_of
from ditkit.checkpoints.model.place import NOTES
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

LAYOUTS = ("native", "diffusers")
INDEX_CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType({"tokenizer": ("transformers", "T5TokenizerFast")})


@dataclass(frozen=True)
class Weights:
    """``source`` goes to ``folder`` as ``base`` with its ending: one file or shards, or with ``pickle`` a ``.pth``."""

    component: str
    folder: Path
    base: str
    source: TensorSource
    pickle: bool = False


@dataclass
class Plan:
    """``json``: file -> its content. ``copies``: folder -> the files that go into it. ``remarks``: what is not carried
    over, as sentences. All paths are relative to the model's folder."""

    weights: list[Weights] = field(default_factory=list)
    json: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    copies: dict[Path, list[Path]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def plan(located: ModelParts, layout: str) -> Plan:
    """How the model is written. Raises LoadError for tensors that are unknown or missing."""
    made, one = Plan(), len(located.parts) == 1
    for part in located.parts.values():
        _part(part, layout, Path() if one else _place(part, located, layout), made)
    if layout == "diffusers" and not one:
        _pipeline(located, made)
    if not one:
        made.remarks += [f"incomplete: {problem.found}" for problem in located.problems]
    made.remarks += [f"{name} is no part and was left behind ({why})" for name, why in located.unused.items()]
    if Path(located.path).is_dir() and (Path(located.path) / "ditkit.toml").is_file():
        made.remarks.append("ditkit.toml was left behind: write its defaults anew for the new folder")
    return made


def _place(part: Part, located: ModelParts, layout: str) -> Path:
    """The folder of one of several parts."""
    if layout == "diffusers":
        return Path(part.component)
    if part.kind == "tokenizer":
        return NATIVE_TOKENIZER
    two = "transformer_2" in located.parts
    return next((Path(name) for name, component in EXPERTS.items() if two and component == part.component), Path())


def _part(part: Part, layout: str, folder: Path, made: Plan) -> None:
    if part.source is None:
        made.copies[folder] = tokenizer_files(part.path)
        return
    own = part.row.written_as(layout)
    if own is None:
        made.remarks.append(f"{part.component} has no place in the layout {layout} and was left behind")
        return
    form = part.row.layouts[own]
    made.weights.append(Weights(part.component, folder, form.file, named(part, own), form.pickle))
    if form.remark:
        made.remarks.append(form.remark)
    if not form.pickle and (config := part.row.write_config(own, part.config)) is not None:
        made.json[folder / "config.json"] = config


def named(part: Part, layout: str) -> TensorSource:
    """The part's tensors under the names of ``layout``, all of them known and none of them missing."""
    assert part.source is not None
    row = part.row
    if row.keys is None:
        return part.source
    table = row.file_keys(part.config, layout) if row.file_keys else row.keys(part.config)
    mapped = Mapped(part.source, table, side_of(layout), of=row.own).require_known()
    absent = table.by_name(side_of(layout)).keys() - mapped.tensors.keys()
    if absent and not row.optional_keys:
        found = f"{len(absent)} tensors are missing ({some(absent)})"
        raise LoadError(f"converting {part.path}", found, "Use whole weights")
    return mapped


def tokenizer_files(folder: Path) -> list[Path]:
    """The vocabulary and its settings; programs and pictures are never among them."""
    return sorted(file for file in folder.iterdir() if file.is_file() and NOTES.fullmatch(file.name))


def _pipeline(located: ModelParts, made: Plan) -> None:
    """The index, and the components without weights: taken from a folder of diffusers, else written anew."""
    main, task = main_of(located.parts), located.task
    if main is None or task is None or task not in main.row.tasks:
        made.remarks.append("there is no transformer of a known task, so there is no model_index.json")
        return
    about = main.row.tasks[task]
    index: dict[str, Any] = {"_class_name": about.pipeline, "_diffusers_version": DIFFUSERS_VERSION}
    for name, part in located.parts.items():
        config = made.json.get(Path(name, "config.json"))
        if config is not None or part.source is None:
            index[name] = list(INDEX_CLASSES[name]) if config is None else _class(part, config)
    for part in located.parts.values():
        for name, (library, cls, file, content) in part.row.beside(part.config, task).items():
            own = Path(located.path) / name
            if located.layout == "diffusers" and own.is_dir():
                made.copies[Path(name)] = tokenizer_files(own)
                cls = read_json(own / file).get("_class_name", cls) if (own / file).is_file() else cls
            else:
                made.json[Path(name, file)] = content
            index[name] = [library, cls]
    if located.boundary is not None:
        index["boundary_ratio"] = located.boundary
    if located.expand_timesteps:
        index["expand_timesteps"] = True
    made.json[Path("model_index.json")] = {name: [None, None] for name in about.optional} | index


def _class(part: Part, config: Mapping[str, Any]) -> list[str]:
    library = part.row.layouts[str(part.row.other)].library
    return [library, config["_class_name"] if "_class_name" in config else config["architectures"][0]]
