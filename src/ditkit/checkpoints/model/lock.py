"""``ditkit.lock``: for each component of a manifest the commit and the size and sha256 of every file.

The manifest is written by a person and this file by ``ditkit lock``; with it a model is the same bytes everywhere, or
an error. Leaves out: what the files are."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ditkit.checkpoints.files.text import ABSENT, readable
from ditkit.checkpoints.model.hub import Hub
from ditkit.checkpoints.model.place import AGAIN, Location, Places, check_names, files_at
from ditkit.errors import LoadError
from ditkit.reading import file_at, open_ordinary, parse_toml, read_bytes

INDEX = "index"
ANEW = "Write it anew with `ditkit lock`"
HEAD = "# Written by `ditkit lock`. Lock again instead of editing.\n"


@dataclass(frozen=True)
class Entry:
    """One locked component. ``files``: name -> (size in bytes, sha256)."""

    written: str
    revision: str | None
    files: Mapping[str, tuple[int, str]]


Lock = Mapping[str, Entry]
P = TypeVar("P", bound=Places)


def read_toml(file: Path, do: str) -> dict[str, Any]:
    """Raises LoadError."""
    asked = f"reading {file}"
    try:
        return dict(parse_toml(read_bytes(file, asked), asked, do=do))
    except FileNotFoundError:
        raise LoadError(asked, *ABSENT) from None


def lock_file(manifest: Places) -> Path:
    """``ditkit.lock`` beside the manifest; ``NAME.lock`` for a manifest with another name."""
    name = manifest.file.name if manifest.file and manifest.file.suffix == ".toml" else "ditkit.toml"
    return manifest.folder / Path(name).with_suffix(".lock").name


def read_lock(file: Path) -> Lock:
    """Empty when there is no such file. Raises LoadError when it cannot be understood."""
    if not file_at(file):
        return {}
    raw, lock = read_toml(file, ANEW), {}
    try:
        if raw.pop("version", None) != 1:
            raise ValueError("it is of another version")
        for name, entry in raw.get("components", {}).items():
            files = {one: (_whole(of["size"]), _words(of["sha256"])) for one, of in entry["files"].items()}
            revision = None if entry.get("revision") is None else _words(entry["revision"])
            lock[name] = Entry(_words(entry["place"]), revision, files)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoadError(f"reading {file}", f"it cannot be understood ({e})", ANEW) from None
    return lock


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def lock_text(lock: Lock) -> str:
    """The file's text; equal locks have equal texts."""
    lines = [HEAD, "version = 1\n"]
    for name, entry in sorted(lock.items()):
        revision = f"revision = {_text(entry.revision)}\n" if entry.revision else ""
        lines.append(f"\n[components.{name}]\nplace = {_text(entry.written)}\n{revision}[components.{name}.files]\n")
        lines += [f'{_text(file)} = {{ size = {size}, sha256 = "{digest}" }}\n'
                  for file, (size, digest) in sorted(entry.files.items())]  # fmt: skip
    return "".join(lines)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a TOML string is written like a JSON one


def with_lock(manifest: P) -> P:
    """The manifest with what its lock pins. Raises LoadError when the two are about different places."""
    file = lock_file(manifest)
    if not (lock := dict(read_lock(file))):
        return manifest
    asked = f"opening {manifest.file or manifest.folder} with {file.name}"
    if lock.pop(INDEX, None) != _index_entry(manifest):
        raise LoadError(asked, "the index of the components is not what it was", AGAIN)
    for name in sorted(lock.keys() ^ manifest.components.keys()):
        raise LoadError(asked, f"only {'the lock' if name in lock else 'the manifest'} names {name}", AGAIN)
    places = {name: _pinned(place, lock[name], asked) for name, place in manifest.components.items()}
    return replace(manifest, components=places, locked=True)


def _pinned(place: Location, entry: Entry, asked: str) -> Location:
    if place.written != entry.written:
        raise LoadError(asked, f"the {place.component} is {place.written} now and was {entry.written}", AGAIN)
    digests = {name: digest for name, (_, digest) in entry.files.items()}
    for name, digest in place.sha256.items():
        if digests.get(name) != digest:
            raise LoadError(asked, f"they pin {name} of the {place.component} to different hashes", AGAIN)
    sizes = {name: size for name, (size, _) in entry.files.items()}
    return replace(place, revision=entry.revision or place.revision, sha256=digests, sizes=sizes)


def verify(place: Location, at: Path) -> int:
    """Hash every pinned file of the component that lies ``at`` a folder or file. Returns how many bytes were read.

    Always reads the bytes: neither the size nor the time of change of a file is trusted. Raises LoadError with the
    first file that is not what it was."""
    if not place.sha256:
        return 0
    check_names(place, at)
    files = {name: file for name, file in files_at(place, at).items() if name in place.sha256}
    for name, digest in _digests(files).items():
        if digest != place.sha256[name]:
            found = f"{name} is not what it was when it was pinned (sha256)"
            raise LoadError(f"loading the {place.component} from {at}", found, AGAIN)
    return sum(file.stat().st_size for file in files.values())


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter's lock
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _digest(file: Path) -> str:
    with readable(f"hashing {file}"), open_ordinary(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_lock(manifest: Places, hub: Hub | None = None) -> dict[str, Entry]:
    """Resolve every component of a manifest that was opened without its lock, and hash all of its files.

    A branch or tag becomes the commit that it means now. Raises LoadError."""
    if not manifest.components:
        do = "Name them under [components] in a ditkit.toml"
        raise LoadError(f"locking {manifest.folder}", "it names no components", do)
    entries = {name: _entry(place, hub or Hub()) for name, place in manifest.components.items()}
    index = _index_entry(manifest)
    return entries | ({INDEX: index} if index else {})


def _index_entry(manifest: Places) -> Entry | None:
    """The index that diffusers wrote is locked like a component: it has notes of its own, such as the boundary."""
    if manifest.index is None:
        return None
    name = manifest.index.name
    return Entry(f"./{name}", None, {name: (manifest.index.stat().st_size, _digest(manifest.index))})


def _entry(place: Location, hub: Hub) -> Entry:
    at = (place := place.pin(hub)).resolve(hub)
    verify(place, at)  # what the manifest itself pins
    files = files_at(place, at)
    found = {name: (files[name].stat().st_size, digest) for name, digest in _digests(files).items()}
    return Entry(place.written, place.revision, found)


def changes(before: Lock, after: Lock) -> list[tuple[str, str]]:
    """(component, what is different), one line for each difference."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append((name, "new" if new else "no longer there"))
            continue
        if old.written != new.written:
            lines.append((name, f"place: {old.written} -> {new.written}"))
        if old.revision != new.revision:
            was, now = (str(entry.revision or "none")[:12] for entry in (old, new))
            lines.append((name, f"commit: {was} -> {now}"))
        for file in sorted(old.files.keys() | new.files.keys()):
            if old.files.get(file) != new.files.get(file):
                kind = "changed" if file in old.files and file in new.files else "new" if file in new.files else "gone"
                lines.append((name, f"{file}: {kind}"))
    return lines
