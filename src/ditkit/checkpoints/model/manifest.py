"""Where each component of a model comes from: ``ditkit.toml``, or the indexes that diffusers writes.

A manifest only names places; together they are one model. Leaves out: the places themselves (place.py), hashes of the
files (lock.py), and what the files are (open_part.py)."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.configs import Rules, note_unknown
from ditkit.checkpoints.model.hub import DATA, REPO, Hub, HubName
from ditkit.checkpoints.model.lock import read_toml, with_lock
from ditkit.checkpoints.model.part import SIDE, WITHOUT_WEIGHTS, component_names
from ditkit.checkpoints.model.place import Base, LocalBase, Location, Places, RemoteBase, location, short
from ditkit.errors import LoadError, StateError, check_known
from ditkit.trust import is_away

MODULAR, INDEX = "modular_model_index.json", "model_index.json"
TABLES = ("components", "model", "defaults", "preview")
NAMES = ("ditkit.toml", MODULAR, INDEX)
WHOLE = ("config.json", "configuration.json")
"""What a repository in Wan's own layout has at its top. One that has none of these is a collection, not a model."""
LIBRARIES = (None, "diffusers", "transformers")
"""A class of another library would be code that comes with the model; none is ever run."""
VALUES = {"boundary": "boundary_ratio", "expand_timesteps": "expand_timesteps"}
"""Keys of ``[model]`` -> of an index. ``boundary``: the share of the timesteps from which on the first of two experts
works."""
SPEC = ("pretrained_model_name_or_path", "repo", "subfolder", "revision", "variant", "type_hint",
        "default_creation_method")  # fmt: skip


@dataclass(frozen=True)
class Manifest(Places):
    """``components`` by name, as far as the manifest names them; the rest is looked for in ``folder``.

    ``values``: what is said of the whole model, under the names of an index. ``tables``: the other tables of
    ``ditkit.toml``, unchecked. ``unknown``: keys of the index that nobody here knows, such as components of newer
    pipelines."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def notes(self, rules: Rules) -> list[str]:
        """One sentence for each unknown key. Raises LoadError where the rules are strict."""
        known = (*component_names(), *WITHOUT_WEIGHTS, *VALUES.values())
        return note_unknown(f"reading {self.index}", self.index.name if self.index else "", self.unknown, known, rules)

    @staticmethod
    def at(path: Path) -> str | None:
        """The name of the manifest that ``path`` is or holds, if any."""
        if path.is_dir():
            return next((name for name in NAMES if (path / name).is_file()), None)
        return path.name if path.suffix == ".toml" or path.name in NAMES else None

    @classmethod
    def open(cls, path: str | Path, lock: bool = True) -> "Manifest":
        """The manifest of a folder, or a manifest file. Reads no weights and asks no hub.

        ``ditkit.toml`` counts before ``modular_model_index.json``, and that before ``model_index.json``, component by
        component for the first and as a whole for the other two. With ``lock``, what ``ditkit.lock`` pins is filled
        in. Raises LoadError."""
        path = Path(path)
        if not path.exists():
            raise LoadError(f"opening the manifest {path}", "there is no such file or folder", "Check the path")
        folder = Path(os.path.abspath(path if path.is_dir() else path.parent))
        found = _read(folder, None if path.is_dir() else path.name, LocalBase(folder))
        return with_lock(found) if lock else found

    @classmethod
    def fetch(cls, name: str, hub: Hub | None = None) -> "Manifest":
        """The manifest of ``hf:OWNER/NAME[/FOLDER]@REVISION``. Its components come from that same commit, unless they
        name another repository. Of one in Wan's own layout all data is fetched and ``components`` is empty."""
        hub = hub or Hub()
        found = HubName.parse(name)
        if found is None:
            raise LoadError(f"the hub name {name!r}", "it does not begin with hf:", "Write hf:OWNER/NAME@REVISION")
        listing = hub.look(found.repo, found.revision)
        top, start = listing.within(found.folder), f"{found.folder}/" if found.folder else ""
        names = [start + one for one in (*NAMES, "ditkit.lock") if one in top]
        if not names and not {*top} & {*WHOLE}:
            none = f"there is none of {', '.join((*NAMES, *WHOLE))} at {listing.commit[:12]}"
            raise LoadError(f"opening {name}", none, "Name the files that you want of it in a ditkit.toml of your own")
        names = names or [one for one in listing.names if one.startswith(start) and one.endswith(DATA)]
        folder = hub.fetch(listing.repo, listing.commit, names) / found.folder
        return with_lock(_read(folder, None, RemoteBase(listing, found.folder)))


def check_fetches(model: str, named: Collection[str], allowed: Collection[str], asked: str) -> None:
    """Raise StateError where a file names the ``model`` of this machine, and that one names a repository to be
    downloaded, unless the person ``named`` or ``allowed`` the setting. Raises LoadError for a damaged manifest."""
    path = Path(os.path.expanduser(model))
    if "model" in (*named, *allowed) or is_away(model) or not os.path.exists(path) or Manifest.at(path) is None:
        return
    for place in Manifest.open(path, lock=False).components.values():
        if place.repo is not None:
            do = f"Name it yourself if it is meant: --model {model}; or --allow-from-file model if the file is yours"
            found = f"its model {model} names {place.written}, and a file does not decide what is downloaded"
            raise StateError(asked, found, do)


def _read(folder: Path, name: str | None, base: Base) -> Manifest:
    own = folder / (name or NAMES[0])
    toml = own if own.suffix == ".toml" and own.is_file() else None
    indexes = [own] if name and not toml else [folder / MODULAR, folder / INDEX]
    index = next((file for file in indexes if file.suffix == ".json" and file.is_file()), None)
    components, values, unknown = _read_index(index, base) if index else ({}, {}, {})
    tables = read_toml(toml, "Correct it") if toml else {}
    for key, table in tables.items():
        check_known(key, TABLES, f"reading {toml}", f"it has an unknown table {key!r}", LoadError)
        if not isinstance(table, dict):
            raise LoadError(f"reading {toml}", f"{key} is {table!r}, not a table", f"Write [{key}] above its keys")
    for key, value in tables.pop("components", {}).items():
        components[key] = _place(key, value, f"reading [components] of {toml}", base)
    for key, value in tables.pop("model", {}).items():
        values[VALUES.get(key, key)] = _checked(key, value, f"reading [model] of {toml}")
    return Manifest(folder, toml or index, index, components, False, values, tables, unknown)


def _checked(name: str, value: Any, asked: str) -> Any:
    check_known(name, VALUES, asked, f"it has an unknown key {name!r}", LoadError)
    if name == "expand_timesteps":
        right, wanted = isinstance(value, bool), "true or false"
    else:
        right, wanted = type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"
    if not right:
        raise LoadError(asked, f"{name} is {value!r}, not {wanted}", "Correct it")
    return value


def _place(name: str, value: Any, asked: str, base: Base) -> Location:
    check_known(name, [*component_names(), *SIDE], asked, f"it has an unknown component {name!r}", LoadError)
    keys = short(value) if isinstance(value, str) else value
    if not isinstance(keys, dict):
        raise LoadError(asked, f"{name} is {value!r}", "Give a path, hf:OWNER/NAME@REVISION, or a table")
    return location(name, keys, f"{asked}, {name}", base)


def _read_index(file: Path, base: Base) -> tuple[dict[str, Location], dict[str, Any], dict[str, Any]]:
    """An index of diffusers, of either kind: a pair for a component beside it, a triple for one from anywhere. Last
    come the keys that are not known."""
    asked = f"reading {file}"
    components: dict[str, Location] = {}
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in read_json(file).items():
        if name == "auto_map":
            raise LoadError(asked, "it names code in the repository (auto_map)", "Use a model without code of its own")
        if name.startswith("_") or value in (None, [None, None]):
            continue
        if name in VALUES.values():
            values[name] = value
        elif name in (*component_names(), *SIDE):
            components[name] = _indexed(name, value, asked, base, unknown)
        elif name not in WITHOUT_WEIGHTS:
            unknown[name] = value
    return components, values, unknown


def _indexed(name: str, value: Any, asked: str, base: Base, unknown: dict[str, Any]) -> Location:
    if not (isinstance(value, list) and len(value) in (2, 3) and all(isinstance(x, str | None) for x in value[:2])):
        raise LoadError(asked, f"it gives {name} as {value}", "Write a library, a class and, if elsewhere, its place")
    spec = value[2] if len(value) == 3 else {"pretrained_model_name_or_path": ".", "subfolder": name}
    if not isinstance(spec, dict):
        raise LoadError(asked, f"the place of {name} is {spec!r}, not an object", "Correct it")
    unknown |= {f"{name}.{key}": found for key, found in spec.items() if key not in SPEC and found is not None}
    hint = spec.get("type_hint")
    for one in (value[0], *(hint[:1] if isinstance(hint, list) else ())):
        if one not in LIBRARIES:
            do = "Only classes of diffusers and transformers are known; no code is loaded"
            raise LoadError(asked, f"{name} is a class of {one!r}", do)
    where = spec.get("pretrained_model_name_or_path") or spec.get("repo")
    if not isinstance(where, str):
        raise LoadError(asked, f"{name} has no place ({where!r})", "Give pretrained_model_name_or_path")
    keys = {k: spec[k] for k in ("subfolder", "revision", "variant") if spec.get(k) is not None}
    if not REPO.fullmatch(where):
        keys.pop("revision", None)  # diffusers writes one for local places too, where it means nothing
        return location(name, keys | {"path": where}, f"{asked}, {name}", base)
    place = location(name, keys | {"repo": where}, f"{asked}, {name}", base)
    if place.revision is None and isinstance(base, RemoteBase) and where == base.listing.repo:
        return replace(place, revision=base.listing.commit)  # the revision of the whole is that of its parts
    return place
