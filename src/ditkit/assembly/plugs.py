"""Setup.plugs -> what is plugged into a run: wrappers, swaps, a scheduler, listeners and stages, made by name; and the
stages of a run: those of the model's task, and the plugged ones beside them.

A plug that was made here knows its own text: its name, its code's sha256 and all its options. That is what
fingerprints hold, what travels to other processes and hosts, and what a manifest tells. Leaves out: importing code
(``registry.py``), and what ``Seams`` given from Python are (``contracts.py``)."""

import functools
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ditkit import options
from ditkit.assembly.model import Model
from ditkit.assembly.tasks import STAGES, TASKS, StageRow
from ditkit.contracts import Seams, Swap
from ditkit.errors import DitkitError, RequestError, SetupError, StateError, nearest
from ditkit.events import Listener
from ditkit.execution.stage_list import SOURCES, Stage, StageList
from ditkit.registry import Brought, PlugSpec, Registry, Row, bring, brought
from ditkit.request import Request
from ditkit.setup import Setup

PLUGS: Registry["PlugRow"] = Registry("plug", "ditkit.plugs")

PARTS: Mapping[str, tuple[str, ...]] = {
    "predict": ("__call__",), "run_blocks": ("__call__",), "attend": ("__call__",), "swap": ("match", "make"),
    "scheduler": ("name", "needs_noise", "sigmas", "solve"), "listener": ("__call__",),
}  # fmt: skip
"""Seam -> what a plug of it must have."""

START_WITH = "Start it with the same file, and what that imports: ditkit host --plug FILE.py[:NAME]"


@dataclass(frozen=True)
class PlugRow(Row):
    """``seam``: one of ``PARTS``. ``make``: a class, whose dataclass fields are the plug's options, or a function."""

    name: str
    seam: str
    make: Any
    help: str = ""

    registry: ClassVar[Registry[Any]] = PLUGS


@dataclass(frozen=True)
class Plug:
    """One plug or stage of a Setup, understood and not yet made. ``origin``: its row's name, or FILE.py:NAME, with the
    sha256 of its code where that is not ditkit's own."""

    row: PlugRow | StageRow
    origin: PlugSpec
    options: Mapping[str, Any]

    @property
    def seam(self) -> str:
        return self.row.seam if isinstance(self.row, PlugRow) else "stage"

    def text(self, values: Mapping[str, Any]) -> str:
        return str(replace(self.origin, options=options.as_text(values)))

    def made(self) -> Any:
        """A new object for the seam, which knows its text (``plug``). Raises SetupError."""
        thing, what = self.row.made, f"the plug {self.row.name!r}"
        plug = options.made(thing, self.options, what) if inspect.isclass(thing) else thing
        if lacking := [part for part in PARTS[self.seam] if not hasattr(plug, part)]:
            found = f"it lacks {', '.join(lacking)}, which a plug of seam {self.seam} has"
            raise SetupError(what, found, f"Add {lacking[0]}, or name another seam")
        known = options.fields_of(thing)
        every = {name: getattr(plug, name) for name in known}
        try:
            counting = self.text({name: value for name, value in every.items() if known[name].compare})
            if self.seam == "swap" and not isinstance(plug, Swap):
                named = self.row.name, _named(plug.match, counting), _named(plug.make, counting)
                plug = Swap(*named, *([plug.components] if hasattr(plug, "components") else []))
            object.__setattr__(plug, "plug", self.text(every))
            if self.seam != "swap":
                object.__setattr__(plug, "fingerprint", counting)
        except (AttributeError, TypeError) as e:
            do = "Make its options plain values, and leave out __slots__ and fingerprint"
            raise SetupError(what, f"it cannot be named by its options and its code ({e})", do) from None
        return plug


def _named(function: Any, fingerprint: str) -> Any:
    """A function that is known by that and not by its own code."""
    named = functools.partial(function)
    named.fingerprint = fingerprint  # type: ignore[attr-defined]
    return named


def plugs_of(texts: Iterable[str]) -> list[Plug]:
    """What the setting ``plugs`` names, in its order; the code that it names is imported, and all rows in it are known
    afterwards. Of a whole file or module its plugs and placed stages are meant, but for those that are named one by one
    too. Raises SetupError."""
    specs = [PlugSpec.parse(text) for text in texts]
    of_code = {spec: _of_code(spec, bring(spec.code, spec.sha256)) for spec in specs if spec.is_code}
    named = {spec.code for spec in specs if not spec.is_code}
    found: list[Plug] = []
    for spec in specs:
        plugs = of_code[spec] if spec in of_code else [_of_name(spec)]
        found += [plug for plug in plugs if spec.attribute or spec not in of_code or plug.row.name not in named]
    return found


def _of_code(spec: PlugSpec, code: Brought) -> list[Plug]:
    asked = f"plugging in {spec.short}"
    if spec.attribute:
        row = _row_of(spec, code, asked)
        if isinstance(row, PlugRow | StageRow):
            name = os.path.basename(code.name) if code.name.endswith(".py") else code.name
            own = None if row in code.rows else PlugSpec(name, code.sha256, spec.attribute)
            return [_plug(row, spec.options, own)]
        if spec.options:
            raise SetupError(asked, f"options of {row.registry.noun}s are not given here", "Leave them out")
        return []
    if spec.options or not code.rows:
        found = "options are of one plug" if spec.options else "it holds no rows"
        raise SetupError(asked, found, f"Name what is meant: {spec.code}:{(*_usable(code), 'NAME')[0]}")
    rows = [row for row in code.rows if isinstance(row, PlugRow) or (isinstance(row, StageRow) and _placed(row))]
    return [_plug(row, "") for row in rows]


def _of_name(spec: PlugSpec) -> Plug:
    for registry in (PLUGS, STAGES):
        if spec.code in registry:
            row = registry[f"{spec.code}@{spec.sha256}" if spec.sha256 else spec.code]
            return _plug(row, spec.options)
    asked, known = f"the plug {spec.code!r}", [*PLUGS, *(name for name in STAGES if _placed(STAGES[name]))]
    for registry in Registry.every:
        if spec.code in registry:
            raise SetupError(asked, f"it is a {registry.noun}, which a setting of its own names", "Leave it out here")
    more = f"; known are {', '.join(known)}" if known else ""
    raise SetupError(asked, f"there is none of that name{nearest(spec.code, known)}", f"Bring it: FILE.py:NAME{more}")


def _plug(row: PlugRow | StageRow, given: str, origin: PlugSpec | None = None) -> Plug:
    what = f"the {row.registry.noun} {row.name!r}"
    if isinstance(row, PlugRow) and row.seam not in PARTS:
        found = f"its seam is {row.seam!r}{nearest(str(row.seam), PARTS)}"
        raise SetupError(what, found, f"The seams are {', '.join(PARTS)}")
    if isinstance(row, StageRow) and not _placed(row):
        raise SetupError(what, "it does not say beside which stage it stands", "Give it before or after, one of them")
    values = options.typed(row.made, given, what, whole=isinstance(row, PlugRow))
    return Plug(row, origin or PlugSpec(row.name, row.registry.code(row.name)), values)


def _placed(row: StageRow) -> bool:
    return bool(row.before) != bool(row.after)


def _usable(code: Brought) -> list[str]:
    """What the module has of its own that can be plugged in."""
    module = code.module
    own = [(name, it) for name, it in vars(module).items() if getattr(it, "__module__", "") == module.__name__]
    return [name for name, thing in own if hasattr(thing, "seam") or _is_stage(thing) or _has(thing, "scheduler")]


def _is_stage(thing: Any) -> bool:
    return inspect.isclass(thing) and all(hasattr(thing, part) for part in ("run", "reads", "writes"))


def _has(thing: Any, seam: str) -> bool:
    return all(hasattr(thing, part) for part in PARTS[seam])


def _row_of(spec: PlugSpec, code: Brought, asked: str) -> Row:
    """What an attribute of a module is, as a row."""
    name = spec.attribute
    if not hasattr(code.module, name):
        raise SetupError(asked, f"it has no {name!r}{nearest(name, _usable(code))}", "Name what stands in it")
    thing = getattr(code.module, name)
    if isinstance(thing, Row):
        return thing
    if _is_stage(thing) and isinstance(thing.name, str):
        row = StageRow(thing.name, thing, before=getattr(thing, "before", ""), after=getattr(thing, "after", ""))
        STAGES.add(row, spec.code, code.sha256)
        return STAGES[row.name]
    if isinstance(thing, Swap) or hasattr(thing, "seam") or _has(thing, "scheduler"):
        otherwise = "swap" if isinstance(thing, Swap) else "scheduler"
        return PlugRow(name, getattr(thing, "seam", otherwise), thing)
    seams = ", ".join(PARTS)
    found = f"it is a class without seam ({seams})" if inspect.isclass(thing) else f"it is a {type(thing).__name__}"
    do = f"Name a row, a class or function with the attribute seam ({seams}), a stage, a scheduler or a swap"
    raise SetupError(asked, found, do)


def plugged(setup: Setup, seams: Seams) -> tuple[Seams, tuple[Listener, ...]]:
    """``seams`` with the plugs of ``setup`` around them: the first of the setting is the outermost. Their listeners.
    Raises SetupError."""
    plugs = [plug for plug in plugs_of(setup.plugs) if plug.seam != "stage"]
    return _around(plugs, seams), tuple(plug.made() for plug in plugs if plug.seam == "listener")


def _around(plugs: Sequence[Plug], seams: Seams) -> Seams:
    predict, run_blocks, attend, swaps, schedulers = (
        tuple(plug.made() for plug in plugs if plug.seam == seam) for seam in PARTS if seam != "listener"
    )
    if len(schedulers := (*schedulers, *([] if seams.scheduler is None else [seams.scheduler]))) > 1:
        raise SetupError(f"the schedulers {' and '.join(s.name for s in schedulers)}", "a run has one", "Leave one out")
    around = (*predict, *seams.predict), (*run_blocks, *seams.run_blocks), (*attend, *seams.attend)
    return Seams(*around, (*swaps, *seams.swaps), *schedulers)


def check_scheduler(seams: Seams, request: Request) -> None:
    """Raise RequestError for a scheduler that a plug takes the place of."""
    named = request.scheduler != Request.model_fields["scheduler"].get_default() or request.scheduler_options
    if named and hasattr(seams.scheduler, "plug"):
        found = f"the plug {seams.scheduler.name!r} is the scheduler of this run"  # type: ignore[union-attr]
        raise RequestError(f"scheduler={request.scheduler!r}", found, "Leave one of them out")


def plug_facts(texts: Iterable[str]) -> list[dict[str, str]]:
    """For the receipt: each entry of the setting ``plugs``, the sha256 of its code, and where that lies."""
    found = []
    for spec in map(PlugSpec.parse, texts):
        registry: Registry[Any] = PLUGS if spec.code in PLUGS else STAGES
        name = os.path.basename(spec.code) if spec.is_file else spec.code
        here = brought(spec.sha256) if spec.is_code else None
        code, path = (here.sha256, spec.code) if here else (registry.code(name), registry.origin(name))
        found.append({"plug": replace(spec, code=name).short, "sha256": code, "path": path})
    return found


def texts_of(seams: Seams) -> list[str] | None:
    """The plugs in ``seams`` as another process makes them again; None where one was given as a Python object."""
    scheduler = () if seams.scheduler is None else (seams.scheduler,)
    texts = [getattr(plug, "plug", None) for plug in
             (*seams.predict, *seams.run_blocks, *seams.attend, *seams.swaps, *scheduler)]  # fmt: skip
    return None if None in texts else [str(text) for text in texts]


def received(texts: Iterable[str]) -> Seams:
    """The seams that a job names. Nothing is imported but rows of installed packages: a file was brought by whoever
    started this process, or it is refused. Raises SetupError."""
    plugs: list[Plug] = []
    for text in texts:
        spec = PlugSpec.parse(text)
        code = brought(spec.sha256) if spec.is_code else None
        if spec.is_code and code is None:
            raise SetupError(f"the plug {spec.short}", "this end was started without that code", START_WITH)
        plugs += _of_code(spec, code) if code is not None else [_of_name(spec)]
    if wrong := [plug for plug in plugs if plug.seam in ("stage", "listener")]:
        raise SetupError(f"the plug {wrong[0].row.name!r}", f"a {wrong[0].seam} is in no job", "Leave it out")
    return _around(plugs, Seams())


def stages_of(setup: Setup) -> list[Plug]:
    """The stages that are plugged in."""
    return [plug for plug in plugs_of(setup.plugs) if plug.seam == "stage"]


def stage_of(name: str, model: Model, setup: Setup) -> Stage:
    """One stage by its name, whatever else of ``model`` is on this machine. Raises SetupError."""
    given = next((plug.options for plug in stages_of(setup) if plug.row.name == name), {})
    try:
        return STAGES[name].build(model, setup, **given)
    except DitkitError:
        raise
    except Exception as e:
        found = f"making it fails with {type(e).__name__}: {e}"
        raise SetupError(f"the stage {name!r}", found, "Correct it, or leave it out") from e


def pipeline_of(model: Model, setup: Setup) -> StageList:
    """The stages of ``model``'s task, and the plugged ones beside them. Raises SetupError, PipelineError."""
    task = TASKS[model.task]
    names = [name for name in task.stages if STAGES[name].wanted(model, setup)]
    stages = StageList([stage_of(name, model, setup) for name in names], (*SOURCES, *task.inputs))
    for plug in stages_of(setup):
        row = STAGES[plug.row.name]
        stages = stages.insert(stage_of(row.name, model, setup), before=row.before or None, after=row.after or None)
    return stages


def check_trusted(texts: Iterable[str], asked: str) -> None:
    """Raise StateError for code that a run's folder or a clip names: it is not run because a file says so. Rows that
    are known here may be named by anybody."""
    specs = [PlugSpec.parse(text) for text in texts]
    if code := [spec.short for spec in specs if spec.is_code]:
        do = f"If you trust it, name it yourself: {' '.join(f'--plug {spec.short}' for spec in specs)}"
        raise StateError(asked, f"it was made with {code[0]}, which is code that no file may start", do)
