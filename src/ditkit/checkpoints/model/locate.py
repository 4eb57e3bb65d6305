"""All parts of a model on disk, opened but not read: in a folder of diffusers and by a manifest by the names in there,
in a native folder by what its files hold, for a single file that file alone.

What is missing or does not fit is in ``ModelParts.problems`` (fits.py). Only headers and small configs are read.
Leaves out: names of models and repositories (find.py), building modules, and LoRAs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.files.formats import INDEX as SHARD_INDEX
from ditkit.checkpoints.files.formats import OTHERS, read_shards
from ditkit.checkpoints.files.opening import split_entry
from ditkit.checkpoints.files.text import readable, some
from ditkit.checkpoints.kinds.configs import note_unknown
from ditkit.checkpoints.model import lock
from ditkit.checkpoints.model.fits import NATIVE_TOKENIZER, model_parts
from ditkit.checkpoints.model.hub import Hub
from ditkit.checkpoints.model.manifest import INDEX, INDEX_NOTES, MODULAR, Manifest
from ditkit.checkpoints.model.open_part import open_tokenizer, opened
from ditkit.checkpoints.model.part import (
    EXPERTS,
    WHOLE,
    WITHOUT_WEIGHTS,
    FoundModel,
    ModelParts,
    Options,
    Part,
    Scope,
    component_names,
)
from ditkit.checkpoints.model.side_configs import flow_shift, processor_config
from ditkit.errors import LoadError

NOTHING: Mapping[str, Any] = MappingProxyType({})


def locate(
    path: str | Path,
    variant: str | None = None,
    *,
    instead: Mapping[str, Path] = NOTHING,
    values: Mapping[str, Any] = NOTHING,
    allow: Collection[str] = (),
    scope: Scope = WHOLE,
) -> ModelParts:
    """All parts of the model in ``path``: a folder of diffusers, a native one, or one file of weights.

    ``values``: ``boundary_ratio``, ``expand_timesteps``, where no index gives them; the others: see ``Options``.
    Raises LoadError when nothing can be opened, or when two files are the same part; whatever keeps the parts from
    running is in ``problems``."""
    path = Path(os.path.expanduser(path))
    with readable(f"opening the model in {path}"):
        return _locate(path, Options(variant, instead, allow, scope), values)


def _locate(path: Path, how: Options, values: Mapping[str, Any], notes: Collection[str] = ()) -> ModelParts:
    asked, scope = f"opening the model in {path}", how.scope
    path, entry = split_entry(path)
    if not path.exists():
        raise LoadError(asked, "there is no such file or folder", "Check the path")
    if not path.is_dir() and not path.is_file():
        raise LoadError(asked, "it is neither a file nor a folder", "Check the path")
    if (path / INDEX).is_file():
        return from_manifest(Manifest.open(path / INDEX, lock=False), how, Hub(offline=True)).located
    if (path / MODULAR).is_file():
        found = f"it has only {MODULAR}, which names parts in other places"
        raise LoadError(asked, found, "Open it as a manifest")
    if own := {name: path / name for name in scope.only or () if (path / name).is_dir()}:  # some of a Diffusers model
        places = {**own, **how.instead}
        return model_parts(
            path, "diffusers", _opened(places, dict.fromkeys(own, how.variant), how), values, scope=scope
        )
    if how.variant is not None:
        raise LoadError(asked, f"variant {how.variant!r} was given and it has no model_index.json", "Leave it out")
    others = _opened(how.instead, {}, how)
    if path.is_file():
        part = opened(path, None, None, entry, how.rules)
        return model_parts(path, "file", _noted({part.component: part, **others}, notes), values, scope=scope)
    parts, unused = _native(path, others, how.rules, scope)
    return model_parts(path, "native", _noted(parts, notes), values, unused, scope=scope)


def from_manifest(manifest: Manifest, how: Options, hub: Hub) -> FoundModel:
    """The model of a manifest, or of an index of diffusers. Raises LoadError."""
    folder, scope = manifest.folder, how.scope
    indexed = any((folder / one).is_file() for one in (INDEX, MODULAR))
    named = {name: place for name, place in manifest.components.items() if name not in how.instead}
    lacks = {name for name, place in named.items() if indexed and place.absent}  # the model says what it lacks
    weights = [name for name in named if name not in WITHOUT_WEIGHTS]
    wanted = [name for name in weights if scope.opens(name) and not (name in scope.elsewhere and named[name].afar)]
    places = {name: named[name].resolve(hub) for name in wanted if name not in lacks}
    beside = {name: named[name].resolve(hub) for name in SIDE if name in named and name not in lacks}
    pinned = {name: partial(lock.verify, named[name], at) for name, at in {**places, **beside}.items()
              if named[name].sha256}  # fmt: skip
    for name in beside.keys() & pinned.keys():  # small files, read now
        pinned.pop(name)()
    index = manifest.index.name if manifest.index else ""
    known = (*component_names(), *WITHOUT_WEIGHTS, *INDEX_NOTES)
    notes = [*note_unknown(f"reading {manifest.index}", index, manifest.unknown, known, how.rules)]
    shift = flow_shift(beside["scheduler"], how.rules, notes) if "scheduler" in beside else None
    processor = processor_config(beside["image_processor"], how.rules, notes) if "image_processor" in beside else None
    variants = {name: named[name].variant or how.variant for name in places}
    if indexed:
        parts = _noted(_opened({**places, **how.instead}, variants, how), notes)
        promised = [*weights, *(name for name in SIDE if name in lacks)]
        located = model_parts(folder, "diffusers", parts, manifest.values, promised=promised, scope=scope)
    else:
        inner = replace(how, variant=None if places else how.variant, instead={**places, **how.instead})
        located = _locate(folder, inner, manifest.values, notes)
    return FoundModel(located, shift, manifest.tables, manifest.file or folder, processor, pinned)


SIDE = ("scheduler", "image_processor")
"""Components without weights whose configs are read."""


def _opened(places: Mapping[str, Path], variants: Mapping[str, str | None], how: Options) -> dict[str, Part]:
    return {
        name: opened(place, name, variants.get(name), None, how.rules)
        for name, place in places.items()
        if name not in WITHOUT_WEIGHTS and how.scope.opens(name)
    }


def _noted(parts: dict[str, Part], notes: Collection[str]) -> dict[str, Part]:
    """``notes`` on the whole model go with its main part."""
    if notes and parts:
        name = next((name for name in EXPERTS.values() if name in parts), next(iter(parts)))
        parts[name] = replace(parts[name], notes=(*parts[name].notes, *notes))
    return parts


def _native(
    folder: Path, others: Mapping[str, Part], rules: Collection[str], scope: Scope
) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a native folder, weights beside one another and two experts in folders of their own, with
    ``others`` in their places; and the files that are none."""
    parts, unused = dict(others), {}
    asked = f"opening the model in {folder}"
    experts = [name for name, part in EXPERTS.items() if part not in others and (folder / name).is_dir()]
    for name in experts:
        if scope.opens(EXPERTS[name]):
            parts[EXPERTS[name]] = opened(folder / name, EXPERTS[name], rules=rules)
    for file in weight_files(folder):
        try:
            part = opened(file, None, rules=rules)
        except LoadError as error:
            unused[file.name] = error.found
            continue
        name = part.component
        if not scope.opens(name):
            unused[file.name] = f"the {name} is not used here"
        elif name in others:
            unused[file.name] = f"another {name} stands in for it"
        elif name == "transformer" and experts:
            found = f"it has the transformer {file.name} and another one in {experts[0]}"
            raise LoadError(asked, found, "Leave one of them, or name both in a manifest if they are two experts")
        elif name in parts:
            found = f"both {parts[name].path.name} and {file.name} are its {name}"
            raise LoadError(asked, found, "Leave one of them, or name one in a manifest")
        else:
            parts[name] = part
    tokenizer = folder / NATIVE_TOKENIZER
    if "tokenizer" not in parts and scope.opens("tokenizer") and (tokenizer / "tokenizer.json").is_file():
        parts["tokenizer"] = open_tokenizer(tokenizer, rules)
    if not parts:
        why = f" ({some(f'{name}: {reason}' for name, reason in unused.items())})" if unused else ""
        raise LoadError(asked, f"it holds no part of a model{why}", "Check the path")
    return parts, unused


def weight_files(folder: Path) -> list[Path]:
    """The sets of weights in ``folder``: indices, and files that none of them names. Of two files that differ in their
    ending only, the safetensors one."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indices = [file for file in files if SHARD_INDEX.fullmatch(file.name)]
    claimed = {shard for index in indices for shard in read_shards(index).values()}
    loose = [file for file in files if file.suffix in (".safetensors", *OTHERS) and file.name not in claimed]
    safe = {file.stem for file in loose if file.suffix == ".safetensors"}
    return indices + [file for file in loose if file.suffix == ".safetensors" or file.stem not in safe]
