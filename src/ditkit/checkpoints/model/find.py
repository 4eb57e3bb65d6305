"""From what a user names to the parts of a model: packaged models, folders, files, manifests, repositories, and single
parts that the user puts in the place of the model's own.

Leaves out: what a folder's layout means (locate.py), manifests (manifest.py) and downloads (hub.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.errors import LoadError, SetupError, nearest
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.part import FoundModel, ModelParts, Options, Scope

ASSETS = Path(__file__).parents[2] / "assets"
MODELS = {"shapes": ASSETS / "shapes", "shapes-i2v": ASSETS / "shapes-i2v"}
"""Models that come with the package, by name."""


def find(name: str, setup: Setup | None = None, scope: Scope | None = None) -> FoundModel:
    """The parts of the model ``name``, opened (headers only). ``setup`` says what stands in for single parts, which
    variant of a Diffusers folder, and whether the network may be used. ``scope``: which parts matter here; one that
    lies at a host is not fetched. Raises LoadError."""
    from ditkit.checkpoints.files.text import readable
    from ditkit.checkpoints.model.hub import HubName
    from ditkit.checkpoints.model.locate import from_manifest, locate
    from ditkit.checkpoints.model.manifest import Manifest
    from ditkit.checkpoints.model.part import FoundModel

    with readable(f"model {name!r:.200}"):
        how, hub = _options(setup or Setup(model=name), scope)
        if HubName.parse(name) is not None:
            return from_manifest(Manifest.fetch(name, hub), how, hub)
        path = _path(name)
        if Manifest.at(path):
            return from_manifest(Manifest.open(path), how, hub)
        located = locate(path, how.variant, instead=how.instead, allow=how.rules, scope=how.scope)
        return FoundModel(located, None, {}, path)


def at_host(address: str, about: Mapping[str, Any], setup: Setup, scope: Scope) -> FoundModel:
    """The model that a host speaks of; ``about`` as ``Model.describe`` gives it. Parts that ``setup`` names are opened
    here, the others are in ``scope``. Raises LoadError."""
    from ditkit.checkpoints.model.fits import model_parts
    from ditkit.checkpoints.model.open_part import open_part
    from ditkit.checkpoints.model.part import FoundModel

    how, _ = _options(setup, scope)
    parts = {name: open_part(place, name, allow=how.rules) for name, place in how.instead.items()}
    located = model_parts(address, "host", parts, {"boundary_ratio": about.get("boundary")}, scope=scope)
    tables = {name: about[name] for name in ("defaults", "preview") if about.get(name)}
    return FoundModel(located, about.get("flow_shift"), tables, Path(address), about.get("processor"))


def parts_of(path: Path, variant: str | None = None, *, verify: bool = False) -> ModelParts:
    """The parts in ``path``, for whoever looks at them without running them: also of one component, and of a model that
    is not whole. ``verify``: parts of a locked manifest are held against their hashes. Raises LoadError."""
    from ditkit.checkpoints.model.locate import locate
    from ditkit.checkpoints.model.manifest import INDEX, Manifest
    from ditkit.checkpoints.model.open_part import open_part

    if Manifest.at(path) not in (None, INDEX):
        found = find(str(path), Setup(model=str(path), variant=variant))
        for check in found.verify.values() if verify else ():
            check()
        return found.located
    if variant is not None and not (path / INDEX).is_file():  # of a part's own folder
        return locate(open_part(path, None, variant).path)
    return locate(path, variant)


def _options(setup: Setup, scope: Scope | None) -> tuple[Options, Hub]:
    from ditkit.checkpoints.kinds.configs import STRICT
    from ditkit.checkpoints.kinds.kind import KINDS
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.part import WHOLE, Options

    hub, scope = Hub(offline=setup.offline), scope or WHOLE
    known = [rule for kind in KINDS.values() for rule in kind.claims]
    for rule in setup.allow:
        if rule not in known:
            found = f"there is no such rule{nearest(rule, known)}"
            raise SetupError(f"allow={rule!r}", found, f"There is {', '.join(known)}")
    instead = {part: _place(where, hub, part) for part, where in setup.components.items() if scope.opens(part)}
    return Options(setup.variant, instead, (*setup.allow, *([STRICT] if setup.strict_config else [])), scope), hub


def _path(name: str) -> Path:
    from ditkit.checkpoints.files.opening import split_entry

    place = os.path.expanduser(name)
    file = split_entry(Path(place))[0] if "\0" not in place else place
    if name not in MODELS and not (name and os.path.exists(file)):  # exists takes any text; Path.exists does not
        found = f"there is no folder, no file and no model of that name{nearest(name, MODELS)}"
        do = f"Give a folder or file of Wan weights, hf:OWNER/NAME, or one of {', '.join(MODELS)}"
        raise LoadError(f"model {name!r}", found, do)
    return MODELS.get(name, Path(place).absolute())  # weights are read later, maybe from another working folder


def _place(where: str, hub: Hub, component: str) -> Path:
    """A part that the user names: a path, or a place in a repository."""
    from ditkit.checkpoints.files.opening import split_entry
    from ditkit.checkpoints.model.hub import HubName
    from ditkit.checkpoints.model.place import place_of

    if HubName.parse(where) is not None:
        return place_of(component, where).pin(hub).resolve(hub)
    path = Path(os.path.expanduser(where)).absolute()
    if not split_entry(path)[0].exists():
        raise LoadError(f"{component}={where}", "there is nothing of that name", "Check the path")
    return path
