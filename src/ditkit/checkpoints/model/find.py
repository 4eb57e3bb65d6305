"""From what a user names to the parts of a model, opened but not read: packaged models, folders, files, manifests,
repositories, and single parts that the user puts in the place of the model's own.

In a folder of diffusers and by a manifest parts are told by the names in there, in a native folder by what its files
hold; a single file is that file alone. What is missing or does not fit is in ``ModelParts.problems`` (fits.py). Leaves
out: manifests (manifest.py), downloads (hub.py) and LoRAs."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ditkit.checkpoints.files.formats import SHARD, add_index, split_entry, weight_files
from ditkit.checkpoints.files.text import readable, some
from ditkit.checkpoints.kinds.configs import STRICT, Rules
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.model import lock
from ditkit.checkpoints.model.fits import NATIVE_TOKENIZER, model_parts
from ditkit.checkpoints.model.hub import Hub, HubName
from ditkit.checkpoints.model.manifest import INDEX, MODULAR, Manifest
from ditkit.checkpoints.model.open_part import (
    flow_shift,
    open_part,
    open_tokenizer,
    opened,
    opened_all,
    processor_config,
)
from ditkit.checkpoints.model.part import EXPERTS, SIDE, WITHOUT_WEIGHTS, ModelParts, Options, Part, Scope, main_of
from ditkit.checkpoints.model.place import place_of
from ditkit.errors import LoadError, SetupError, check_known, nearest
from ditkit.reading import check_path, file_at, folder_at
from ditkit.setup import Setup

ASSETS = Path(__file__).parents[2] / "assets"
MODELS = {"shapes": ASSETS / "shapes", "shapes-i2v": ASSETS / "shapes-i2v"}
"""Models that come with the package, by name."""


def find(name: str, setup: Setup | None = None, scope: Scope | None = None) -> ModelParts:
    """The parts of the model ``name``, opened (headers only). ``setup`` says what stands in for single parts, which
    variant of a Diffusers folder, and whether the network may be used. ``scope``: which parts matter here; one that
    lies at a host is not fetched. Raises LoadError."""
    with readable(f"model {name!r:.200}"):
        how, hub = _options(setup or Setup(model=name), scope or Scope())
        if HubName.parse(name) is not None:
            return _of_manifest(Manifest.fetch(name, hub), how, hub)
        path = _path(name)
        return _of_manifest(Manifest.open(path), how, hub) if Manifest.at(path) else _located(path, how)


def at_host(address: str, about: Mapping[str, Any], setup: Setup, scope: Scope) -> ModelParts:
    """The model that a host speaks of; ``about`` as ``Model.describe`` gives it. Parts that ``setup`` names are opened
    here, the others are in ``scope``. Raises LoadError."""
    how, _ = _options(setup, scope)
    parts = {name: open_part(place, name, allow=how.rules) for name, place in how.instead.items()}
    located = model_parts(address, "host", parts, {"boundary_ratio": about.get("boundary")}, scope=scope)
    tables = {name: about[name] for name in ("defaults", "preview") if about.get(name)}
    shift, processor = about.get("flow_shift"), about.get("processor")
    return replace(located, flow_shift=shift, tables=tables, file=Path(address), processor=processor)


def parts_of(path: Path, variant: str | None = None, *, verify: bool = False) -> ModelParts:
    """The parts in ``path``, for whoever looks at them without running them: also of one component, and of a model that
    is not whole. ``verify``: parts of a locked manifest are held against their hashes. Raises LoadError."""
    if Manifest.at(path) not in (None, INDEX):
        found = find(str(path), Setup(model=str(path), variant=variant))
        for check in found.verify.values() if verify else ():
            check()
        return found
    if variant is not None and not file_at(path / INDEX):  # of a part's own folder
        return locate(open_part(path, None, variant).path)
    return locate(path, variant)


def locate(
    path: str | Path, variant: str | None = None, *, instead: Mapping[str, Path] = {}, allow: Rules = ()
) -> ModelParts:
    """All parts of the model in ``path``: a folder of diffusers, a native one, or one file of weights; the others as in
    ``Options``. Raises LoadError when nothing can be opened, or when two files are the same part; whatever keeps the
    parts from running is in ``problems``."""
    path = Path(os.path.expanduser(path))
    with readable(f"opening the model in {path}"):
        return _located(path, Options(variant, instead, allow))


def _options(setup: Setup, scope: Scope) -> tuple[Options, Hub]:
    hub, known = (
        Hub(offline=setup.offline, plain_http=setup.plain_http),
        [rule for kind in KINDS.values() for rule in kind.claims],
    )
    for rule in setup.allow:
        check_known(rule, known, f"allow={rule!r}", "there is no such rule", SetupError)
    instead = {part: _place(where, hub, part) for part, where in setup.components.items() if scope.opens(part)}
    return Options(setup.variant, instead, (*setup.allow, *([STRICT] if setup.strict_config else [])), scope), hub


def _path(name: str) -> Path:
    check_path(name, f"model {name!r:.200}")
    place = os.path.expanduser(name)
    file = split_entry(Path(place))[0] if "\0" not in place else place
    if name not in MODELS and not (name and os.path.exists(file)):  # exists takes any text; Path.exists does not
        found = f"there is no folder, no file and no model of that name{nearest(name, MODELS)}"
        do = f"Give a folder or file of Wan weights, hf:OWNER/NAME, or one of {', '.join(MODELS)}"
        raise LoadError(f"model {name!r}", found, do)
    return MODELS.get(name, Path(place).absolute())  # weights are read later, maybe from another working folder


def _place(where: str, hub: Hub, component: str) -> Path:
    """A part that the user names: a path, or a place in a repository."""
    if HubName.parse(where) is not None:
        return place_of(component, where).pin(hub).resolve(hub)
    check_path(where, f"{component}={where!r:.200}")
    path = Path(os.path.expanduser(where)).absolute()
    if not os.path.exists(split_entry(path)[0]):
        raise LoadError(f"{component}={where}", "there is nothing of that name", "Check the path")
    return path


def _of_manifest(manifest: Manifest, how: Options, hub: Hub) -> ModelParts:
    """The model of a manifest, or of an index of diffusers. Raises LoadError."""
    folder, scope = manifest.folder, how.scope
    indexed = any(file_at(folder / one) for one in (INDEX, MODULAR))
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
    notes = manifest.notes(how.rules)
    shift = flow_shift(beside["scheduler"], how.rules, notes) if "scheduler" in beside else None
    processor = processor_config(beside["image_processor"], how.rules, notes) if "image_processor" in beside else None
    within = {**places, **how.instead}
    if indexed:
        parts = _opened(within, {name: named[name].variant or how.variant for name in places}, how)
        promised = [*weights, *(name for name in SIDE if name in lacks)]
        located = model_parts(folder, "diffusers", parts, manifest.values, promised=promised, scope=scope)
    else:
        inner = replace(how, variant=None if places else how.variant, instead=within)
        located = _located(folder, inner, manifest.values)
    parts = dict(located.parts)
    if notes and (main := main_of(parts) or next(iter(parts.values()), None)):  # those on the whole go with it
        parts[main.component] = replace(main, notes=(*main.notes, *notes))
    return replace(
        located, parts=parts, flow_shift=shift, tables=manifest.tables, file=manifest.file or folder,
        processor=processor, verify=pinned,
    )  # fmt: skip


def _located(path: Path, how: Options, values: Mapping[str, Any] = {}) -> ModelParts:
    """``values``: ``boundary_ratio``, ``expand_timesteps``, where no index gives them."""
    asked, scope = f"opening the model in {path}", how.scope
    path, entry = split_entry(path)
    folder = folder_at(path, asked)
    if not folder and not file_at(path, asked):
        raise LoadError(asked, "there is no such file or folder", "Check the path")
    if folder and file_at(path / INDEX, asked):
        return _of_manifest(Manifest.open(path / INDEX, lock=False), how, Hub(offline=True))
    if folder and file_at(path / MODULAR, asked):
        found = f"it has only {MODULAR}, which names parts in other places"
        raise LoadError(asked, found, "Open it as a manifest")
    if own := {
        name: path / name for name in scope.only or () if folder_at(path / name, asked)
    }:  # some of a Diffusers model
        parts = _opened({**own, **how.instead}, dict.fromkeys(own, how.variant), how)
        return model_parts(path, "diffusers", parts, values, scope=scope)
    if how.variant is not None:
        raise LoadError(asked, f"variant {how.variant!r} was given and it has no model_index.json", "Leave it out")
    others = _opened(how.instead, {}, how)
    if not folder:
        there, faults = opened_all(path, None, None, entry, how.rules)
        return model_parts(path, "file", {**_named(there, asked), **others}, values, faults, scope=scope)
    parts, unused = _native(path, others, how)
    return model_parts(path, "native", parts, values, unused, scope=scope)


def _opened(places: Mapping[str, Path], variants: Mapping[str, str | None], how: Options) -> dict[str, Part]:
    return {
        name: opened(place, name, variants.get(name), None, how.rules)
        for name, place in places.items()
        if name not in WITHOUT_WEIGHTS and how.scope.opens(name)
    }


def _named(parts: list[Part], asked: str) -> dict[str, Part]:
    """The parts of one file, by component. Raises LoadError where two would be the same."""
    named: dict[str, Part] = {}
    for part in parts:
        if (first := named.setdefault(part.component, part)) is not part:
            told = some(one.detected.prefix for one in (first, part) if one.detected)
            do = "Name one of them by its prefix: FILE#PREFIX"
            raise LoadError(asked, f"it holds two networks for the {part.component}, under {told}", do)
    return named


def _native(folder: Path, others: Mapping[str, Part], how: Options) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a native folder, weights beside one another and two experts in folders of their own, with
    ``others`` in their places; and the files that are none."""
    parts, unused, scope, asked = dict(others), {}, how.scope, f"opening the model in {folder}"
    experts = [name for name, part in EXPERTS.items() if part not in others and folder_at(folder / name, asked)]
    for name in experts:
        if scope.opens(EXPERTS[name]):
            parts[EXPERTS[name]] = opened(folder / name, EXPERTS[name], rules=how.rules)
    indices, loose = weight_files(folder)
    found: list[tuple[Path, Part]] = []
    safe = {file.stem for file in loose if file.suffix == ".safetensors"}  # of two that differ in their ending only
    for file in [*indices, *(one for one in loose if one.suffix == ".safetensors" or one.stem not in safe)]:
        if SHARD.search(file.name) and file not in indices:
            unused[file.name] = f"it is a shard that no index names. {add_index(file.name)}"
            continue
        try:
            there, faults = opened_all(file, None, rules=how.rules)
            found += [(file, part) for part in _named(there, asked).values()]
            unused |= faults
        except LoadError as error:
            unused[file.name] = error.found
    for file, part in found:
        name = part.component
        if not scope.opens(name):
            unused[file.name] = f"the {name} is not used here"
        elif name in others:
            unused[file.name] = f"another {name} stands in for it"
        elif name == "transformer" and experts:
            both = f"it has the transformer {file.name} and another one in {experts[0]}"
            raise LoadError(asked, both, "Leave one of them, or name both in a manifest if they are two experts")
        elif name in parts:
            both = f"both {parts[name].path.name} and {file.name} are its {name}"
            raise LoadError(asked, both, "Leave one of them, or name one in a manifest")
        else:
            parts[name] = part
    tokenizer = folder / NATIVE_TOKENIZER
    if "tokenizer" not in parts and scope.opens("tokenizer") and file_at(tokenizer / "tokenizer.json", asked):
        parts["tokenizer"] = open_tokenizer(tokenizer, how.rules)
    if not parts:
        why = f" ({some(f'{name}: {reason}' for name, reason in unused.items())})" if unused else ""
        raise LoadError(asked, f"it holds no part of a model{why}", "Check the path")
    return parts, unused
