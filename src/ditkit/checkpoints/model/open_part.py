"""One component opened: a file or a folder in any layout. Only headers and configs are read.

Leaves out: which parts a model has (locate.py), and building modules.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.text import read_json, readable
from ditkit.checkpoints.kinds.detect import Detected, recognise
from ditkit.checkpoints.kinds.kind import KINDS, kind_of_config, kinds_of, side_of
from ditkit.checkpoints.model.part import Part, component_names
from ditkit.checkpoints.model.side_configs import check_tokenizer
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError, nearest


class Beside(NamedTuple):
    """The config.json beside some weights. ``own``: whether the folder is theirs alone."""

    file: Path
    config: dict[str, Any]
    own: bool


def open_part(
    path: str | Path,
    component: str | None = None,
    variant: str | None = None,
    *,
    entry: str | None = None,
    allow: Collection[str] = (),
) -> Part:
    """The component in ``path``, a file of weights or a folder with one set of them (or with a tokenizer).

    ``component``: what it must be; None takes what is found. ``variant`` and ``entry`` as for ``open_source``;
    ``allow``: rules of ``Kind.read_config``. A ``config.json`` beside the weights is used when it is theirs; in a
    folder of their own another one is an error. Raises LoadError."""
    path = Path(os.path.expanduser(path))
    with readable(f"opening {path}"):
        return opened(path, component, variant, entry, allow)


def opened(
    path: Path, component: str | None, variant: str | None = None, entry: str | None = None, rules: Collection[str] = ()
) -> Part:
    """``open_part`` within a look at a whole model."""
    if component == "tokenizer":
        return open_tokenizer(path, rules)
    if component is not None and component not in (known := component_names()):
        found = f"there is no such component{nearest(component, known)}"
        raise LoadError(f"opening {path} as {component!r}", found, f"Choose one of {', '.join(known)}")
    source = open_source(path, variant, entry)
    file = (path if path.is_dir() else source.path.parent) / "config.json"
    beside = Beside(file, read_json(file), path.is_dir()) if file.is_file() else None
    return _part(source, component, beside, rules)


def _part(source: TensorSource, component: str | None, beside: Beside | None, rules: Collection[str]) -> Part:
    asked = f"opening {source.path}" + (f" as {component}" if component else "")
    found, view = recognise(source)
    if found.kind not in KINDS or not KINDS[found.kind].components:
        raise LoadError(asked, found.problems[0] if found.problems else f"it is a {found.kind}", "Give a model's part")
    row = KINDS[found.kind]
    if component is not None and component not in row.components:
        names = " or ".join(kind.name for kind in kinds_of(component))
        raise LoadError(asked, f"its tensors are those of {found.kind}", f"Give {names}")
    if found.problems:
        raise LoadError(asked, found.problems[0], "Use a model of a supported kind")
    notes: list[str] = []
    config = _config(found, view, beside, rules, notes)
    if row.unsaid.keys() - config.keys() and not (beside and kind_of_config(beside.config)):
        what = " and ".join(sorted(row.unsaid.keys() - config.keys()))
        notes.insert(0, f"no config says {what}; the official ones are taken")
    return Part(
        component or row.components[0], found.kind, source.path, MappingProxyType(config),
        row.under_module_names(view, found.layout, config), found.layout, found.quantization, found,
        (*view.notes, *notes),
    )  # fmt: skip


def _config(
    found: Detected, view: TensorSource, beside: Beside | None, rules: Collection[str], notes: list[str]
) -> dict[str, Any]:
    row, layout, tensors = KINDS[found.kind], found.layout, view.tensors
    belongs = None if beside is None else kind_of_config(beside.config)
    if beside is None or (not beside.own and (belongs is None or belongs[0] != row.name)):
        return row.read_config(layout, None, tensors)
    try:
        if belongs is None or belongs[0] != row.name:
            said = beside.config.get("_class_name", beside.config.get("model_type"))
            wrong = f"it is of {said!r}" if said else "it says no class"
            asked = f"reading the config of {row.name} weights in the {layout} layout"
            raise LoadError(asked, wrong, "Use the config.json of these weights")
        if belongs[1] != layout and row.keys:  # native weights, the other's config
            layout = belongs[1]
            tensors = Mapped(view, row.keys(row.sizes(tensors, found.layout).guess), side_of(layout)).tensors
        return row.read_config(layout, beside.config, tensors, rules, notes)
    except LoadError as error:
        raise LoadError(f"{error.asked} ({beside.file})", error.found, error.do) from None


def open_tokenizer(folder: Path, rules: Collection[str]) -> Part:
    """Raises LoadError when there is no ``tokenizer.json``."""
    folder = folder.parent if folder.name == "tokenizer.json" else folder
    if not (folder / "tokenizer.json").is_file():
        only = "it has only spiece.model and no tokenizer.json"
        found = only if (folder / "spiece.model").is_file() else "there is no tokenizer.json"
        raise LoadError(f"opening the tokenizer in {folder}", found, KINDS["tokenizer"].get)
    notes: list[str] = []
    check_tokenizer(folder, rules, notes)
    return Part("tokenizer", "tokenizer", folder, MappingProxyType({}), None, "tokenizers", notes=tuple(notes))
