"""A model written in the other layout, or in the same one with another type or in other shards.

What is written appears whole or not at all, after it has been opened again and held against what it was made from: a
layout that cannot say something (the native one has no configs but the transformers') is an error, not a loss.
Leaves out: what is written where (plan.py), and how tensors get into files (writing.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ditkit.checkpoints.convert.folders import appearing, write_json
from ditkit.checkpoints.convert.plan import LAYOUTS, Plan, plan
from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.files.writing import SHARD_BYTES, WANTED, total_bytes, write_pickle, write_set
from ditkit.checkpoints.model.find import parts_of
from ditkit.checkpoints.model.locate import locate
from ditkit.checkpoints.model.manifest import INDEX
from ditkit.checkpoints.model.part import WITHOUT_WEIGHTS, ModelParts, Part
from ditkit.errors import LoadError, OutputError, SetupError, nearest

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
    src: str | Path,
    dst: str | Path,
    layout: str,
    dtype: str | None = None,
    *,
    located: ModelParts | None = None,
    variant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Converted:
    """Write the model, or the single component, in ``src`` to the folder ``dst``.

    ``layout``: ``native`` or ``diffusers``. ``dtype``: float32, float16 or bfloat16 for every tensor; None keeps the
    stored ones (quantised weights are written dequantised). ``located``: the model's parts, where a manifest says that
    they are from many places; None looks into ``src``. ``shard_bytes``: the most bytes of tensors in one
    safetensors file. ``overwrite``: a model in ``dst`` is replaced, when the new one is complete.
    Raises LoadError for what cannot be read, SetupError for unknown settings, OutputError for the target."""
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    _check(layout, dtype, shard_bytes)
    _check_target(src, dst, overwrite)
    located = parts_of(src, variant) if located is None else located
    for part in located.parts.values():
        _check_outside(part.path, src, dst)
    made = plan(located, layout)
    with appearing(dst) as folder:
        _write(made, folder, dtype, shard_bytes, progress)
        _compare(located, layout, folder, dst)
        files = {
            str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
        }
    return Converted(dst, layout, files, _types(located, dtype), tuple(made.remarks))


def _check(layout: str, dtype: str | None, shard_bytes: int) -> None:
    asked = "converting a model"
    if layout not in LAYOUTS:
        found = f"there is no layout {layout!r}{nearest(layout, LAYOUTS)}"
        raise SetupError(asked, found, f"Use {' or '.join(LAYOUTS)}")
    if dtype is not None and dtype not in WANTED:
        raise SetupError(asked, f"dtype is {dtype!r}{nearest(dtype, WANTED)}", f"Use one of {', '.join(WANTED)}")
    if shard_bytes < 1:
        raise SetupError(asked, f"a shard of {shard_bytes} bytes was asked for", "Use a positive size")


def _check_target(src: Path, dst: Path, overwrite: bool) -> None:
    asked = f"writing {dst}"
    _check_outside(src, src, dst)
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise OutputError(asked, "it exists already", "Choose another folder, or overwrite it (--overwrite)")
    if dst.is_file() or dst.is_symlink():
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


BESIDE = frozenset({"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", ".gitattributes", "config.json", INDEX})
"""What stands beside a model and goes with it."""


def _own_names(located: ModelParts, folder: Path) -> set[str]:
    """The entries of ``folder`` that its model consists of."""
    parts = located.parts.values()
    files = [*(file for part in parts if part.source for file in part.source.files), *(part.path for part in parts)]
    inside = {file.relative_to(folder).parts[0] for file in files if file.is_relative_to(folder) and file != folder}
    return inside | (set(WITHOUT_WEIGHTS) if located.layout == "diffusers" else set())


def _check_outside(place: Path, src: Path, dst: Path) -> None:
    """What is read must not lie in what is replaced, unless the whole model takes its own place."""
    if place.exists() and place.resolve().is_relative_to(dst.resolve()) and src.resolve() != dst.resolve():
        found = f"it holds {place}, which would be replaced with it"
        raise OutputError(f"writing {dst}", found, "Choose another folder")


def _write(made: Plan, folder: Path, dtype: str | None, limit: int, progress: Progress) -> None:
    for place, files in made.copies.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder / place)
    for place, content in made.json.items():
        write_json(folder / place, content)
    total, done = sum(total_bytes(weights.source, dtype) for weights in made.weights), 0
    for weights in made.weights:

        def wrote(name: str, size: int, component: str = weights.component) -> None:
            nonlocal done
            done += size
            progress(component, done, total)

        (folder / weights.folder).mkdir(parents=True, exist_ok=True)
        if weights.pickle:
            write_pickle(folder / weights.folder / f"{weights.base}.pth", weights.source, dtype, wrote)
        else:
            write_set(folder / weights.folder, weights.base, weights.source, dtype, limit, wrote)


def _compare(located: ModelParts, layout: str, folder: Path, dst: Path) -> None:
    """Whether the written model says of itself what the first one says. Only headers are read."""
    asked = f"writing {dst} in the {layout} layout"
    do = "Use the layout of diffusers, which has a config for each component"
    written = locate(folder)
    for name, part in located.parts.items():
        if part.source is not None and part.row.written_as(layout) is None:
            continue
        if name not in written.parts:
            why = "; ".join(f"{file}: {reason}" for file, reason in written.unused.items())
            raise OutputError(asked, f"its {name} could not be opened again ({why or 'it was not found'})", do)
        found = {**part.row.unsaid, **written.parts[name].config}
        for key, value in {**part.row.unsaid, **part.config}.items():
            if found.get(key) != value:
                raise OutputError(asked, f"it has no place for {key} of the {name}, {_shown(value)}", do)
        _same_tensors(part, written.parts[name], asked)


def _same_tensors(part: Part, written: Part, asked: str) -> None:
    if part.source is None or written.source is None:
        return
    first = {name: tuple(facts.shape) for name, facts in part.source.tensors.items()}
    second = {name: tuple(facts.shape) for name, facts in written.source.tensors.items()}
    if first != second:
        raise OutputError(asked, f"the tensors of its {part.component} became others", "Report this as a bug")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _types(located: ModelParts, dtype: str | None) -> dict[str, str]:
    types = {}
    for name, part in located.parts.items():
        if part.source is not None:
            stored = "/".join(sorted({facts.dtype for facts in part.source.tensors.values()}))
            was = part.quantization or stored
            now = WANTED[dtype] if dtype else stored
            types[name] = was if was == now else f"{was} -> {now}"
    return types
