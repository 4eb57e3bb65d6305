"""Settings about parts that lie elsewhere: what would have no effect is refused and not ignored.

A host over HTTP has its own Setup; a child process and a Ray actor have ours, but for the device if one is given.
Options of a stage (attention, frames per chunk) travel with it and contradict nothing. Leaves out: what hosts say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from ditkit.assembly.adapters import named_expert
from ditkit.assembly.plugs import plugs_of
from ditkit.errors import SetupError
from ditkit.execution.stage_list import StageList
from ditkit.placement.spec import EXPERTS, Spec, Target, address
from ditkit.setup import Setup

HERE = Spec("here", "here")


def check(setup: Setup, specs: Mapping[Target, Spec], pipeline: StageList) -> None:
    """``setup``: as it was given. Raises SetupError for the first setting that nothing would heed."""
    used = uses(specs, pipeline)
    for asked, names, deaf in concerns(setup):
        places = [spec for name in names for spec in used.get(name, ())]
        if places and all(map(deaf, places)):
            where = " and ".join(dict.fromkeys(spec.text for spec in places))
            hosts = any(map(elsewhere, places))
            do = "Give it to the host, or name another place" if hosts else "Leave one of the two devices out"
            raise SetupError(asked, f"what it concerns is at {where}, where nobody heeds it", do)


def uses(specs: Mapping[Target, Spec], pipeline: StageList) -> dict[str, list[Spec]]:
    """For each component the places of all stages that call it. Where a loop moves at a step, all its components may be
    at all its places."""
    found: dict[str, list[Spec]] = {}
    for stage in pipeline.stages:
        own = {target: spec for target, spec in specs.items() if target.stage == stage.name}
        rest = [spec for target, spec in own.items() if target.expert is None]
        if not any(target.expert is None and not target.step for target in own):
            rest.append(HERE)
        moves = any(target.step for target in own)
        for name in stage.components:
            placed = [own[t] for t in (Target(stage.name, None, name),) if t in own]
            found.setdefault(name, []).extend(placed if placed and not moves else [*rest, *placed])
    return found


def elsewhere(spec: Spec) -> bool:
    return spec.kind == "http"


def on_other_than(device: str, spec: Spec) -> bool:
    return elsewhere(spec) or (spec.kind in ("process", "ray") and spec.device not in (None, device))


def concerns(setup: Setup) -> Iterator[tuple[str, Iterable[str], Callable[[Spec], bool]]]:
    """Each setting about components: how it was written, the names that it concerns, and which places do not heed it.

    One for all components is refused only where none of them is left to heed it."""
    plain, every = Setup(), ("tokenizer", "text_encoder", "image_encoder", *EXPERTS, "vae")
    for setting in ("components", "dtypes", "backends"):
        for name, value in getattr(setup, setting).items():
            if setting == "components" and address(value) is not None:
                continue  # it says that the host's is meant
            yield f"{setting} with {name} = {value!r}", [name], elsewhere
    for name, device in setup.devices.items():
        yield f"devices with {name} = {device!r}", [name], partial(on_other_than, device)
    for text in setup.loras:
        expert, _ = named_expert(text)
        yield f"loras with {text!r}", EXPERTS if expert in (None, "both") else [str(expert)], elsewhere
    for plug in plugs_of(setup.plugs):
        if plug.seam == "swap":
            yield f"plugs with {plug.row.name!r}", getattr(plug.row.made, "components", EXPERTS), elsewhere
    for setting, names in (("dtype_policy", EXPERTS), ("dtype", every), ("variant", every)):
        if (value := getattr(setup, setting)) != getattr(plain, setting):
            yield f"{setting} = {value!r}", names, elsewhere
    if setup.device != plain.device:
        yield f"device = {setup.device!r}", every, partial(on_other_than, setup.device)
