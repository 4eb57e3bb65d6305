"""From what a user names to the parts of a model: packaged models, folders, files, manifests, repositories, and single
parts that the user puts in the place of the model's own.

Leaves out: what a folder's layout means (parts.py), manifests (manifest.py) and downloads (hub.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.files.opening import split_entry
from ditkit.checkpoints.kinds.configs import STRICT, note_unknown
from ditkit.errors import LoadError, SetupError, nearest
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.locate import ModelParts, Scope
    from ditkit.checkpoints.model.manifest import Location, Manifest

ASSETS = Path(__file__).parents[2] / "assets"
MODELS = {"shapes": ASSETS / "shapes", "shapes-i2v": ASSETS / "shapes-i2v"}
"""Models that come with the package, by name."""


@dataclass(frozen=True)
class FoundModel:
    """``tables``: those of ``ditkit.toml`` that speak of requests, and ``file``, where they stand. ``processor``: the
    folder's own words on how pictures are prepared. ``verify``: for each part of a locked manifest, what raises
    LoadError unless its files are those that were locked."""

    located: ModelParts
    flow_shift: float | None
    tables: Mapping[str, Mapping[str, Any]]
    file: Path
    processor: Mapping[str, Any] | None = None
    verify: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def find(name: str, setup: Setup | None = None, scope: Scope | None = None) -> FoundModel:
    """The parts of the model ``name``, opened (headers only). ``setup`` says what stands in for single parts, which
    variant of a Diffusers folder, and whether the network may be used. ``scope``: which parts matter here; one that
    lies at a host is not fetched. Raises LoadError."""
    from ditkit.checkpoints.files.text import readable
    from ditkit.checkpoints.model.locate import WHOLE

    with readable(f"model {name!r:.200}"):
        return _find(name, setup or Setup(model=name), scope or WHOLE)


def at_host(address: str, about: Mapping[str, Any], setup: Setup, scope: Scope) -> FoundModel:
    """The model that a host speaks of; ``about`` as ``Model.describe`` gives it. Parts that ``setup`` names are opened
    here, the others are in ``scope``. Raises LoadError."""
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.locate import announced, open_part

    hub = Hub(offline=setup.offline)
    parts = {
        n: open_part(_place(w, hub, n), n, allow=_rules(setup)) for n, w in setup.components.items() if scope.opens(n)
    }
    located = announced(address, parts, {"boundary_ratio": about.get("boundary")}, scope)
    tables = {name: about[name] for name in ("defaults", "preview") if about.get(name)}
    return FoundModel(located, about.get("flow_shift"), tables, Path(address), about.get("processor"))


def _find(name: str, setup: Setup, scope: Scope) -> FoundModel:
    from ditkit.checkpoints.kinds.diffusers_folder import IMAGE_CLAIM
    from ditkit.checkpoints.model.hub import Hub, HubName
    from ditkit.checkpoints.model.locate import locate

    hub = Hub(offline=setup.offline)
    for rule in setup.allow:
        if rule != IMAGE_CLAIM:
            found = f"there is no such rule{nearest(rule, [IMAGE_CLAIM])}"
            raise SetupError(f"allow={rule!r}", found, f"There is {IMAGE_CLAIM}")
    instead = {part: _place(where, hub, part) for part, where in setup.components.items() if scope.opens(part)}
    if HubName.parse(name) is not None:
        return _from_manifest(_fetched(name, hub), setup, instead, hub, scope)
    path = _path(name)
    manifest = _manifest(path)
    if manifest is not None:
        return _from_manifest(manifest, setup, instead, hub, scope)
    return FoundModel(locate(path, setup.variant, allow=_rules(setup), instead=instead, scope=scope), None, {}, path)


def _rules(setup: Setup) -> tuple[str, ...]:
    return (*setup.allow, *([STRICT] if setup.strict_config else []))


def parts_of(path: Path, variant: str | None = None, *, verify: bool = False) -> ModelParts:
    """The parts in ``path``, for whoever looks at them without running them: also of one component, and of a model that
    is not whole. ``verify``: parts of a locked manifest are held against their hashes. Raises LoadError."""
    from ditkit.checkpoints.model.locate import locate, open_part
    from ditkit.checkpoints.model.manifest import INDEX, NAMES

    if path.suffix == ".toml" or any((path / name).is_file() for name in NAMES if name != INDEX):
        found = find(str(path), Setup(model=str(path), variant=variant))
        for check in found.verify.values() if verify else ():
            check()
        return found.located
    if variant is not None and not (path / INDEX).is_file():  # of a part's own folder
        return locate(open_part(path, None, variant).path)
    return locate(path, variant)


def _path(name: str) -> Path:
    place = os.path.expanduser(name)
    file = split_entry(Path(place))[0] if "\0" not in place else place
    if name not in MODELS and not (name and os.path.exists(file)):  # exists takes any text; Path.exists does not
        raise LoadError(
            f"model {name!r}",
            f"there is no folder, no file and no model of that name{nearest(name, MODELS)}",
            f"Give a folder or file of Wan weights, hf:OWNER/NAME, or one of {', '.join(MODELS)}",
        )
    return MODELS.get(name, Path(place).absolute())  # weights are read later, maybe from another working folder


def _place(where: str, hub: Hub, component: str) -> Path:
    """A part that the user names: a path, or a place in a repository."""
    from ditkit.checkpoints.model.hub import HubName
    from ditkit.checkpoints.model.manifest import place_of

    if HubName.parse(where) is not None:
        return place_of(component, where).pin(hub).resolve(hub)
    path = Path(os.path.expanduser(where)).absolute()
    if not split_entry(path)[0].exists():
        raise LoadError(f"{component}={where}", "there is nothing of that name", "Check the path")
    return path


def _fetched(name: str, hub: Hub) -> Manifest:
    from ditkit.checkpoints.model.manifest import Manifest

    return Manifest.fetch(name, hub)


def _manifest(path: Path) -> Manifest | None:
    """The manifest that ``path`` is or holds, if any."""
    from ditkit.checkpoints.model.manifest import NAMES, Manifest

    if path.is_dir():
        return Manifest.open(path) if any((path / name).is_file() for name in NAMES) else None
    return Manifest.open(path) if path.suffix == ".toml" or path.name in NAMES else None


def _from_manifest(manifest: Manifest, setup: Setup, instead: Mapping[str, Path], hub: Hub, scope: Scope) -> FoundModel:
    from ditkit.checkpoints.model import lock
    from ditkit.checkpoints.model.locate import WITHOUT_WEIGHTS, assemble, locate
    from ditkit.checkpoints.model.manifest import INDEX, KNOWN, MODULAR
    from ditkit.checkpoints.model.side_configs import flow_shift, processor_config

    folder = manifest.folder
    indexed = any((folder / one).is_file() for one in (INDEX, MODULAR))
    named = {name: place for name, place in manifest.components.items() if name not in instead}
    weights = [name for name in named if name not in WITHOUT_WEIGHTS]
    wanted = [name for name in weights if scope.opens(name) and not (name in scope.elsewhere and named[name].afar)]
    there = [name for name in wanted if not (indexed and _missing(named[name]))]  # the model says what it lacks
    places = {name: named[name].resolve(hub) for name in there}
    variants = {name: named[name].variant or setup.variant for name in places}
    spare = scope.only is not None  # a host has what its stages need
    beside = {
        name: named[name].resolve(hub)
        for name in ("scheduler", "image_processor")
        if name in named and not (spare and _missing(named[name]))
    }
    for name, place in beside.items():  # small files, read now
        if named[name].sha256:
            lock.verify(named[name], place)
    verify = {name: partial(lock.verify, named[name], place) for name, place in places.items() if named[name].sha256}
    rules, notes = _rules(setup), list[str]()
    asked = f"reading {manifest.index}"
    notes += note_unknown(asked, manifest.index.name if manifest.index else "", manifest.unknown, KNOWN, rules)
    shift = flow_shift(beside["scheduler"], rules, notes) if "scheduler" in beside else None
    processor = processor_config(beside["image_processor"], rules, notes) if "image_processor" in beside else None
    others, values = {**places, **instead}, manifest.values
    if indexed:
        located = assemble(folder, "diffusers", others, values, variants, rules, weights, scope, notes)
    else:
        variant = None if places else setup.variant
        located = locate(folder, variant, allow=rules, instead=others, values=values, scope=scope, notes=notes)
    return FoundModel(located, shift, manifest.tables, manifest.file or folder, processor, verify)


def _missing(place: Location) -> bool:
    """A component that an index names in its usual place, and whose folder is not there. Of a locked one the files are
    named, so their place has to be right."""
    beside = place.path is not None and place.names is None and place.written == f"./{place.component}"
    return beside and place.path is not None and not (place.path / place.subfolder / (place.file or "")).exists()
