"""What a stage's result came from: written down beside it, hashed into its fingerprints, compared when a run goes on.

A record holds the version and the options of the stage, the settings that it read, what was plugged into the seams if
it asked for them, its weights and the fingerprints of its inputs. Leaves out: where results are kept (``store``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ditkit.stage import Stage, setting_of
from ditkit.state import State, digest

Record = dict[str, Any]


def fingerprint_of(state: State, name: str) -> str:
    """The fingerprint of a field; of a field that the caller brought, the hash of its content."""
    return state.fingerprints.get(name) or digest(name, state[name])


def options_of(stage: Stage) -> dict[str, Any]:
    """The dataclass fields of a stage, but for those that promise equal results."""
    described: tuple[Any, ...] = dataclasses.fields(stage) if dataclasses.is_dataclass(stage) else ()
    return {f.name: getattr(stage, f.name) for f in described if f.compare}


def code_of(stage: Stage) -> str:
    """A hash of the files that hold the ``run`` of the stage and of the classes under it; empty where one is in no
    file, as in a notebook: then nothing tells it from the ``run`` that stood there before."""
    files: dict[str, None] = {}
    for cls in type(stage).__mro__:
        if "run" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["run"]), "__code__", None)
            around = getattr(sys.modules.get(cls.__module__), "__file__", None)  # a decorator may hide the function
            files |= dict.fromkeys((code.co_filename if code else "", around or ""))
    if not all(Path(file).is_file() for file in files):
        return ""
    return hashlib.sha256(b"".join(hashlib.sha256(Path(file).read_bytes()).digest() for file in files)).hexdigest()


def inputs_of(stage: Stage, state: State) -> dict[str, str]:
    """Fingerprints of all that the stage may look at; the request counts by the settings that are read of it."""
    names = dict.fromkeys((*stage.reads, *stage.optional, *stage.triggers))
    return {n: fingerprint_of(state, n) for n in names if n in state and n not in stage.loop and n != "request"}


def record_of(
    stage: Stage,
    state: State,
    weights: Mapping[str, str],
    settings: Mapping[str, Any],
    plugs: Mapping[str, list[str]] | None,
) -> Record:
    return {
        "version": stage.version,
        "options": options_of(stage),
        "settings": dict(settings),
        "plugs": dict(plugs or {}),
        "weights": dict(weights),
        "inputs": inputs_of(stage, state),
    }


def fingerprints(stage: Stage, state: State, record: Record, written: Mapping[str, Any]) -> dict[str, str]:
    """Of each field that the stage wrote from ``state``: its record, hashed.

    A looping stage adds the step that it reached, and is blind to where it was interrupted: going on from its own
    earlier fields counts as one run. Of its weights those count that are called on the way to that step: the second of
    two experts has no part in the first half of a run, and may not even be there."""

    def key(name: str, fields: Mapping[str, Any], origin: list[str]) -> str:
        if not stage.loop:
            return digest(name, stage.name, record, 0, origin)
        reached, carried = fields.get("step", 0), {n: fields[n] for n in stage.loop if n in fields}
        used = stage.needs(state.with_fields({**carried, "step": 0}), reached)
        weights = {n: fingerprint for n, fingerprint in record["weights"].items() if n in used}
        return digest(name, stage.name, {**record, "weights": weights}, reached, origin)

    held = [n for n in stage.loop if n in state]
    own = all(state.fingerprints.get(n) == key(n, state, []) for n in held)
    origin = [] if own else [fingerprint_of(state, n) for n in held]
    return {name: key(name, written, origin) for name in written}


def outdated(stage: Stage, state: State, later: Collection[str]) -> list[str]:
    """Why the State's own request and inputs would give this stage another result than the one that it holds; nothing
    if it would be the same, or if nobody wrote down what it came from.

    ``later``: fields that this stage or one after it writes; that they are others now says nothing."""
    record = state.get("records", {}).get(stage.name)
    if record is None:
        return []
    request, reasons = state.get("request", {}), []
    for name, value in record["settings"].items():
        now = setting_of(request, name)
        if now != value:
            reasons.append(f"{name} was {value!r}, is {now!r}")
    for name, then in record["inputs"].items():
        if name not in later and (name not in state or fingerprint_of(state, name) != then):
            reasons.append(f"{name} is {'another one' if name in state else 'gone'}")
    seen = (*stage.optional, *stage.triggers)
    unseen = {*stage.loop, *later, *record["inputs"], "request"}
    return [*reasons, *(f"{n} is new" for n in dict.fromkeys(seen) if n in state and n not in unseen)]
