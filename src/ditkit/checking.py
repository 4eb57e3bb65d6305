"""Is a State what it says it is? Fields against the field table, counts against each other, before anything runs.

A State may come from a file that was edited, cut together or written by another version. Leaves out: damage of the
file itself (``state.py``) and whether the model is the right one (``assembly/model.py``)."""

from collections.abc import Mapping
from typing import Any

from ditkit.errors import StateError
from ditkit.request import Request
from ditkit.state import FIELDS, Field, State, kind_of

UNTOUCHED = "Take an untouched State"

_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "dict": (dict,)}
_RECORDED = ("settings", "inputs", "weights", "options", "plugs")  # dicts in a record, see records.py
_LENGTHS = {f.name: f.clips.removeprefix("rows:") for f in FIELDS.values() if f.clips.startswith("rows:")}


def fault_of(spec: Field, value: Any, sizes: dict[str, int]) -> str | None:
    """What is wrong with ``value`` as field ``spec``, or None. ``sizes`` collects what each letter of the legends
    means; a letter means one size throughout."""
    kind = kind_of(value)
    if spec.kind == "tensors" and kind == "plain" and value == {}:
        return None
    if kind != spec.kind:
        return f"it is a {type(value).__name__}, it must be {spec.kind} {spec.dtype}"
    if kind == "tensors":
        return None
    if kind == "plain":
        return _plain_fault(spec, value, sizes)
    dtype, shape, letters = str(value.dtype).removeprefix("torch."), tuple(value.shape), spec.shape.split()
    right_dtype = value.is_floating_point() if spec.dtype == "float" else dtype == spec.dtype
    if not right_dtype or len(letters) != len(shape) or not all(map(_agrees, letters, shape, [sizes] * len(shape))):
        return f"it is {dtype} {list(shape)}, it must be {spec.dtype} [{spec.shape}]"
    return None


def _plain_fault(spec: Field, value: Any, sizes: dict[str, int]) -> str | None:
    many, inner = spec.dtype.startswith("list["), spec.dtype.removeprefix("list[").removesuffix("]")
    if inner not in _PLAIN:  # a description of somebody else's
        return None
    items = value if many and isinstance(value, list) else [value]
    fits = all(isinstance(x, _PLAIN[inner]) and not isinstance(x, bool) for x in items)
    if isinstance(value, list) != many or not fits:
        return f"it is {value!r}, it must be {spec.dtype}"
    if many and spec.shape == "B" and not _agrees("B", len(value), sizes):
        return f"it has {len(value)} entries, the run makes {sizes['B']} clips"
    return None


def _agrees(letter: str, size: int, sizes: dict[str, int]) -> bool:
    return size == int(letter) if letter.isdigit() else sizes.setdefault(letter, size) == size


def check_state(state: State, table: Mapping[str, Field] = FIELDS, source: str = "") -> Request:
    """The State's request, once all its fields are what they should be. ``source``: its file. Raises StateError."""
    asked = f"running the State {source}" if source else "running a State"
    if absent := [name for name in ("request", "prompt", "negative_prompt", "seed") if name not in state]:
        raise StateError(asked, f"it has no {', '.join(absent)}", "Start it with Pipeline.begin")
    sizes: dict[str, int] = {}
    for name, value in state.items():
        if fault := fault_of(table[name], value, sizes) if name in table else None:
            raise StateError(asked, f"its field {name!r} is damaged: {fault}", UNTOUCHED)
    if not state["prompt"]:
        raise StateError(asked, "it has no prompt", UNTOUCHED)
    request = Request.whole(
        state["request"], f"the request of {source}" if source else "the State's request", StateError
    )
    check_counts(state, asked)
    for stage, record in state.get("records", {}).items():
        whole = isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in _RECORDED)
        if not whole or not all(isinstance(plugs, list) for plugs in record["plugs"].values()):
            raise StateError(asked, f"its record of stage {stage!r} is damaged", UNTOUCHED)
    model = state.get("model", {"name": ""})
    if not isinstance(model.get("parts", {}), dict) or not isinstance(model.get("name"), str):
        raise StateError(asked, "what it says of its model is damaged", UNTOUCHED)
    return request


def check_counts(state: State, asked: str) -> None:
    """Rows and their lengths, steps, noise levels, history and latents belong together. Raises StateError."""
    for rows, lengths in _LENGTHS.items():
        counts = state.get(lengths, [])
        whole = rows not in state or (min(counts, default=0) > 0 and sum(counts) == len(state[rows]))
        if (rows in state) != (lengths in state) or not whole:
            raise StateError(asked, f"{rows!r} and {lengths!r} do not fit together", UNTOUCHED)
    step, sigmas = state.get("step", 0), state.get("sigmas")
    last = step if sigmas is None else len(sigmas) - 1
    for wrong, found in (
        (step and (sigmas is None or "latents" not in state), f"{step} steps are behind it, but no sigmas or latents"),
        (sigmas is not None and "step" not in state, "it has noise levels and no count of steps"),
        (not step and state.get("history"), "its scheduler remembers steps, and none was taken"),
        (not 0 <= step <= last, f"its step {step} is not one of its run"),
        (0 < step < last and "history" not in state, "it stands between two steps without the scheduler's history"),
    ):
        if wrong:
            raise StateError(asked, found, UNTOUCHED)
