"""A model written in the other layout, or in the same one with another type or in other shards.

What is written appears whole or not at all, after it has been opened again and held against what it was made from: a
layout that cannot say something (the native one has no configs but the transformers') is an error, not a loss. The
native layout is what the official code opens: ``.pth`` state dicts for all but the transformers, under fixed names that
say nothing about their types, and no config for them. Leaves out: how tensors get into files (``files/writing.py``).
Sources: Wan2.1 and Wan2.2 ``wan/configs``, the file lists of the published repositories."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditkit.checkpoints.convert.folders import appearing, write_json
from ditkit.checkpoints.files.formats import listed
from ditkit.checkpoints.files.text import read_json, some
from ditkit.checkpoints.files.writing import SHARD_BYTES, WANTED, total_bytes, write_pickle, write_set
from ditkit.checkpoints.kinds.configs import of_class
from ditkit.checkpoints.kinds.kind import side_of
from ditkit.checkpoints.model.find import locate, parts_of
from ditkit.checkpoints.model.fits import NATIVE_TOKENIZER
from ditkit.checkpoints.model.manifest import INDEX
from ditkit.checkpoints.model.part import EXPERTS, WITHOUT_WEIGHTS, ModelParts, Part, main_of
from ditkit.checkpoints.model.place import NOTES
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError, OutputError, SetupError, check_known
from ditkit.reading import file_at, folder_at

LAYOUTS = ("native", "diffusers")
BESIDE = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", ".gitattributes", "config.json", INDEX}
"""What stands beside a model and goes with it."""
Progress = Callable[[str, int, int], None]
"""Called after each tensor: what is being written, bytes of tensors written so far, bytes in all."""


@dataclass(frozen=True)
class Converted:
    """``files``: path below ``path`` -> size in bytes. ``types``: component -> what its tensors were and are.
    ``remarks``: what was not carried over, or is missing; sentences."""

    path: Path
    layout: str
    files: Mapping[str, int]
    types: Mapping[str, str]
    remarks: tuple[str, ...]


def convert(
    src: str | Path, dst: str | Path, layout: str, dtype: str | None = None, *, located: ModelParts | None = None,
    variant: str | None = None, shard_bytes: int = SHARD_BYTES, overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Converted:  # fmt: skip
    """Write the model, or the single component, in ``src`` to the folder ``dst``.

    ``layout``: ``native`` or ``diffusers``. ``dtype``: float32, float16 or bfloat16 for every tensor; None keeps the
    stored ones (quantised weights are written dequantised). ``located``: the model's parts, where a manifest says that
    they are from many places; None looks into ``src``. ``shard_bytes``: the most bytes of tensors in one
    safetensors file. ``overwrite``: a model in ``dst`` is replaced, when the new one is complete.
    Raises LoadError for what cannot be read, SetupError for unknown settings, OutputError for the target."""
    src, dst, asked = Path(os.path.expanduser(src)), Path(os.path.expanduser(dst)), "converting a model"
    check_known(layout, LAYOUTS, asked, f"there is no layout {layout!r}", SetupError)
    if dtype is not None:
        check_known(dtype, WANTED, asked, f"dtype is {dtype!r}", SetupError)
    if shard_bytes < 1:
        raise SetupError(asked, f"a shard of {shard_bytes} bytes was asked for", "Use a positive size")
    _check_target(src, dst, overwrite)
    located = parts_of(src, variant) if located is None else located
    for part in located.parts.values():
        _check_outside(part.path, src, dst)
    with appearing(dst) as folder:
        remarks = _write(located, layout, folder, dtype, shard_bytes, progress)
        _compare(located, layout, folder, dst)
        written = (file for file in sorted(folder.rglob("*")) if os.path.isfile(file))
        files = {str(file.relative_to(folder)): file.stat().st_size for file in written}
    return Converted(dst, layout, files, _types(located, dtype), tuple(remarks))


def _check_target(src: Path, dst: Path, overwrite: bool) -> None:
    asked = f"writing {dst}"
    _check_outside(src, src, dst)
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise OutputError(asked, "it exists already", "Choose another folder, or overwrite it (--overwrite)")
    if os.path.isfile(dst) or os.path.islink(dst):
        raise OutputError(asked, "it is no folder", "Choose a folder")
    try:
        there = locate(dst)
    except LoadError:
        if any(dst.iterdir()):
            do = "Remove it yourself, or choose another"
            raise OutputError(asked, "it is there and holds no model", do) from None
        return
    if others := sorted(set(os.listdir(dst)) - _own_names(there, dst) - BESIDE):
        found = f"it holds other things too ({some(others)}), which would be lost"
        raise OutputError(asked, found, "Move them, or choose another")


def _own_names(located: ModelParts, folder: Path) -> set[str]:
    """The entries of ``folder`` that its model consists of."""
    parts, folder = located.parts.values(), folder.absolute()
    files = [*(file for part in parts if part.source for file in part.source.files), *(part.path for part in parts)]
    files = [file.absolute() for file in files]
    inside = {file.relative_to(folder).parts[0] for file in files if file.is_relative_to(folder) and file != folder}
    return inside | (set(WITHOUT_WEIGHTS) if located.layout == "diffusers" else set())


def _check_outside(place: Path, src: Path, dst: Path) -> None:
    """What is read must not lie in what is replaced, unless the whole model takes its own place."""
    if os.path.exists(place) and place.resolve().is_relative_to(dst.resolve()) and src.resolve() != dst.resolve():
        found = f"it holds {place}, which would be replaced with it"
        raise OutputError(f"writing {dst}", found, "Choose another folder")


def _write(
    located: ModelParts, layout: str, folder: Path, dtype: str | None, limit: int, progress: Progress
) -> list[str]:
    """Write the parts, small files first, so that what a layout cannot say is told early. What is not carried over is
    returned as sentences. Raises LoadError for tensors that are unknown or missing."""
    one, remarks, weights, index = len(located.parts) == 1, list[str](), [], dict[str, list[str]]()
    for name, part in located.parts.items():
        place, own = folder if one else folder / _place(part, located, layout), part.row.written_as(layout)
        if part.source is None:
            index[name] = ["transformers", "T5TokenizerFast"]
            _copy_notes(part.path, place)
        elif own is None:
            remarks.append(f"{name} has no place in the layout {layout} and was left behind")
        else:
            form = part.row.layouts[own]
            remarks += [form.remark] if form.remark else []
            weights.append((name, place, form, _named(part, part.source, own)))
            if not form.pickle and (config := part.row.write_config(own, part.config)) is not None:
                write_json(place / "config.json", config)
                index[name] = [form.library, config.get("_class_name") or config["architectures"][0]]
    if not one:
        remarks += _write_index(located, index, folder) if layout == "diffusers" else []
        remarks += [f"incomplete: {problem.found}" for problem in located.problems]
    total, done = sum(total_bytes(source, dtype) for *_, source in weights), 0
    for name, place, form, source in weights:

        def wrote(tensor: str, size: int, name: str = name) -> None:
            nonlocal done
            done += size
            progress(name, done, total)

        place.mkdir(parents=True, exist_ok=True)
        if form.pickle:
            write_pickle(place / f"{form.file}.pth", source, dtype, wrote)
        else:
            write_set(place, form.file, source, dtype, limit, wrote)
    remarks += [f"{name} is no part and was left behind ({why})" for name, why in located.unused.items()]
    if folder_at(located.path) and file_at(Path(located.path) / "ditkit.toml"):
        remarks.append("ditkit.toml was left behind: write its defaults anew for the new folder")
    return remarks


def _place(part: Part, located: ModelParts, layout: str) -> Path:
    """The folder of one of several parts."""
    if layout == "diffusers":
        return Path(part.component)
    if part.kind == "tokenizer":
        return NATIVE_TOKENIZER
    two = "transformer_2" in located.parts
    return next((Path(name) for name, component in EXPERTS.items() if two and component == part.component), Path())


def _named(part: Part, source: TensorSource, layout: str) -> TensorSource:
    """The part's tensors under the names of ``layout``, all of them known and none of them missing."""
    row, side = part.row, side_of(layout)
    if row.keys is None:
        return source
    table = row.file_keys(part.config, layout) if row.file_keys else row.keys(part.config)
    mapped = Mapped(source, table, side, of=row.own).require_known()
    absent = table.by_name(side).keys() - mapped.tensors.keys()
    if absent and not row.optional_keys:
        found = f"{len(absent)} tensors are missing ({some(absent)})"
        raise LoadError(f"converting {part.path}", found, "Use whole weights")
    return mapped


def _copy_notes(folder: Path, place: Path) -> None:
    """A vocabulary and its settings; programs and pictures are never among them."""
    place.mkdir(parents=True, exist_ok=True)
    for file in listed(folder):
        if not os.path.isdir(file) and NOTES.fullmatch(file.name) and file_at(file):
            shutil.copy(file, place)


def _write_index(located: ModelParts, index: dict[str, list[str]], folder: Path) -> list[str]:
    """The index, and the components without weights: taken from a folder of diffusers, else written anew. ``index``:
    component -> library and class. Returns what is to be said of it."""
    main, task = main_of(located.parts), located.task
    if main is None or task is None or task not in main.row.tasks:
        return ["there is no transformer of a known task, so there is no model_index.json"]
    about = main.row.tasks[task]
    whole: dict[str, Any] = {name: [None, None] for name in about.optional} | of_class(about.pipeline) | index
    for part in located.parts.values():
        for name, (library, cls, file, content) in part.row.beside(part.config, task).items():
            own = Path(located.path) / name
            if located.layout == "diffusers" and folder_at(own):
                _copy_notes(own, folder / name)
                cls = read_json(own / file).get("_class_name", cls) if file_at(own / file) else cls
            else:
                write_json(folder / name / file, content)
            whole[name] = [library, cls]
    whole |= {} if located.boundary is None else {"boundary_ratio": located.boundary}
    write_json(folder / INDEX, whole | ({"expand_timesteps": True} if located.expand_timesteps else {}))
    return []


def _compare(located: ModelParts, layout: str, folder: Path, dst: Path) -> None:
    """Whether the written model says of itself what the first one says. Only headers are read."""
    asked, written = f"writing {dst} in the {layout} layout", locate(folder)
    do = "Use the layout of diffusers, which has a config for each component"
    for name, part in located.parts.items():
        if part.source is not None and part.row.written_as(layout) is None:
            continue
        if name not in written.parts:
            why = "; ".join(f"{file}: {reason}" for file, reason in written.unused.items())
            raise OutputError(asked, f"its {name} could not be opened again ({why or 'it was not found'})", do)
        again = written.parts[name]
        found = {**part.row.unsaid, **again.config}
        for key, value in {**part.row.unsaid, **part.config}.items():
            if found.get(key) != value:
                raise OutputError(asked, f"it has no place for {key} of the {name}, {value!r:.60}", do)
        if part.source and again.source and _shapes(part.source) != _shapes(again.source):
            raise OutputError(asked, f"the tensors of its {name} became others", "Report this as a bug")


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: tuple(facts.shape) for name, facts in source.tensors.items()}


def _types(located: ModelParts, dtype: str | None) -> dict[str, str]:
    types = {}
    for name, part in located.parts.items():
        if part.source is not None:
            stored = "/".join(sorted({facts.dtype for facts in part.source.tensors.values()}))
            was, now = part.quantization or stored, WANTED[dtype] if dtype else stored
            types[name] = was if was == now else f"{was} -> {now}"
    return types
