"""Worker: the end of a channel where stages are carried out. It knows its stages and its components, and no caller.

One stage at a time, because they share a device. Leaves out: how jobs come and messages go (``http``, ``process``,
``ray.py``)."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ditkit import options
from ditkit.allowed import UNLIMITED, Limits, cells_of
from ditkit.assembly import STAGES, Components, Model, calls_of, pipeline_of, placed, stage_of
from ditkit.assembly.plugs import plugged, received
from ditkit.cancel import Cancel
from ditkit.checking import check_counts, fault_of
from ditkit.checkpoints.model.part import Scope
from ditkit.contracts import Seams
from ditkit.errors import DitkitError, Lost, PlaceError, RequestError, SetupError, StateError, nearest
from ditkit.events import SILENT, Event, Events
from ditkit.execution.place import Here, StageCall, StageResult, checked, fingerprint_in
from ditkit.execution.stage import Stage, readable, settings_of
from ditkit.placement.job import TICK, WIRE, Job, Message, error_message, event_message, made_by, outcome_to_state
from ditkit.placement.spec import Target
from ditkit.receipt import machine, versions
from ditkit.registry import known_code
from ditkit.request import Request
from ditkit.setup import PARTS, Setup
from ditkit.shared import Shared
from ditkit.state import FIELDS, SCHEMA, State

Send = Callable[[Message], None]


class Worker:
    """``stages``: those that it offers. ``components``: what they call. ``about``: plain facts to announce, or
    what tells them when somebody asks. ``strides`` of the model: pixels to latents;
    ``patch``: latents to tokens."""

    def __init__(
        self, stages: Mapping[str, Stage], components: Mapping[str, Any], about: Mapping[str, Any],
        strides: tuple[int, int, int] = (4, 8, 8), patch: tuple[int, int, int] = (1, 1, 1),
    ):  # fmt: skip
        self.stages, self.components, self.about = dict(stages), components, dict(about)
        self.strides, self.patch = strides, patch
        # of a field that another end's stage describes only the name may be known here
        self._table = FIELDS | {f.name: f for stage in stages.values() for f in stage.fields}
        self._turn = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Who this is: versions, machine, stages with their fields, parts with their fingerprints. Plain values."""
        return {
            "wire": WIRE, "schema": SCHEMA, "versions": versions(), "machine": machine(),
            **{name: told() if callable(told) else told for name, told in self.about.items()},
            "stages": {name: self._describe(stage) for name, stage in self.stages.items()},
        }  # fmt: skip

    def _describe(self, stage: Stage) -> dict[str, Any]:
        facts = {n: {"kind": f.kind, "dtype": f.dtype, "shape": f.shape} for n, f in self._table.items()}

        def fields(names: tuple[str, ...]) -> dict[str, Any]:
            return {n: facts.get(n, {}) for n in names}

        parts = [name for name in stage.components if name in self.components]
        return {
            "version": stage.version, "made_by": made_by(stage),
            "reads": fields(stage.reads), "optional": fields((*stage.optional, *stage.triggers)),
            "writes": fields(stage.writes), "may_write": fields(stage.may_write),
            "components": {name: fingerprint_in(self.components, name) for name in parts},
        }  # fmt: skip

    def run(self, job: Job, inputs: State, send: Send, cancelled: threading.Event, limits: Limits = UNLIMITED) -> None:
        """Sends events, what is kept on the way, and at last one outcome or one error. Raises what ``send`` raises, and
        once it has sent it what is no error of ditkit's."""
        try:
            stage = self._stage(job)
            inputs = self._checked(stage, job, inputs, limits)
            outcome, seconds = self._carry_out(stage, job, inputs, send, cancelled, limits.max_seconds)
        except KeyboardInterrupt:  # cancelled where nothing can be kept
            send(error_message(Lost(f"running stage {job.stage!r}", "it was ended there", "Look at its log")))
        except Exception as e:
            send(error_message(e))
            if not isinstance(e, DitkitError):
                raise
        else:
            send(Message("outcome", outcome_to_state(outcome, seconds)))

    def _stage(self, job: Job) -> Stage:
        asked = f"running stage {job.stage!r}"
        if job.stage not in self.stages:
            found = f"it is not offered here{nearest(job.stage, self.stages)}"
            raise PlaceError(asked, found, f"Offered are {', '.join(self.stages)}")
        return job.stage_of(self.stages[job.stage])

    def _checked(self, stage: Stage, job: Job, inputs: State, limits: Limits) -> State:
        """``inputs`` with all settings in their request."""
        asked = f"running stage {stage.name!r}"
        table, sizes = self._table, dict[str, int]()
        for name, value in inputs.items():
            if name not in readable(stage) and name != "request":
                raise StateError(asked, f"it was sent {name!r}, which it does not read", "Send what it reads")
            if fault := fault_of(table[name], value, sizes) if name in table else None:
                raise StateError(asked, f"its field {name!r} is damaged: {fault}", "Take an untouched State")
        if "request" in inputs:
            request = Request.parse(inputs["request"], "the State's request", StateError)
            inputs = inputs.with_fields({"request": _filled(stage, request, inputs["request"])})
            cells = cells_of(sizes, request, self.strides, getattr(stage, "strides", self.strides))
            limits.check(request, asked, sizes.get("B", 1), stage.together, cells)
        if absent := [name for name in stage.reads if name not in inputs]:
            raise StateError(asked, f"the State has no {', '.join(absent)}", "Run the stages before it first")
        if stage.loop:
            check_counts(inputs, asked)
            if "request" in inputs and hasattr(stage, "strides"):
                request.check_size(stage.strides[1] * self.patch[1], stage.strides[0])
        for name in stage.needs(inputs, job.stop_at_step):
            if name not in self.components:
                raise PlaceError(asked, f"there is no {name} here", "Run these steps where it is")
            mine = fingerprint_in(self.components, name)
            if job.weights.get(name, mine) != mine:
                found = f"its {name} is {mine[:16]}, and the caller knows {job.weights[name][:16]}"
                raise StateError(asked, found, "Start it with the weights, dtype and dtype_policy of that time")
        return inputs

    def _carry_out(
        self, stage: Stage, job: Job, inputs: State, send: Send, cancelled: threading.Event, max_seconds: float
    ) -> tuple[StageResult, float]:
        def listen(event: Event) -> None:
            if event.name not in job.ignore:
                send(event_message(event))

        steps_kept = [-1]

        def keep(outcome: StageResult) -> None:
            steps_kept.append(outcome.written.get("step", 0))
            send(Message("kept", outcome_to_state(outcome).to_bytes(summed=False)))

        cancel, events = Cancel(cancelled), Events(listen)
        listening = getattr(self.components, "listening", None)
        components = self.components if listening is None else listening(events)
        with self._my_turn(cancel), _ended_after(max_seconds, cancelled) as late:
            begun = time.perf_counter()
            task = StageCall(
                stage, inputs, job.weights, events, received(job.plugs), job.stop_at_step,
                keep=keep if job.keep_every else None, keep_every=job.keep_every or 1, cancel=cancel,
            )  # fmt: skip
            call = Here(components).call(task)
            try:
                with call:
                    call.take(call.run())
            except Exception:
                reached = call.reached()  # the caller goes on from there, here or elsewhere
                if reached is not None and reached.written.get("step", 0) > steps_kept[-1]:
                    keep(reached)
                raise
            except KeyboardInterrupt:
                if not late.is_set():
                    raise
            outcome = getattr(call, "result", None)
            if late.is_set() and (outcome is None or outcome.stopped):
                found = f"it took longer than the {max_seconds:g} s that this host allows a job"
                do = "Ask for less, or have its owner start it with a larger --max-seconds"
                raise PlaceError(f"running stage {stage.name!r}", found, do)
            assert outcome is not None
            return (outcome if outcome.stopped else checked(stage, outcome)), time.perf_counter() - begun

    @contextlib.contextmanager
    def _my_turn(self, cancel: Cancel) -> Iterator[None]:
        while not self._turn.acquire(timeout=TICK):
            cancel.check()
        try:
            cancel.check()
            yield
        finally:
            self._turn.release()


@contextlib.contextmanager
def _ended_after(seconds: float, cancelled: threading.Event) -> Iterator[threading.Event]:
    """Sets ``cancelled`` after so many seconds, and what it gives."""
    late = threading.Event()

    def end() -> None:
        late.set()
        cancelled.set()

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _filled(stage: Stage, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the defaults of what it leaves out; ``request`` is made of it. Our clients leave out nothing.
    Raises RequestError for a setting of the stage's own."""
    own = given.get("stage_settings", {})
    if cls := settings_of(stage):
        mine = own.get(stage.name, {})
        made = options.made(cls, mine, f"the settings of stage {stage.name!r}", RequestError)
        own = {**own, stage.name: {**asdict(made), **mine}}
    return {**request.model_dump(), **given, "stage_settings": own}


def worker_of(setup: Setup, stages: Sequence[str] | None = None, shared: Shared | None = None) -> Worker:
    """Offers ``stages``, by default all of the model; of a model of which only the parts of these stages are here, too.

    ``denoise.transformer`` and ``denoise.transformer_2`` are the loop with one of two experts. No weights are loaded.
    Raises LoadError, SetupError."""
    if setup.placement:
        asked = f"offering stages that are placed at {', '.join(sorted(set(setup.placement.values())))}"
        raise SetupError(asked, "what is offered runs here", "Leave placement out")
    setup = placed(setup)
    swaps = plugged(setup, Seams())[0].swaps  # all else that is plugged in comes with the jobs
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    targets = None if stages is None else [Target.parse(text) for text in stages]
    model = Model.open(setup.model, setup, scope=Scope(None if targets is None else _called(targets)))
    known = {stage.name: stage for stage in pipeline_of(model, setup).stages} if model.task else {}
    names = list(known) if targets is None else list(dict.fromkeys(target.stage for target in targets))
    for name in names if known else ():
        if name not in known:
            found = f"{setup.model} has no such stage{nearest(name, known)}"
            raise SetupError(f"offering the stage {name!r}", found, f"Its stages are {', '.join(known)}")
    elsewhere = {*PARTS} - {*model.known}
    components = Components(model, setup, tuple(s for s in swaps if not {*s.components} <= elsewhere), shared)
    about = {"model": model.describe()["model"], "parts": partial(parts_of, components), "code": known_code()}
    stages_here = {name: known.get(name) or stage_of(name, model, setup) for name in names}
    return Worker(stages_here, components, about, model.strides, model.patch)


def _called(targets: Sequence[Target]) -> list[str]:
    """The parts that have to be here for these stages; ``denoise.transformer_2`` is the one expert alone."""
    names: list[str] = []
    for target in targets:
        if target.step is not None or (target.expert and target.expert not in calls_of(target.stage)):
            found = "only an expert of denoise can be offered by itself"
            do = "Name the stage, or denoise.transformer or denoise.transformer_2"
            raise SetupError(f"offering a part of {target.stage}", found, do)
        if target.stage not in STAGES:
            found = f"there is none of that name{nearest(target.stage, STAGES)}"
            raise SetupError(f"offering the stage {target.stage!r}", found, f"The stages are {', '.join(STAGES)}")
        names += [target.expert] if target.expert else calls_of(target.stage)
    return [name for name in dict.fromkeys(names) if name in PARTS]


def parts_of(components: Components) -> dict[str, dict[str, Any]]:
    """What ``Model.describe`` says of each part, and where and how it is computed, with its files' hashes. They are
    read for that, as for the fingerprint."""
    told = components.model.describe()["parts"]
    return {name: {**about, **components.facts(name)} for name, about in told.items()}


def load_all(worker: Worker, events: Events = SILENT) -> None:
    """Load the parts that the offered stages call, so that a damaged file is found now. Raises LoadError."""
    assert isinstance(worker.components, Components)
    components = worker.components.listening(events)
    for name in dict.fromkeys(name for stage in worker.stages.values() for name in stage.components):
        components.get(name)
