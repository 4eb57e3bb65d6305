"""Several clips in one State, and back: split it into one State for each clip, join finished ones again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditkit.state import State

_LISTS = ("prompt", "negative_prompt", "seed")
_ROWS = (("prompt_embeds", "prompt_lengths"), ("negative_prompt_embeds", "negative_prompt_lengths"))
_BATCHED = ("latents", "video")


def count(state: State) -> int:
    return len(state["prompt"])


def split(state: State) -> list[State]:
    """One State for each clip; fields that all share are in each. A State of one clip comes back as it is."""
    n = count(state)
    if n == 1:
        return [state]
    shared = {k: v for k, v in state.items() if k not in {*_LISTS, *_BATCHED, *sum(_ROWS, ()), "history"}}
    parts: list[dict[str, Any]] = [dict(shared) for _ in range(n)]
    for name in _LISTS:
        for part, value in zip(parts, state[name], strict=True):
            part[name] = [value]
    for rows, lengths in _ROWS:
        if rows in state:
            for part, value, length in zip(parts, state[rows].split(state[lengths]), state[lengths], strict=True):
                part[rows], part[lengths] = value, [length]
    for name in _BATCHED:
        if name in state:
            for part, value in zip(parts, state[name].split(1), strict=True):
                part[name] = value
    if "history" in state:
        for i, part in enumerate(parts):
            part["history"] = {k: v[i : i + 1] if v.dim() else v for k, v in state["history"].items()}
    return [State(part) for part in parts]


def join(states: Sequence[State]) -> State:
    """The inverse, for States that stand at the same point of the same request."""
    import torch

    if len(states) == 1:
        return states[0]
    first = states[0]
    fields: dict[str, Any] = dict(first)
    for name in _LISTS:
        fields[name] = [s[name][0] for s in states]
    for rows, lengths in _ROWS:
        if rows in first:
            fields[rows], fields[lengths] = torch.cat([s[rows] for s in states]), [n for s in states for n in s[lengths]]
    for name in _BATCHED:
        if name in first:
            fields[name] = torch.cat([s[name] for s in states])
    if first.get("history"):
        fields["history"] = {
            k: torch.cat([s["history"][k] for s in states]) if v.dim() else v for k, v in first["history"].items()
        }
    return State(fields)
