"""What a stage's result came from: written down beside it, hashed into its fingerprints, compared when a run goes on,
to tell which stages a State still needs.

A record holds the version and the options of the stage, the settings that it read, what was plugged into the seams if
it asked for them, its weights and the fingerprints of its inputs. Leaves out: where results are kept (``store``)."""

import dataclasses
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditkit.events import SILENT, Events
from ditkit.execution.stage import Stage, known_settings, writes_of
from ditkit.identify import forgets
from ditkit.sources import files_of
from ditkit.state import State, digest, kind_of

Record = dict[str, Any]


def options_of(stage: Stage) -> dict[str, Any]:
    """The dataclass fields of a stage, but for those that promise equal results."""
    described: tuple[Any, ...] = dataclasses.fields(stage) if dataclasses.is_dataclass(stage) else ()
    return {f.name: getattr(stage, f.name) for f in described if f.compare}


def code_of(stage: Stage) -> str:
    """Stands for the classes of the stage: their names, the files that hold them and what these import. Empty where
    that does not tell all that it computes: a class that is in no file (a notebook) or is made in a function, or
    attributes that are no fields of a dataclass."""
    if not dataclasses.is_dataclass(stage) and getattr(stage, "__dict__", None):
        return ""
    names, files, modules = list[str](), dict[str, str | None](), list[str]()
    for cls in type(stage).__mro__:
        if cls.__module__ in ("builtins", "typing"):
            continue
        names.append(f"{cls.__module__}.{cls.__qualname__}")
        modules.append(cls.__module__)
        files.setdefault(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
        own = [getattr(value, "fget", value) for name, value in vars(cls).items() if not name.startswith("__")]
        codes = [getattr(inspect.unwrap(value), "__code__", None) for value in own if callable(value)]
        for code in filter(None, codes):  # a decorator may hide a function
            files.setdefault(code.co_filename)
    imported = files_of(*modules)
    for module in modules:  # as it was imported; the file may have been edited since
        if module in imported:
            files[getattr(sys.modules[module], "__file__", None) or ""] = imported.pop(module)
    if any("<locals>" in name for name in names) or not all(os.path.isfile(file) for file in files):
        return ""
    hashes = [sha256 or hashlib.sha256(Path(file).read_bytes()).hexdigest() for file, sha256 in files.items()]
    more = [f"{name} {what}" for name, what in sorted(imported.items())]
    return hashlib.sha256("\n".join([*names, *hashes, *more]).encode()).hexdigest()


def record_of(
    stage: Stage, state: State, weights: Mapping[str, str], settings: Mapping[str, Any],
    plugs: Mapping[str, list[str]] | None,
) -> Record:  # fmt: skip
    """``inputs``: fingerprints of all that the stage may look at; the request counts by the settings that are read."""
    seen = dict.fromkeys((*stage.reads, *stage.optional, *stage.triggers))
    return {
        "version": stage.version,
        "options": options_of(stage),
        "settings": dict(settings),
        "plugs": dict(plugs or {}),
        "weights": dict(weights),
        "inputs": {n: state.fingerprint_of(n) for n in seen if n in state and n not in (*stage.loop, "request")},
    }


def fingerprints(
    stage: Stage, state: State, record: Record, written: Mapping[str, Any], cacheable: bool = True
) -> dict[str, str]:
    """Of each field that the stage wrote from ``state``: its record, hashed, and the code of a stage that is not
    ditkit's own. Where these do not tell one result from another its content is hashed too: a makeshift (not
    ``cacheable``), a component without a name, a stage without code, a plain value such as a language model's answer.

    A looping stage adds the step that it reached, and is blind to where it was interrupted: going on from its own
    earlier fields counts as one run. Of its weights those count that are called on the way to that step: the second of
    two experts has no part in the first half of a run, and may not even be there. With a plug that cannot save what it
    remembers the cut counts: what was interrupted there may be another result."""
    own = type(stage).__module__.partition(".")[0] == "ditkit"
    code = [] if own else [code_of(stage)]
    nameless = not cacheable or code == [""] or "none" in record["weights"].values()

    def key(name: str, fields: Mapping[str, Any], origin: list[str]) -> str:
        more = [*code, *([digest(fields[name])] if nameless else [])]
        if not stage.loop:
            more += [digest(fields[name])] if kind_of(fields[name]) == "plain" and not nameless else []
            return digest(name, stage.name, record, 0, origin, *more)
        reached, carried = fields.get("step", 0), {n: fields[n] for n in stage.loop if n in fields}
        used = stage.needs(state.with_fields({**carried, "step": 0}), reached)
        weights = {n: fingerprint for n, fingerprint in record["weights"].items() if n in used}
        return digest(name, stage.name, {**record, "weights": weights}, reached, origin, *more)

    held = [n for n in stage.loop if n in state]
    same = all(state.fingerprints.get(n) == key(n, state, []) for n in held)
    origin = [] if same and not forgets(record["plugs"]) else [state.fingerprint_of(n) for n in held]
    return {name: key(name, written, origin) for name in written}


def replugged(stage: Stage, state: State, plugs: Mapping[str, list[str]]) -> str:
    """How what is plugged into a half-finished loop differs from what it was begun with, or nothing."""
    record = state.get("records", {}).get(stage.name)
    if record is None or not any(name in state for name in stage.loop) or stage.done(state):
        return ""
    then: dict[str, list[Any]] = dict(record["plugs"])
    now: dict[str, list[Any]] = dict(plugs)
    known = known_settings(state.get("request", {}))
    sides = ("scheduler", record["settings"], known), ("attention", record["options"], options_of(stage))
    for name, before, here in sides:
        if name in before or name in then:
            then.setdefault(name, [before.get(name)])
            now.setdefault(name, [here.get(name)])
    told = [f"{seam} was {_all(then.get(seam))}, is {_all(now.get(seam))}" for seam in dict.fromkeys((*then, *now))
            if then.get(seam) != now.get(seam)]  # fmt: skip
    return f"{stage.name} goes on with something else plugged in: {', '.join(told)}" if told else ""


def _all(plugs: list[Any] | None) -> str:
    return " and ".join(
        re.sub("(@[0-9a-f]{6})[0-9a-f]+([0-9a-f]{6})", r"\1...\2", str(plug)) for plug in plugs or ["nothing"]
    )


def wanted(stages: Sequence[Stage], state: State) -> State:
    """``state`` without what stages wrote that its request does without now."""
    for stage in stages:
        if stage.name in state.get("records", {}) and stage.skip_reason(state):
            kept = {n: r for n, r in state["records"].items() if n != stage.name}
            finished = [n for n in state["stages"] if n != stage.name]
            state = state.without(*writes_of(stage)).with_fields({"records": kept, "stages": finished})
    return state


def skip_reason(
    stages: Sequence[Stage], stage: Stage, state: State, asked: bool = False, events: Events = SILENT
) -> str | None:
    """Why ``stage`` does not run now, or None. ``asked``: it runs also if it is done."""
    if why := stage.skip_reason(state):
        return why
    if missing := [name for name in stage.triggers if name not in state]:
        return f"no {', '.join(missing)}"
    if asked or not stage.done(state):
        return None
    if reasons := outdated(stages, stage, state):
        events.emit("stage.outdated", stage=stage.name, reasons=reasons)
        return None
    return "already in the State"


def outdated(stages: Sequence[Stage], stage: Stage, state: State) -> list[str]:
    """Why the State's own request and inputs would give ``stage``, one of ``stages``, another result than the one that
    it holds; nothing if it would be the same, or if nobody wrote down what it came from."""
    record = state.get("records", {}).get(stage.name)
    if record is None:
        return []
    at = [s.name for s in stages].index(stage.name)
    later = {name for each in stages[at:] for name in writes_of(each)}  # that these are others now says nothing
    known, reasons = known_settings(state.get("request", {})), []
    for name, value in record["settings"].items():
        if name not in known:
            reasons.append(f"{name} was {value!r}, is gone")
        elif (now := known[name]) != value and (name != "scheduler" or str(value).partition("@")[0] != now):
            reasons.append(f"{name} was {value!r}, is {now!r}")
    for name, then in record["inputs"].items():
        if name not in later and (name not in state or state.fingerprint_of(name) != then):
            reasons.append(f"{name} is {'another one' if name in state else 'gone'}")
    seen = (*stage.optional, *stage.triggers)
    unseen = {*stage.loop, *later, *record["inputs"], "request"}
    return [*reasons, *(f"{n} is new" for n in dict.fromkeys(seen) if n in state and n not in unseen)]
