"""Several clips in one State, and back: split it into one State for each clip, join finished ones again."""

from collections.abc import Mapping, Sequence
from typing import Any

from ditkit.errors import StateError
from ditkit.state import FIELDS, Field, State, digest


def count(state: State) -> int:
    return len(state["prompt"])


def split(state: State, table: Mapping[str, Field] = FIELDS) -> list[State]:
    """One State for each clip. What has one entry for each clip (its shape legend begins with B) is divided; the rest
    is in each. A State of one clip comes back as it is."""
    n = count(state)
    if n == 1:
        return [state]
    parts: list[dict[str, Any]] = [{} for _ in range(n)]
    for name, value in state.items():
        for part, own in zip(parts, _divide(name, value, state, n, table), strict=True):
            if _how(name, table) != "names" or own or not value:  # of a group a clip may have nothing
                part[name] = own
    prints = {name: _prints(whole, n) for name, whole in state.fingerprints.items() if whole}
    clips = [State(part, {k: own[i] for k, own in prints.items() if own[i]}) for i, part in enumerate(parts)]
    return [_rebased(clip, state) for clip in clips]


def _prints(whole: str, n: int) -> list[str]:
    """The fingerprints of ``n`` clips: their own where ``whole`` was joined of them, new ones where a stage made them
    together."""
    joined = whole.split("+")
    return joined if len(joined) == n else [digest(whole, i, n) for i in range(n)]


def _rebased(new: State, old: State) -> State:
    """``new`` with its records speaking of its own inputs, where they spoke of those of ``old``: its fields are other
    pieces of the same things. What was out of date in ``old`` stays so."""
    if "records" not in old:
        return new
    records = {}
    for stage, record in old["records"].items():
        same = {n for n, then in record["inputs"].items() if n in new and n in old and old.fingerprint_of(n) == then}
        records[stage] = {**record, "inputs": record["inputs"] | {n: new.fingerprint_of(n) for n in same}}
    return new.with_fields({"records": records})


def _divide(name: str, value: Any, state: State, n: int, table: Mapping[str, Field]) -> list[Any]:
    how, _, lengths = _how(name, table).partition(":")
    if how == "rows":
        return list(value.split(state[lengths]))
    if how == "members":
        return [{k: v[i : i + 1] if v.dim() else v for k, v in value.items()} for i in range(n)]
    if how == "names":
        starts = [f"clip{i}/" for i in range(n)]  # each clip has its own names in the group
        return [{k.removeprefix(start): v for k, v in value.items() if k.startswith(start)} for start in starts]
    return [value[i : i + 1] for i in range(n)] if how == "first" else [value] * n


def _how(name: str, table: Mapping[str, Field]) -> str:
    return table[name].divided if name in table else ""


def join(states: Sequence[State], table: Mapping[str, Field] = FIELDS) -> State:
    """The inverse, for States that stand at the same point of the same request.

    Raises StateError for a field that differs between the clips and is not described as one entry for each."""
    if len(states) == 1:
        return states[0]
    prints = {
        k: "+".join(s.fingerprints.get(k, "") for s in states)
        for k in dict.fromkeys(k for s in states for k in s.fingerprints)
    }
    some = (name for state in states[1:] for name in state if _how(name, table) == "names")
    names = dict.fromkeys((*states[0], *some))
    joined = State({name: _unite(name, states, table) for name in names if name != "records"}, prints)
    if "records" not in states[0]:
        return joined
    return _rebased(joined.with_fields({"records": states[0]["records"]}), states[0])


def _unite(name: str, states: Sequence[State], table: Mapping[str, Field]) -> Any:
    import torch

    how = _how(name, table).partition(":")[0]
    if how == "names":
        return {f"clip{i}/{k}": v for i, state in enumerate(states) for k, v in state.get(name, {}).items()}
    values = [s[name] for s in states]
    if how == "members":
        return {k: torch.cat([v[k] for v in values]) if first.dim() else first for k, first in values[0].items()}
    if how:
        return [x for v in values for x in v] if isinstance(values[0], list) else torch.cat(values)
    if any(digest(v) != digest(values[0]) for v in values):
        asked, found = f"joining the field {name!r} of {len(states)} clips", "each clip has another value"
        raise StateError(asked, found, "Give it one entry for each clip, and a shape legend that begins with B")
    return values[0]
