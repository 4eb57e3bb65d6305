"""Where one component of a model comes from: a folder or file on this machine, or a commit of a hub repository; and
which files there it is made of: one set of weights of one variant, with configs and vocabularies, never programs.

Leaves out: what names several places together (manifest.py), and hashing their files (lock.py)."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ditkit.checkpoints.files.formats import SHARD
from ditkit.checkpoints.files.text import read_json, some
from ditkit.checkpoints.model.hub import COMMIT, REPO, Hub, HubName, Listing, inside
from ditkit.errors import LoadError, check_known
from ditkit.reading import check_path, file_at, folder_at, is_litter

AGAIN = "Lock the manifest again with `ditkit lock` if that is meant"
KEYS = ("path", "repo", "subfolder", "revision", "variant", "file", "sha256")


@dataclass(frozen=True)
class Location:
    """Where one component lies: ``path`` (absolute) or ``repo`` with its ``revision``, then ``subfolder``, ``file``.

    ``written`` is how the manifest says it. ``sha256`` maps names of files to hex digests, as far as they are pinned:
    relative to the repository, or to the component's own folder when it is local. ``sizes`` has all its files when it
    is locked, else it is None."""

    component: str
    written: str
    path: Path | None = None
    repo: str | None = None
    subfolder: str = ""
    revision: str | None = None
    variant: str | None = None
    file: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] | None = None

    @property
    def pinned(self) -> bool:
        """A local place, or a repository by commit: what it names cannot move."""
        return self.repo is None or bool(COMMIT.fullmatch(self.revision or ""))

    @property
    def here(self) -> Path | None:
        """Its folder or file, if it is a local one; it may be absent."""
        return None if self.path is None else self.path / self.subfolder / (self.file or "")

    @property
    def afar(self) -> bool:
        """It would have to be fetched, or is not there at all."""
        return self.here is None or not there(self.here, self.component)

    @property
    def absent(self) -> bool:
        """An index names it in its usual place, and there is no such folder. Of a locked one the files are named, so
        their place has to be right."""
        return self.path is not None and self.afar and self.sizes is None and self.written == f"./{self.component}"

    def resolve(self, hub: Hub | None = None) -> Path:
        """The component's folder or file on this machine, fetched if need be.

        Raises LoadError when it is not there, when a branch is not pinned to a commit, and when the files that are
        there are not those that were locked (names and sizes; ``lock.verify`` reads them)."""
        if not self.pinned:
            found = f"{self.written} can mean another commit tomorrow"
            do = "Give a commit of 40 digits as its revision, or pin it with `ditkit lock`"
            raise LoadError(f"fetching the {self.component}", found, do)
        place = self.here or self._fetched(hub or Hub())
        if self.repo is None and self.afar:
            do = f"Correct {self.written!r} in the manifest ('.' is its own folder), or get the files again"
            raise LoadError(f"finding the {self.component}", f"there is nothing at {place}", do)
        check_names(self, place)
        return place

    def _fetched(self, hub: Hub) -> Path:
        repo, commit = str(self.repo), str(self.revision)
        if self.sizes is None:
            names = self.files_of(hub.look(repo, commit))
        else:
            names = tuple(self.inner + name.removeprefix(self.prefix) for name in self.sizes)
        return hub.fetch(repo, commit, names) / self.subfolder / (self.file or "")

    def pin(self, hub: Hub) -> "Location":
        """The same place at the commit that its branch or tag means now."""
        return self if self.pinned else replace(self, revision=hub.look(str(self.repo), self.revision).commit)

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
        if self.file is None:
            names = used(listing.within(self.subfolder), self.variant, where)
        else:
            config = str(PurePosixPath(self.file).with_name("config.json"))
            there = tuple(name for name in (self.file, config) if start + name in listing.names)
            names = there if self.file in there else ()
        if not names:
            found = f"there is no {self.file or 'file of weights or settings'} at {listing.commit[:12]}"
            do = "Correct its place in the manifest, or choose another revision"
            raise LoadError(f"finding the {self.component} in {where}", found, do)
        return tuple(start + name for name in names)


@dataclass(frozen=True)
class Places:
    """Where the components of one model come from. ``file``: what names them; ``index``: the index of diffusers that
    stands in it or beside it. ``locked``: a lock pins their files."""

    folder: Path
    file: Path | None
    index: Path | None
    components: Mapping[str, Location]
    locked: bool = False


def there(path: Path, component: str) -> bool:
    """Whether anything is at ``path``. Raises LoadError for a link to nothing, which is not the same as no part."""
    asked = f"looking for the {component}"
    return folder_at(path, asked) or file_at(path, asked)


def files_at(place: Location, at: Path) -> dict[str, Path]:
    """The files that make the component that lies ``at`` a folder or file, under the names that a lock uses."""
    asked = f"looking at the {place.component} in {at}"
    if folder_at(at, asked):
        names = used([file.name for file in at.iterdir() if not os.path.isdir(file)], place.variant, str(at))
        return {place.prefix + name: at / name for name in names if file_at(at / name, asked)}
    beside = ["config.json"] if file_at(at.parent / "config.json", asked) else []  # what a loader reads too
    if at.name.endswith(".index.json"):
        shards = sorted({str(name) for name in read_json(at).get("weight_map", {}).values()})
        if outside := [name for name in shards if PurePosixPath(name).name != name or "\\" in name]:
            do = "Use an index whose shards lie beside it"
            raise LoadError(f"reading {at}", f"it names {some(outside)}", do)
        beside += shards
    return {place.prefix + name: at.parent / name for name in (at.name, *beside)}


def check_names(place: Location, at: Path) -> None:
    """Whether all pinned files are there with their sizes and, when locked, no others. Raises LoadError."""
    if not place.sha256:
        return
    files, asked = files_at(place, at), f"opening the {place.component} at {at}"
    if lost := sorted(place.sha256.keys() - files.keys()):
        raise LoadError(asked, f"{lost[0]} is pinned and is not there", "Get it again, or lock the manifest again")
    if place.sizes is not None and (new := sorted(files.keys() - place.sizes.keys())):
        raise LoadError(asked, f"{new[0]} is there and is not locked", AGAIN)
    for name, size in (place.sizes or {}).items():
        if (found := files[name].stat().st_size) != size:
            raise LoadError(asked, f"{name} has {found} bytes and had {size} when it was locked", AGAIN)


@dataclass(frozen=True)
class LocalBase:
    """A manifest on this machine: relative paths are relative to its folder."""

    folder: Path

    def place(self, component: str, path: str, subfolder: str | None) -> dict[str, Any]:
        own = path == "." and subfolder is None and folder_at(self.folder / component)
        place = os.path.normpath(self.folder / (component if own else os.path.expanduser(path)))
        return {"path": Path(place), "subfolder": subfolder or ""}


@dataclass(frozen=True)
class RemoteBase:
    """A manifest in a repository: "." and relative paths mean the same repository at the same commit."""

    listing: Listing
    folder: str

    def place(self, component: str, path: str, subfolder: str | None) -> dict[str, Any]:
        if os.path.isabs(path) or path.startswith("~") or not inside(path):
            found = f"its manifest names {path!r}, outside of it"
            do = "Use a manifest whose paths stay in their repository"
            raise LoadError(f"finding the {component} of {self.listing.repo}", found, do)
        own = path == "." and subfolder is None and self.listing.within(str(PurePosixPath(self.folder, component)))
        place = str(PurePosixPath(self.folder, component if own else path, subfolder or ""))
        at = {"repo": self.listing.repo, "revision": self.listing.commit}
        if place in self.listing.names:
            parent, _, file = place.rpartition("/")
            return at | {"subfolder": parent, "file": file}
        return at | {"subfolder": "" if place == "." else place}


Base = LocalBase | RemoteBase


def place_of(component: str, text: str) -> Location:
    """A place outside of any manifest: a path, or ``hf:OWNER/NAME[/FOLDER or /FOLDER/FILE]@REVISION``. Raises
    LoadError."""
    return location(component, short(text), f"{component}={text}", LocalBase(Path.cwd()))


def short(text: str) -> dict[str, Any]:
    """The keys of a place that is written as one text."""
    hub = HubName.parse(text)
    if hub is None:
        return {"path": text}
    folder, _, last = hub.folder.rpartition("/")
    file = last if PurePosixPath(last).suffix in FORMATS else None
    keys = {"subfolder": folder if file else hub.folder, "file": file, "revision": hub.revision}
    return {"repo": hub.repo} | {key: value for key, value in keys.items() if value}


def location(name: str, keys: Mapping[str, Any], asked: str, base: Base) -> Location:
    """The place that ``keys`` of a manifest describe. Raises LoadError."""
    keys = dict(keys)
    pins = keys.pop("sha256", {})
    for key, value in keys.items():
        check_known(key, KEYS, asked, f"it has an unknown key {key!r}", LoadError)
        if not isinstance(value, str) or not value:
            raise LoadError(asked, f"{key} is {value!r}, not a text", "Correct it")
        check_path(value, asked)
    if not isinstance(pins, dict) or not all(isinstance(v, str) and len(v) == 64 for v in pins.values()):
        raise LoadError(asked, "sha256 is not a table of files and their 64 digits", "Write it with `ditkit lock`")
    path, repo, subfolder, file = (keys.get(key, "") for key in ("path", "repo", "subfolder", "file"))
    for wrong, found, do in (
        (path and repo, "it has both path and repo", "Give one of them"),
        (not path and not repo, "it has neither path nor repo", "Give one of them"),
        (path and "revision" in keys, "a path has no revision", "Remove it, or give a repo"),
        (not inside(subfolder), f"subfolder is {subfolder!r}, outside of the place", "Correct it"),
        (not inside(file), f"file is {file!r}, outside of the place", "Correct it"),
        (repo and not REPO.fullmatch(repo), f"repo is {repo!r}", "Write OWNER/NAME"),
        (file and "variant" in keys, "it has both file and variant", "Give one of them"),
    ):
        if wrong:
            raise LoadError(asked, found, do)
    where = keys.pop("path", None)
    written = _written(keys, where)
    if where is not None:
        keys = base.place(name, where, keys.pop("subfolder", None)) | keys
    return Location(name, written, **keys, sha256=pins)


def _written(keys: Mapping[str, str], path: str | None) -> str:
    """A place as one text, the same for the same place; ``ditkit.lock`` tells by it whether it still fits."""
    inner = "/".join(keys[key] for key in ("subfolder", "file") if key in keys)
    text = path if path is not None else f"hf:{keys['repo']}"
    text += f"/{inner}" if inner else ""
    text += f"@{keys.get('revision', 'main')}" if path is None else ""
    return text + (f" (variant {keys['variant']})" if "variant" in keys else "")


NOTES = re.compile(r"(?!.*\.index(\..+)?\.json$).+\.json|.+\.model|(merges|vocab)\.txt")
FORMATS = {".safetensors": 0, ".gguf": 1, ".pth": 2, ".pt": 2, ".bin": 2, ".ckpt": 2}
"""Endings of weights -> their rank; the lowest is taken before the others."""
_SET = re.compile(
    r"(?P<base>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<b>[^.]+))?"
)  # the base names of diffusers and transformers; a variant stands before or after the number of the shard
_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(?:\.(?P<variant>.+))?\.json")


def used(names: Iterable[str], variant: str | None, where: str) -> tuple[str, ...]:
    """The names, sorted, of one set of weights (if there are any) and of all notes.

    ``names`` are the files of one folder, without paths. Raises LoadError when the variant is not there, and when
    several sets could be meant; ``where`` names the folder in it."""
    names = sorted(name for name in names if not is_litter(name))
    notes = [name for name in names if NOTES.fullmatch(name)]
    sets = {name: found for name in names if (found := _weights(name))}
    asked = f"choosing the weights in {where}" + (f" (variant {variant!r})" if variant else "")
    if not sets:
        if variant is not None:
            raise LoadError(asked, "there are no weights", "Remove the variant, or correct the place")
        return tuple(notes)
    fitting = {name: (rank, base) for name, (rank, base, its) in sets.items() if its == variant}
    if not fitting:
        known = some({its or "none" for _, _, its in sets.values()})
        raise LoadError(asked, f"the weights there have other variants ({known})", "Ask for one of these variants")
    best = min(rank for rank, _ in fitting.values())
    chosen = {name: base for name, (rank, base) in fitting.items() if rank == best}
    if len(bases := {*chosen.values()}) > 1:
        raise LoadError(asked, f"{len(bases)} sets of weights could be meant ({some(bases)})", "Name one with `file`")
    return tuple(sorted([*notes, *chosen]))


def _weights(name: str) -> tuple[int, str, str | None] | None:
    """(rank of the format, name of the set, variant), or None for a file that holds no weights."""
    if index := _INDEX.fullmatch(name):
        return (0 if index["suffix"] == ".safetensors" else 2), index["stem"], index["variant"]
    path = PurePosixPath(name)
    if (rank := FORMATS.get(path.suffix)) is None:
        return None
    match = _SET.fullmatch(path.stem)
    return (rank, match["base"], match["a"] or match["b"]) if match else (rank, SHARD.sub("", path.stem), None)
