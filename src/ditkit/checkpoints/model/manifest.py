"""Where each component of a model comes from: ``ditkit.toml``, or the indexes that diffusers writes.

A manifest only names places. A place is a folder or file on this machine, or a commit of a hub repository; together
they are one model. Leaves out: hashes of the files (``lock.py``), and what the files are (``parts.py``).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.model.hub import COMMIT, DATA, REPO, Hub, HubName, Listing, inside
from ditkit.checkpoints.model.used import is_weights, used
from ditkit.errors import LoadError, nearest

MANIFEST, MODULAR, INDEX = "ditkit.toml", "modular_model_index.json", "model_index.json"
NAMES = (MANIFEST, MODULAR, INDEX)
WHOLE = ("config.json", "configuration.json")
"""What a repository in Wan's own layout has at its top. One that has none of these is a collection, not a model."""

COMPONENTS = (
    "transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "image_encoder", "image_processor",
    "preview_decoder", "scheduler",
)  # fmt: skip
MADE_HERE = ("guider", "video_processor", "feature_extractor")
"""Parts that diffusers lists and that have no files which ditkit reads; they are passed over by name."""

LIBRARIES = (None, "diffusers", "transformers")
"""A class of another library would be code that comes with the model; none is ever run."""

NOTES: Mapping[str, type] = MappingProxyType({"boundary": float, "expand_timesteps": bool})
"""Keys of ``[model]``. ``boundary``: the share of the timesteps from which on the first of two experts works."""

_PLACE = ("path", "repo", "subfolder", "revision", "variant", "file", "sha256")
INDEX_NOTES = {"boundary_ratio": "boundary", "expand_timesteps": "expand_timesteps"}
KNOWN = (*COMPONENTS, *MADE_HERE, *INDEX_NOTES)
_SPEC = ("pretrained_model_name_or_path", "repo", "subfolder", "revision", "variant", "type_hint",
         "default_creation_method")  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Where one component lies: ``path`` (absolute) or ``repo`` with its ``revision``, then ``subfolder``, ``file``.

    ``written`` is how the manifest says it. ``sha256`` maps names of files to hex digests, as far as they are pinned:
    relative to the repository, or to the component's own folder when it is local. ``names`` are all its files when it
    is locked, else None."""

    component: str
    written: str
    path: Path | None = None
    repo: str | None = None
    subfolder: str = ""
    revision: str | None = None
    variant: str | None = None
    file: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    @property
    def pinned(self) -> bool:
        """A local place, or a repository by commit: what it names cannot move."""
        return self.repo is None or bool(COMMIT.fullmatch(self.revision or ""))

    @property
    def afar(self) -> bool:
        """It would have to be fetched, or is not there at all."""
        return self.path is None or not (self.path / self.subfolder / (self.file or "")).exists()

    def resolve(self, hub: Hub | None = None) -> Path:
        """The component's folder or file on this machine, fetched if need be.

        Raises LoadError when it is not there, when a branch is not pinned to a commit, and when the files that are
        there are not those that were locked (names and sizes; ``lock.verify`` reads them)."""
        from ditkit.checkpoints.model.lock import check_names

        if not self.pinned:
            raise LoadError(
                f"fetching the {self.component}",
                f"{self.written} can mean another commit tomorrow",
                "Give a commit of 40 digits as its revision, or pin it with `ditkit lock`",
            )
        place = self._local() if self.repo is None else self._fetched(hub or Hub())
        check_names(self, place)
        return place

    def _local(self) -> Path:
        assert self.path is not None
        place = self.path / self.subfolder / (self.file or "")
        if not place.exists():
            raise LoadError(
                f"finding the {self.component}",
                f"there is nothing at {place}",
                f"Correct {self.written!r} in the manifest ('.' is its own folder), or get the files again",
            )
        return place

    def _fetched(self, hub: Hub) -> Path:
        assert self.repo is not None
        assert self.revision is not None
        if self.names is None:
            names = self.files_of(hub.look(self.repo, self.revision))
        else:
            names = tuple(self.inner + name.removeprefix(self.prefix) for name in self.names)
        return hub.fetch(self.repo, self.revision, names) / self.subfolder / (self.file or "")

    def pin(self, hub: Hub) -> Location:
        """The same place at the commit that its branch or tag means now."""
        if self.pinned or self.repo is None:
            return self
        return replace(self, revision=hub.look(self.repo, self.revision).commit)

    @property
    def inner(self) -> str:
        """The subfolder with its slash, or nothing."""
        return f"{self.subfolder}/" if self.subfolder else ""

    @property
    def prefix(self) -> str:
        """What names of pinned files begin with: the subfolder, where the manifest names the repository. Elsewhere
        nothing, so that a model and its lock can go to the hub and come back."""
        return self.inner if self.written.startswith("hf:") else ""

    def files_of(self, listing: Listing) -> tuple[str, ...]:
        """Which files of the repository make this component. Raises LoadError when there are none."""
        start, where = self.inner, f"{self.repo}/{self.inner}".rstrip("/")
        if self.file is not None:
            there = listing.within(f"{start}{PurePosixPath(self.file).parent.as_posix()}".removesuffix(".").rstrip("/"))
            beside = [PurePosixPath(self.file).with_name("config.json").as_posix()] if "config.json" in there else []
            names: tuple[str, ...] = (self.file, *beside) if start + self.file in listing.names else ()
        else:
            names = used(listing.within(self.subfolder), self.variant, where)
        if not names:
            raise LoadError(
                f"finding the {self.component} in {where}",
                f"there is no {self.file or 'file of weights or settings'} at {listing.commit[:12]}",
                "Correct its place in the manifest, or choose another revision",
            )
        return tuple(start + name for name in names)


@dataclass(frozen=True)
class Manifest:
    """``components`` by name, as far as the manifest names them; the rest is looked for in ``folder``.

    ``file`` is the manifest, ``index`` the index of diffusers that stands in it or beside it.
    ``model`` has notes of the kind of NOTES; ``tables`` are the other tables of ``ditkit.toml``, unchecked.
    ``unknown``: keys of the index that nobody here knows, such as components of newer pipelines."""

    folder: Path
    file: Path | None
    index: Path | None
    components: Mapping[str, Location]
    model: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    locked: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The notes on the whole model, under their names in an index."""
        return {name: self.model[note] for name, note in INDEX_NOTES.items() if note in self.model}

    @classmethod
    def open(cls, path: str | Path, lock: bool = True) -> Manifest:
        """The manifest of a folder, or a manifest file. Reads no weights and asks no hub.

        ``ditkit.toml`` counts before ``modular_model_index.json``, and that before ``model_index.json``, component by
        component for the first and as a whole for the other two. With ``lock``, what ``ditkit.lock`` pins is filled
        in. Raises LoadError."""
        path = Path(path)
        if not path.exists():
            raise LoadError(f"opening the manifest {path}", "there is no such file or folder", "Check the path")
        folder = Path(os.path.abspath(path if path.is_dir() else path.parent))
        return _read(folder, None if path.is_dir() else path.name, _Local(folder), lock)

    @classmethod
    def fetch(cls, name: str, hub: Hub | None = None) -> Manifest:
        """The manifest of ``hf:OWNER/NAME[/FOLDER]@REVISION``. Its components come from that same commit, unless they
        name another repository. Of one in Wan's own layout all data is fetched and ``components`` is empty."""
        hub = hub or Hub()
        found = HubName.parse(name)
        if found is None:
            raise LoadError(f"the hub name {name!r}", "it does not begin with hf:", "Write hf:OWNER/NAME@REVISION")
        listing = hub.look(found.repo, found.revision)
        top = listing.within(found.folder)
        start = f"{found.folder}/" if found.folder else ""
        names = [start + one for one in (*NAMES, "ditkit.lock") if one in top]
        if not names and not set(top) & set(WHOLE):
            raise LoadError(
                f"opening {name}",
                f"there is none of {', '.join((*NAMES, *WHOLE))} at {listing.commit[:12]}",
                "Name the files that you want of it in a ditkit.toml of your own",
            )
        if not names:
            names = [one for one in listing.names if one.startswith(start) and one.endswith(DATA)]
        folder = hub.fetch(listing.repo, listing.commit, names) / found.folder
        return _read(folder, None, _Remote(listing, found.folder), True)

    def resolve(self, hub: Hub | None = None) -> dict[str, Path]:
        """Every component's place on this machine; one that cannot be had is an error, never left out."""
        return {name: place.resolve(hub) for name, place in self.components.items()}


@dataclass(frozen=True)
class _Local:
    """A manifest on this machine: relative paths are relative to its folder."""

    folder: Path

    def place(self, component: str, path: str) -> dict[str, Any]:
        if path == ".":
            own = self.folder / component
            return {"path": own if own.is_dir() else self.folder}
        return {"path": Path(os.path.normpath(self.folder / os.path.expanduser(path)))}


@dataclass(frozen=True)
class _Remote:
    """A manifest in a repository: "." and relative paths mean the same repository at the same commit."""

    listing: Listing
    folder: str

    def place(self, component: str, path: str) -> dict[str, Any]:
        if os.path.isabs(path) or path.startswith("~") or not inside(path):
            raise LoadError(
                f"finding the {component} of {self.listing.repo}", f"its manifest names {path!r}, outside of it",
                "Use a manifest whose paths stay in their repository",
            )  # fmt: skip
        inner = component if path == "." and self.has(component) else path
        subfolder = PurePosixPath(self.folder, inner).as_posix()
        at = {"repo": self.listing.repo, "revision": self.listing.commit}
        if subfolder in self.listing.names:
            parent, _, file = subfolder.rpartition("/")
            return at | {"subfolder": parent, "file": file}
        return at | {"subfolder": "" if subfolder == "." else subfolder}

    def has(self, component: str) -> bool:
        return bool(self.listing.within(PurePosixPath(self.folder, component).as_posix()))


def _read(folder: Path, name: str | None, base: _Local | _Remote, lock: bool) -> Manifest:
    there = [one for one in NAMES if (folder / one).is_file()]
    wanted = there if name is None else [name]
    own = next((one for one in wanted if one.endswith(".toml")), None)
    if name is not None and own is not None:  # a manifest that was named stands beside the index of its folder
        wanted += [one for one in there if not one.endswith(".toml")]
    index = next((one for one in wanted if one.endswith(".json")), None)
    components, model, unknown = _read_index(folder / index, base) if index else ({}, {}, {})
    tables: dict[str, Any] = {}
    if own:
        tables = _read_toml(folder / own)
        components |= _places(tables.pop("components", {}), folder / own, base)
        model |= _notes(tables.pop("model", {}), folder / own)
    file = folder / (own or index) if own or index else None  # type: ignore[operator]
    manifest = Manifest(folder, file, folder / index if index else None, components, model, tables, unknown=unknown)
    if lock:
        from ditkit.checkpoints.model.lock import with_lock

        manifest = with_lock(manifest)
    return manifest


def _read_toml(file: Path) -> dict[str, Any]:
    asked = f"reading {file}"
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise LoadError(asked, f"it cannot be read ({e.strerror})", "Check the file and its permissions") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as e:
        raise LoadError(asked, f"it is not valid TOML ({e})", "Correct it") from None
    except RecursionError:
        raise LoadError(asked, "its lists are nested too deeply", "Correct it") from None
    known = ("components", "model", "defaults", "preview")
    for name, table in raw.items():
        _known(name, known, asked, "table")
        if not isinstance(table, dict):
            raise LoadError(asked, f"{name} is {table!r}, not a table", f"Write [{name}] above its keys")
    return raw


def _known(name: str, known: tuple[str, ...], asked: str, what: str) -> None:
    if name not in known:
        raise LoadError(asked, f"it has an unknown {what} {name!r}{nearest(name, known)}", f"Use {', '.join(known)}")


def _notes(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    asked = f"reading [model] of {file}"
    for name, value in table.items():
        _known(name, tuple(NOTES), asked, "key")
        _check_note(name, value, asked)
    return dict(table)


def _check_note(name: str, value: Any, asked: str) -> None:
    fits = type(value) is bool if NOTES[name] is bool else type(value) in (int, float) and 0 <= value <= 1
    if not fits:
        wanted = "true or false" if NOTES[name] is bool else "a number from 0 to 1"
        raise LoadError(asked, f"{name} is {value!r}, not {wanted}", "Correct it")


def _places(table: Mapping[str, Any], file: Path, base: _Local | _Remote) -> dict[str, Location]:
    asked = f"reading [components] of {file}"
    places = {}
    for name, value in table.items():
        _known(name, COMPONENTS, asked, "component")
        keys = _short(value) if isinstance(value, str) else value
        if not isinstance(keys, dict):
            raise LoadError(asked, f"{name} is {value!r}", "Give a path, hf:OWNER/NAME@REVISION, or a table")
        places[name] = _place(name, keys, f"reading [components.{name}] of {file}", base)
    return places


def place_of(component: str, text: str, folder: Path | None = None) -> Location:
    """A place outside of any manifest: a path, relative to ``folder`` (the current one when None), or
    ``hf:OWNER/NAME[/FOLDER or /FOLDER/FILE]@REVISION``. Raises LoadError."""
    return _place(component, _short(text), f"{component}={text}", _Local(folder or Path.cwd()))


def _short(text: str) -> dict[str, Any]:
    hub = HubName.parse(text)
    if hub is None:
        return {"path": text}
    folder, _, last = hub.folder.rpartition("/")
    file = last if is_weights(last) else None
    keys = {"subfolder": folder if file else hub.folder, "file": file, "revision": hub.revision}
    return {"repo": hub.repo} | {key: value for key, value in keys.items() if value}


def _place(name: str, keys: Mapping[str, Any], asked: str, base: _Local | _Remote) -> Location:
    keys = dict(keys)
    pins = keys.pop("sha256", {})
    for key, value in keys.items():
        _known(key, _PLACE, asked, "key")
        if not isinstance(value, str) or not value:
            raise LoadError(asked, f"{key} is {value!r}, not a text", "Correct it")
    if not isinstance(pins, dict) or not all(isinstance(v, str) and len(v) == 64 for v in pins.values()):
        raise LoadError(asked, "sha256 is not a table of files and their 64 digits", "Write it with `ditkit lock`")
    if ("path" in keys) == ("repo" in keys):
        both = "both path and repo" if "path" in keys else "neither path nor repo"
        raise LoadError(asked, f"it has {both}", "Give one of them")
    if "path" in keys and "revision" in keys:
        raise LoadError(asked, "a path has no revision", "Remove it, or give a repo")
    for key in ("subfolder", "file"):
        if not inside(keys.get(key, "")):
            raise LoadError(asked, f"{key} is {keys[key]!r}, outside of the place", "Correct it")
    if "repo" in keys and not REPO.fullmatch(keys["repo"]):
        raise LoadError(asked, f"repo is {keys['repo']!r}", "Write OWNER/NAME")
    if "file" in keys and "variant" in keys:
        raise LoadError(asked, "it has both file and variant", "Give one of them")
    where = keys.pop("path", None)
    written = _written(keys, where)
    if where is not None:
        if where == "." and "subfolder" in keys:
            own = base.place("", ".") | {"subfolder": keys["subfolder"]}
            keys = own if isinstance(base, _Local) else own | {"subfolder": _joined(base, keys["subfolder"])}
        else:
            found = base.place(name, where)
            inner = PurePosixPath(found.get("subfolder", ""), keys.pop("subfolder", "")).as_posix()
            keys = found | keys | {"subfolder": "" if inner == "." else inner}
    return Location(name, written, **keys, sha256=MappingProxyType(dict(pins)))


def _joined(base: _Remote, subfolder: str) -> str:
    return PurePosixPath(base.folder, subfolder).as_posix()


def _written(keys: Mapping[str, str], path: str | None) -> str:
    """A place as one text, the same for the same place; ``ditkit.lock`` tells by it whether it still fits."""
    inner = "/".join(keys[key] for key in ("subfolder", "file") if key in keys)
    text = path if path is not None else f"hf:{keys['repo']}"
    text += f"/{inner}" if inner else ""
    text += f"@{keys.get('revision', 'main')}" if path is None else ""
    return text + (f" (variant {keys['variant']})" if "variant" in keys else "")


def _read_index(file: Path, base: _Local | _Remote) -> tuple[dict[str, Location], dict[str, Any], dict[str, Any]]:
    """An index of diffusers, of either kind: a pair for a component beside it, a triple for one from anywhere. Last
    come the keys that are not known."""
    asked = f"reading {file}"
    components: dict[str, Location] = {}
    notes: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in read_json(file).items():
        if name == "auto_map":
            raise LoadError(asked, "it names code in the repository (auto_map)", "Use a model without code of its own")
        if name.startswith("_") or name in MADE_HERE or value in (None, [None, None]):
            continue
        if name in INDEX_NOTES:
            _check_note(INDEX_NOTES[name], value, asked)
            notes[INDEX_NOTES[name]] = value
        elif name in COMPONENTS:
            components[name] = _indexed(name, value, asked, base, unknown)
        else:
            unknown[name] = value
    return components, notes, unknown


def _indexed(name: str, value: Any, asked: str, base: _Local | _Remote, unknown: dict[str, Any]) -> Location:
    if (
        not isinstance(value, list)
        or len(value) not in (2, 3)
        or not all(x is None or isinstance(x, str) for x in value[:2])
    ):
        raise LoadError(asked, f"it gives {name} as {value}", "Write a library, a class and, if elsewhere, its place")
    spec = value[2] if len(value) == 3 else {"pretrained_model_name_or_path": ".", "subfolder": name}
    if not isinstance(spec, dict):
        raise LoadError(asked, f"the place of {name} is {spec!r}, not an object", "Correct it")
    unknown |= {f"{name}.{key}": found for key, found in spec.items() if key not in _SPEC and found is not None}
    hint = spec.get("type_hint") or [value[0]]
    library = hint[0] if isinstance(hint, list) and hint else value[0]
    for one in (value[0], library):
        if one not in LIBRARIES:
            raise LoadError(
                asked,
                f"{name} is a class of {one!r}",
                "Only classes of diffusers and transformers are known; no code is loaded",
            )
    where = spec.get("pretrained_model_name_or_path") or spec.get("repo")
    if not isinstance(where, str):
        raise LoadError(asked, f"{name} has no place ({where!r})", "Give pretrained_model_name_or_path")
    keys = {k: spec[k] for k in ("subfolder", "revision", "variant") if spec.get(k) is not None}
    if REPO.fullmatch(where):
        place = _place(name, keys | {"repo": where}, f"{asked}, {name}", base)
        if place.revision is None and isinstance(base, _Remote) and where == base.listing.repo:
            return replace(place, revision=base.listing.commit)  # the revision of the whole is that of its parts
        return place
    keys.pop("revision", None)  # diffusers writes one for local places too, where it means nothing
    return _place(name, keys | {"path": where}, f"{asked}, {name}", base)
