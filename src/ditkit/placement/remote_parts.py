"""Parts and plugs elsewhere: what a host says of its parts, made into parts of a model that nobody can load here, and
whether the code that is plugged in here is the code there.

A host is asked only for what is not on this machine. It says what code it knows besides ditkit's own: files that it was
started with and rows of installed packages. Leaves out: what a host says of itself otherwise (``remote.py``), how the
parts are held against each other (``checkpoints/model/fits.py``), and making plugs of a job (``assembly/plugs.py``)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ditkit import options
from ditkit.assembly import PLUGS, STAGES, Model, calls_of
from ditkit.assembly.plugs import START_WITH, texts_of
from ditkit.checkpoints.kinds.kind import KINDS, Kind
from ditkit.checkpoints.kinds.sizes import LARGEST
from ditkit.checkpoints.model.part import Part, Scope, component_names
from ditkit.contracts import Seams
from ditkit.errors import PlaceError, SetupError
from ditkit.execution.place import Place, Segment
from ditkit.execution.stage_list import Stage, StageList
from ditkit.hiding import printable
from ditkit.placement.job import SAME
from ditkit.placement.places import Places, uses
from ditkit.placement.remote import Remote
from ditkit.placement.spec import Spec, address
from ditkit.registry import FILES, PlugSpec, resolve
from ditkit.request import Request
from ditkit.schedulers import SCHEDULERS


def model_at(places: Places, spec: Spec) -> Mapping[str, Any]:
    """What the host says of its model as a whole. Raises Lost, PlaceError."""
    about: Mapping[str, Any] = places.remote(spec).description.get("model") or {}
    if not about.get("task"):
        do = "Start it with a whole model, or name the model here and place single stages there"
        raise PlaceError(f"taking the model from {spec.text}", "it says of none what it makes", do)
    return about


def scope_of(places: Places, parts: Mapping[str, str], whole: Spec | None = None) -> Scope:
    """Which parts may lie at the hosts of ``places``, or all but these at ``whole``. ``parts`` as in the Setup: one
    whose value is a host's address is the one at that host, whatever lies here. Raises SetupError."""
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
            do = f"Place one: placement = {{{stage} = {host.text!r}}}"
            raise SetupError(f"parts with {name} = {host.text!r}", "no stage that calls it is placed there", do)
        hosts[name] = [host]
    if whole is not None:
        hosts = {**{name: [whole] for name in component_names()}, **hosts}
    ask: dict[str, Callable[[], Part | None]] = {n: partial(_first, places, n, specs) for n, specs in hosts.items()}
    return Scope(None, ask, tuple(meant), [t.expert for t in places.specs if t.expert])


def _first(places: Places, name: str, specs: Iterable[Spec]) -> Part | None:
    """The part of that name of the first host that has one. Raises Lost, PlaceError."""
    told = ((spec.text, _told(places, spec).get(name)) for spec in dict.fromkeys(specs))
    return next((part_of(name, about, place) for place, about in told if about is not None), None)


def part_of(name: str, told: Any, place: str) -> Part:
    """What a host says of a part, checked. Raises PlaceError."""
    try:
        row, config, identity = KINDS[str(told["kind"])], told["config"], told["identity"]
        if name not in row.components or not isinstance(identity, str):
            raise ValueError(f"kind {row.name!r}")
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        _try(row, config)
        notes = tuple(map(str, told.get("notes", ())))
    except Exception as e:  # whatever a kind of somebody's makes of another one's words
        found = f"it describes it in a way that is not known here ({printable(str(e)):.200})"
        raise PlaceError(f"asking {place} for its {name}", found, SAME) from None
    layout, quantization = str(told.get("layout")), told.get("quantization")
    return Part(name, row.name, Path(name), config, None, layout, quantization, None, notes, place, told)


def _try(row: Kind, config: Mapping[str, Any]) -> None:
    """Raises whatever the kind makes of sizes that are none."""
    row.task(config)
    row.needs(config)
    if row.config_class:
        cls, what = resolve(row.config_class), f"a {row.name}"
        sizes = row.config({**config, **(options.typed(cls, config, what) if options.fields_of(cls) else {})})
        row.ports(sizes)
        if any(isinstance(n, int) and abs(n) > LARGEST for n in vars(sizes).values()):
            raise ValueError("its sizes")
        for of in (row.strides, row.patch):
            if of is not None and not all(0 < n <= 1024 for n in of(sizes)):
                raise ValueError("its strides")


def _told(places: Places, spec: Spec) -> Mapping[str, Any]:
    return places.remote(spec).description.get("parts") or {}


def check_here(model: Model, places: Places, pipeline: StageList) -> None:
    """Every part that a stage calls on this machine has to lie here. Raises SetupError. A loop that moves at a step may
    call some of its parts here only; that shows when it runs."""
    moving = {target.stage for target in places.specs if target.step}
    used = uses(places.specs, pipeline)
    for name, part in model.elsewhere.items():
        for stage, specs in used.get(name, {}).items() if name not in model.parts else ():
            if stage not in moving and any(spec.kind != "http" for spec in specs):
                found = f"its {name} lies at {part.place} and not here"
                do = f"Place it there too ({stage} = {part.place!r}), or bring the {name} here"
                raise SetupError(f"running stage {stage!r} on this machine", found, do)


def check_agree(
    model: Model, places: Places, stages: Sequence[Stage], where: Mapping[str, Sequence[Segment]], seams: Seams,
    request: Mapping[str, Any],
) -> None:  # fmt: skip
    """Of a part that lies here and at the host where its stage runs both must be the same, and so must the code that is
    plugged in. ``where``: the places of the run; others are not asked. Raises PlaceError, Lost."""
    planned = {stage.name: stage for stage in stages}
    for target, spec in places.specs.items():
        used = [segment.place.name for segment in where.get(target.stage, ())]
        if spec.kind != "http" or target.stage not in planned or spec.text not in used:
            continue
        names = [target.expert] if target.expert else planned[target.stage].components
        for name in names:
            told = _told(places, spec).get(name)
            if told is not None and name in model.parts and told.get("identity") != model.identities[name]:
                asked = f"running stage {target.stage!r} at {spec.text}"
                do = f"Use the same files, or write parts = {{{name} = {spec.text!r}}} if the one there is meant"
                raise PlaceError(asked, f"its {name} is another one than the one here", do)
    for stage in stages:
        for place in (segment.place for segment in where.get(stage.name, ())):
            if isinstance(place, Remote):
                place.check_limits(stage, request, _at_once(stage, request))
        _check_code(stage, [segment.place for segment in where.get(stage.name, ())], _needed(stage, seams, request))


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


def _at_once(stage: Stage, request: Mapping[str, Any]) -> int:
    """The clips that come to a stage together."""
    asked = Request.of(request)
    return len(asked.samples()) if asked.batched or stage.together else 1


def _check_code(stage: Stage, places: Iterable[Place], needed: Iterable[tuple[str, str, str]]) -> None:
    for place in (place for place in places if isinstance(place, Remote)):
        for group, name, code in needed:
            known, of_file = place.description.get("code", {}).get(group, {}), group == FILES
            same = code in known if of_file else known.get(name) == code
            if not same:
                other = name in (known.values() if of_file else known)
                found = f"its {name} is other code" if other else f"it does not know {name}"
                raise PlaceError(f"running stage {stage.name!r} at {place.name}", found, START_WITH)


def _needed(stage: Stage, seams: Seams, request: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Plugs, kernel and scheduler that a stage may ask for: kind, name and code of each that is not ditkit's own."""
    if not stage.loop:  # whether another one asks for the seams shows when it runs
        return []
    from ditkit.nn.attention import ATTENTION

    plugs = [PlugSpec.parse(text) for text in texts_of(seams.of(stage.components)) or ()]
    rows = [(FILES if spec.is_code else PLUGS.group, spec.code, spec.sha256) for spec in plugs]
    kernel, _, code = str(getattr(stage, "attention", "")).partition("@")
    scheduler = str(request.get("scheduler"))
    rows += [(ATTENTION.group, kernel, code), (SCHEDULERS.group, scheduler, SCHEDULERS.code(scheduler))]
    return [row for row in rows if row[2]]
