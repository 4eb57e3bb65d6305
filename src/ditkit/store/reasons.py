"""Why a kept result is not the one that is asked for, in words: what differs between the two.

``about`` is what an entry of the cache knows of itself: all of its record, and the software that made it. Leaves out:
which entries are compared (``cache.py``)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_UNLASTING = re.compile(r"#[0-9a-f]{32}")


@dataclass(frozen=True)
class CacheKey:
    """What is known of a result before it is computed: all of its record but the settings that the stage will read.
    ``request``, with the settings that follow from others, and ``plugs`` tell what it would find if it looked.
    ``code`` stands for the classes of the stage and their source text; empty if nothing tells them from others.
    ``software``: versions of what computes where the stage runs, where they are not those of this process."""

    stage: str
    version: int
    code: str
    options: Mapping[str, Any]
    weights: Mapping[str, str]
    inputs: Mapping[str, str]
    request: Mapping[str, Any]
    plugs: Mapping[str, list[str]]
    software: Mapping[str, str] = field(default_factory=dict)


def describe(key: CacheKey, software: Mapping[str, str]) -> dict[str, Any]:
    """What is known before the stage runs; all of it is in the first key."""
    return {
        "stage": key.stage, "version": key.version, "code": key.code, "software": dict(software),
        "options": dict(key.options), "weights": dict(key.weights), "inputs": dict(key.inputs),
    }  # fmt: skip


def fits(about: Mapping[str, Any], key: CacheKey) -> bool:
    """Whether a result of the same first key is the one: all settings that its stage read have their value still, and
    the seams, if it asked for them, what was in them. A stage is pure, so it would read the same ones again."""
    return not _settings(about["settings"], key.request) and not _plugs(about["plugs"], key)


def differences(about: Mapping[str, Any], key: CacheKey, software: Mapping[str, str]) -> list[str]:
    """Nothing if the result is the one that is asked for."""
    now = describe(key, software)
    version = [] if about["version"] == now["version"] else ["the stage has another version"]
    code = [] if about["code"] == now["code"] or version else ["the stage has other code"]
    return [
        *_others(about["inputs"], now["inputs"]),
        *_others(about["weights"], now["weights"]),
        *_settings(about["settings"], key.request),
        *_values(about["options"], now["options"]),
        *_plugs(about["plugs"], key),
        *version,
        *code,
        *_values(about["software"], now["software"]),
    ]


def unlasting(plugs: Mapping[str, list[str]]) -> list[str]:
    """Plugs whose names no other process has (``contracts.identify``): NAME#UUID."""
    return [plug for plugged in plugs.values() for plug in plugged if _UNLASTING.search(plug)]


def _others(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Of things that are known by their fingerprints."""
    changed = [f"{name} is another one" for name in now if name in then and then[name] != now[name]]
    new = [f"{name} is new" for name in now if name not in then]
    return [*changed, *new, *(f"{name} is gone" for name in then if name not in now)]


def _values(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """1 and 1.0 and true are three values here, as they are in fingerprints."""
    texts = {n: [json.dumps(x.get(n), sort_keys=True) for x in (then, now)] for n in dict.fromkeys((*then, *now))}
    changed = [name for name, (before, after) in texts.items() if before != after]
    return [f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in changed]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _settings(then: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    return _values(then, {name: request.get(name) for name in then})


def _plugs(then: Mapping[str, list[str]] | None, key: CacheKey) -> list[str]:
    if then is None:
        return []
    seams = [s for s in dict.fromkeys((*then, *key.plugs)) if then.get(s) != key.plugs.get(s)]
    return [f"seam {seam} holds something else" for seam in seams]
