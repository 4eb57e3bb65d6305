"""Where one stage is carried out: a Place takes a StageCall and gives a StageResult. ``Here`` is this process.

A place sees the fields that the stage declared, and gives back what the stage wrote and what it looked at; records and
fingerprints are made from that by the caller, in one way for all places. Leaves out: other places (``placement``)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

from ditkit.errors import DitkitError, PipelineError
from ditkit.events import Events
from ditkit.execution.stage import Context, Only, Stage, StageCall, readable
from ditkit.state import State
from ditkit.store.cache import StageResult


class Interrupted(DitkitError):
    """A run was stopped (Ctrl-C, Cancel); ``state`` holds everything that was finished until then."""

    exit_code = 130

    def __init__(self, stage: str, state: State):
        super().__init__(f"running stage {stage!r}", "it was interrupted", "Resume from the State that was kept")
        self.stage, self.state = stage, state
        self.finished: list[State] = []  # of a run of several clips, those that were complete
        self.clip: int | None = None  # of clips that are made one after the other, whose State it is


def so_far(error: BaseException) -> Interrupted | None:
    """What a run had when it raised ``error``, as Ctrl-C would have given it; None for an error from elsewhere. In
    Python it is the error's attribute ``so_far``."""
    return error if isinstance(error, Interrupted) else vars(error).get("so_far")


def failed(error: BaseException, stage: str, state: State) -> None:
    """Tell on ``error`` what its run had. It may be of any class, also one whose attributes cannot be set."""
    vars(error)["so_far"] = Interrupted(stage, state)


def further(state: State, before: Mapping[str, Any]) -> bool:
    """Whether anything was computed between two States of one run."""
    return any(state.get(name) != before.get(name) for name in ("stages", "step"))


class Call:
    """A place that is ready for a StageCall: ``with call: call.take(call.run())``, then ``result``.

    Whoever has it runs it, so that nothing stands between the run and its stage. ``run`` raises what the stage raises,
    and KeyboardInterrupt where nothing can be kept. ``conclude``: what ``run`` returned as a StageResult. ``where``:
    what is noted on an error that is none of ditkit's, such as one of a plug. ``reached``: after such an error, how far
    a loop came, None where that is not known."""

    result: StageResult

    def __init__(
        self, run: Callable[[], Any], conclude: Callable[[Any], StageResult], where: Callable[[], str] | None = None,
        reached: Callable[[], StageResult | None] = lambda: None,
    ):  # fmt: skip
        self.run, self._conclude, self._where, self._stopped = run, conclude, where, False
        self.reached = reached

    def take(self, returned: Any) -> None:
        """Raises KeyboardInterrupt for a stage that was stopped; it goes no further than ``with``."""
        self.result = self._conclude(returned)
        self._stopped = self.result.stopped
        if self._stopped:
            raise KeyboardInterrupt("interrupted")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if self._where is not None and isinstance(error, Exception) and not isinstance(error, DitkitError):
            error.add_note(self._where())
        if self._where is not None and isinstance(error, SystemExit):
            raise PipelineError(
                self._where(), f"it ended Python (exit {error.code})", "Raise an error instead"
            ) from None
        return self._stopped and isinstance(error, KeyboardInterrupt)


class Place(Protocol):
    """Where a stage can run. ``name`` is how a person wrote it."""

    name: str

    def prepare(self, stage: Stage, components: Sequence[str], events: Events) -> None:
        """Make sure that ``stage`` can run with these of its components, before anything is computed: they are loaded
        here, or the host is asked who it is. Raises LoadError, or what the place has to say."""

    def fingerprints(self, stage: Stage, components: Sequence[str]) -> Mapping[str, str]:
        """Of those of these components that are there."""

    def software(self) -> Mapping[str, str]:
        """Versions of what computes there, where they are not those of this process."""

    def call(self, task: StageCall) -> Call:
        """Nothing has run yet."""


@dataclass(frozen=True)
class Segment:
    """A place, and the step of a loop from which on it takes over; 0 for a stage that is no loop."""

    place: Place
    from_step: int = 0


class Checkpointer(Protocol):
    """Keeps a run's State: after each stage, and every ``every`` steps of a loop."""

    every: int

    def __call__(self, state: State) -> None: ...

    def of_clip(self, index: int) -> "Checkpointer":
        """The keeper of one of several clips that are made one after the other; asked for only then."""


class Here:
    """This process, with these components."""

    name = "here"

    def __init__(self, components: Mapping[str, Any]):
        self.components = components

    def prepare(self, stage: Stage, components: Sequence[str], events: Events) -> None:
        for name in components:
            self.components.get(name)

    def software(self) -> Mapping[str, str]:
        return {}

    def fingerprints(self, stage: Stage, components: Sequence[str]) -> Mapping[str, str]:
        return {name: fingerprint_in(self.components, name) for name in components if name in self.components}

    def call(self, task: StageCall) -> Call:
        stage, ctx = task.stage, Context(task, self.components)
        run = partial(stage.run, Only(task.inputs, readable(stage), stage.name, "field"), ctx)
        return Call(run, ctx.result, ctx.doing, ctx.last_result)


def fingerprint_in(components: Mapping[str, Any], name: str) -> str:
    """The fingerprint of a component; if whoever holds it can tell without loading it, it is not loaded."""
    tell = getattr(components, "fingerprint_of", None)
    return tell(name) if tell is not None else getattr(components[name], "fingerprint", "none")


def checked(stage: Stage, outcome: StageResult) -> StageResult:
    """Raises PipelineError when what a stage wrote is not what it declares."""
    written: Any = outcome.written  # what a stage returned
    allowed = {*stage.writes, *stage.may_write}
    if not isinstance(written, Mapping):
        found = f"it returned {type(written).__name__}"
        raise PipelineError(f"running stage {stage.name!r}", found, "Return a dict of the fields that it writes")
    undeclared, unwritten = sorted(set(written) - allowed), [n for n in stage.writes if n not in written]
    if undeclared or unwritten:
        wrote, left_out = ", ".join(undeclared), ", ".join(unwritten)
        found = f"it wrote {wrote} undeclared" if undeclared else f"it did not write {left_out}"
        raise PipelineError(f"running stage {stage.name!r}", found, "Make its declaration and its result agree")
    return outcome
