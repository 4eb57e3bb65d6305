"""Parts that lie at hosts: what a host says of them, made into parts of a model that nobody can load here.

A host is asked only for what is not on this machine. Leaves out: what a host says of itself otherwise
(``handshake.py``), and how the parts are held against each other (``checkpoints/model/fits.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.assembly import STAGES, Model, calls_of
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.model.part import Part, Scope, component_names
from ditkit.errors import PlaceError, SetupError
from ditkit.execution.place import Segment
from ditkit.execution.stage_list import Stage, StageList
from ditkit.placement.contradictions import uses
from ditkit.placement.spec import EXPERTS, Spec, Target, address

if TYPE_CHECKING:
    from ditkit.placement.places import Places


def model_at(places: Places, spec: Spec) -> Mapping[str, Any]:
    """What the host says of its model as a whole. Raises Lost, PlaceError."""
    about = places.remote(spec).handshake.said.get("model")
    if not isinstance(about, dict) or not about.get("task"):
        raise PlaceError(
            f"taking the model from {spec.text}", "it says of none what it makes",
            "Start it with a whole model, or name the model here and place single stages there",
        )  # fmt: skip
    return about


def scope_of(places: Places, parts: Mapping[str, str]) -> Scope:
    """Which parts may lie at the hosts of ``places``. ``parts`` as in the Setup: one whose value is a host's address is
    the one at that host, whatever lies here. Raises SetupError."""
    hosts: dict[str, list[Spec]] = {}
    for target, spec in places.specs.items():
        if spec.kind == "http":
            names: Iterable[str] = [target.expert] if target.expert else calls_of(target.stage)
            for name in names:
                hosts.setdefault(name, []).insert(0 if target.expert else len(hosts[name]), spec)
    meant = {name: host for name, text in parts.items() if (host := address(text)) is not None}
    for name, host in meant.items():
        if host.address not in [spec.address for spec in hosts.get(name, ())]:
            stage = next((stage for stage in STAGES if name in calls_of(stage)), "STAGE")
            raise SetupError(
                f"parts with {name} = {host.text!r}", "no stage that calls it is placed there",
                f"Place one: placement = {{{stage} = {host.text!r}}}",
            )  # fmt: skip
        hosts[name] = [host]
    ask: dict[str, Callable[[], Part | None]] = {n: partial(_first, places, n, specs) for n, specs in hosts.items()}
    return Scope(None, ask, tuple(meant), [t.expert for t in places.specs if t.expert])


def scope_at(places: Places, spec: Spec, parts: Mapping[str, str]) -> Scope:
    """That of a model all of whose parts lie at ``spec``, but for those that other settings name."""
    scope = scope_of(places, parts)
    whole: dict[str, Callable[[], Part | None]] = {n: partial(_first, places, n, [spec]) for n in component_names()}
    return Scope(None, {**whole, **scope.elsewhere}, scope.meant, scope.experts)


def _first(places: Places, name: str, specs: Iterable[Spec]) -> Part | None:
    found = (part_at(places, spec, name) for spec in dict.fromkeys(specs))
    return next((part for part in found if part is not None), None)


def part_at(places: Places, spec: Spec, name: str) -> Part | None:
    """The host's part of that name; None if it has none. Raises Lost, PlaceError."""
    told = _told(places, spec).get(name)
    return None if told is None else part_of(name, told, spec.text)


def part_of(name: str, told: Any, place: str) -> Part:
    """What a host says of a part, checked. Raises PlaceError."""
    try:
        row, config, identity = KINDS[str(told["kind"])], told["config"], told["identity"]
        if name not in row.components or not isinstance(identity, str):
            raise ValueError(f"kind {row.name!r}")
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        if row.config_class:
            row.config(config)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise PlaceError(
            f"asking {place} for its {name}", f"it describes it in a way that is not known here ({e})",
            "Use the same version of ditkit on both machines",
        ) from None  # fmt: skip
    notes = tuple(map(str, told.get("notes", ())))
    layout, quantization = str(told.get("layout")), told.get("quantization")
    return Part(name, row.name, Path(name), config, None, layout, quantization, None, notes, place, told)


def _told(places: Places, spec: Spec) -> Mapping[str, Any]:
    parts = places.remote(spec).handshake.said.get("parts", {})
    return parts if isinstance(parts, dict) else {}


def check_here(model: Model, places: Places, pipeline: StageList) -> None:
    """Every part that a stage calls on this machine has to lie here. Raises SetupError. A loop that moves at a step may
    call some of its parts here only; that shows when it runs."""
    moving = {target.stage for target in places.specs if target.step}
    for name, specs in uses(places.specs, pipeline).items():
        part = model.elsewhere.get(name)
        stages = [stage.name for stage in pipeline.stages if name in stage.components and stage.name not in moving]
        if part is None or name in model.parts or not stages or all(spec.kind == "http" for spec in specs):
            continue
        here = next((s for s in stages if not _at_host(places, s, name)), stages[0])
        raise SetupError(
            f"running stage {here!r} on this machine", f"its {name} lies at {part.place} and not here",
            f"Place it there too ({here} = {part.place!r}), or bring the {name} here",
        )  # fmt: skip


def _at_host(places: Places, stage: str, component: str) -> bool:
    own = {target: spec for target, spec in places.specs.items() if target.stage == stage}
    spec = own.get(Target(stage, None, component if component in EXPERTS else None)) or own.get(Target(stage))
    return spec is not None and spec.kind == "http"


def check_agree(model: Model, places: Places, stages: Iterable[Stage], where: Mapping[str, Sequence[Segment]]) -> None:
    """Of a part that lies here and at the host where its stage runs both must be the same. ``where``: the places of the
    run; others are not asked. Raises PlaceError, Lost."""
    planned = {stage.name: stage for stage in stages}
    for target, spec in places.specs.items():
        used = [segment.place.name for segment in where.get(target.stage, ())]
        if spec.kind != "http" or target.stage not in planned or spec.text not in used:
            continue
        names = [target.expert] if target.expert else planned[target.stage].components
        for name in names:
            told = _told(places, spec).get(name)
            if told is not None and name in model.parts and told.get("identity") != model.identities[name]:
                raise PlaceError(
                    f"running stage {target.stage!r} at {spec.text}", f"its {name} is another one than the one here",
                    f"Use the same files, or write parts = {{{name} = {spec.text!r}}} if the one there is meant",
                )  # fmt: skip


def files_at(places: Places) -> dict[str, dict[str, dict[str, str]]]:
    """For each host its parts' files by name, with their hashes. Raises Lost, PlaceError."""
    hosts = {spec.text: _told(places, spec) for spec in places.specs.values() if spec.kind == "http"}
    return {host: {name: dict(told.get("files", {})) for name, told in parts.items()} for host, parts in hosts.items()}


def facts_of(places: Places, ran: Mapping[str, Iterable[str]], weights: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For the receipt: components that worked elsewhere, as the places tell of them. ``ran``: stage -> names of the
    places where it ran; ``weights``: the fingerprints of what worked."""
    heard, found = places.describe(), dict[str, dict[str, Any]]()
    for stage, names in ran.items():
        for place in names:
            said = heard.get(place, {})
            known = said.get("stages", {}).get(stage, {}).get("components", {})
            for name, told in said.get("parts", {}).items():
                if name in known and known[name] == weights.get(name):
                    facts = {k: v for k, v in told.items() if k not in ("kind", "config", "identity")}
                    found.setdefault(name, {**facts, "place": place})
    return found
