"""StageList: an immutable, ordered list of stages that is checked when it is built. Compose it, slice it, run it
(``execution.py``)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditkit.errors import PipelineError, nearest
from ditkit.execution import records
from ditkit.execution.execution import Execution, table_of
from ditkit.execution.stage import Stage
from ditkit.state import FIELDS, Field, State

SOURCES = ("prompt", "negative_prompt", "seed", "request")


@dataclass(frozen=True)
class StageList:
    """Every change gives a new, checked one. ``given``: the fields that the caller brings."""

    stages: tuple[Stage, ...]
    given: tuple[str, ...] = SOURCES

    def __init__(self, stages: Iterable[Stage], given: Iterable[str] = SOURCES):
        object.__setattr__(self, "stages", tuple(stages))
        object.__setattr__(self, "given", tuple(given))
        _check(self.stages, self.given)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.stages]

    def index(self, name: str) -> int:
        if name not in self.names:
            found = f"there is none of that name{nearest(name, self.names)}"
            raise PipelineError(f"stage {name!r}", found, f"The stages are {', '.join(self.names)}")
        return self.names.index(name)

    def __getitem__(self, name: str) -> Stage:
        return self.stages[self.index(name)]

    def insert(self, stage: Stage, *, before: str | None = None, after: str | None = None) -> "StageList":
        if (before is None) == (after is None):
            asked, found = f"inserting stage {stage.name!r}", "it needs exactly one of before= and after="
            raise PipelineError(asked, found, "Name one stage")
        at = self.index(before) if before is not None else self.index(str(after)) + 1
        return StageList([*self.stages[:at], stage, *self.stages[at:]], self.given)

    def replace(self, name: str, stage: Stage) -> "StageList":
        at = self.index(name)
        return StageList([*self.stages[:at], stage, *self.stages[at + 1 :]], self.given)

    def remove(self, name: str) -> "StageList":
        at = self.index(name)
        return StageList([*self.stages[:at], *self.stages[at + 1 :]], self.given)

    @property
    def table(self) -> dict[str, Field]:
        return table_of(self.stages)

    def slice(self, start: str | None = None, until: str | None = None) -> Sequence[Stage]:
        a = 0 if start is None else self.index(start)
        b = len(self.stages) if until is None else self.index(until) + 1
        if a >= b:
            asked = f"running from {start!r} until {until!r}"
            raise PipelineError(asked, "the first comes after the last", "Swap them")
        return self.stages[a:b]

    def planned(self, state: State, start: str | None = None, until: str | None = None) -> list[Stage]:
        """The stages from ``start`` to ``until`` that a run from ``state`` would not find done already."""
        state, asked = records.wanted(self.stages, state), start is not None
        return [s for s in self.slice(start, until) if records.skip_reason(self.stages, s, state, asked) is None]

    def outdated(self, stage: Stage, state: State) -> list[str]:
        """Why the result of ``stage`` does not belong to what the State asks for (``records.py``)."""
        return records.outdated(self.stages, stage, state)

    def run(
        self, state: State, components: Mapping[str, Any], *, start: str | None = None, until: str | None = None,
        **how: Any,
    ) -> State:  # fmt: skip
        """Thread ``state`` through the stages from ``start`` (default: the first that is not done) to ``until``.

        ``how``: stop_at_step, events, seams, debug, places, keep, results, cancel; what they are, and what is raised,
        stands at ``Execution``."""
        said = {name: value for name, value in how.items() if value is not None}
        return Execution(self.stages, state, components, self.slice(start, until), start is not None, **said).run()


def _check(stages: Sequence[Stage], given: Sequence[str]) -> None:
    """Raises PipelineError for stages that do not fit together."""
    if not stages:
        raise PipelineError("building a pipeline", "it has no stages", "Give at least one")
    table, available, possible, seen = dict(FIELDS), set(given), set(given), set()
    for stage in stages:
        where, add = f"building a pipeline with stage {stage.name!r}", "Move it, or add a stage that writes that field"
        if stage.name in seen:
            raise PipelineError(where, "another stage has that name", "Give each stage a name of its own")
        seen.add(stage.name)
        for new in stage.fields:
            old = table.setdefault(new.name, new)
            if (old.kind, old.dtype, old.shape) != (new.kind, new.dtype, new.shape):
                is_, was = f"{new.kind} {new.dtype} [{new.shape}]", f"{old.kind} {old.dtype} [{old.shape}]"
                found = f"it declares {new.name!r} as {is_}, but it is {was}"
                raise PipelineError(where, found, "Use another name or the same kind, dtype and shape")
        for name in (*stage.reads, *stage.optional, *stage.writes, *stage.may_write, *stage.triggers):
            if name not in table:
                found = f"nobody describes its field {name!r}{nearest(name, table)}"
                raise PipelineError(where, found, "Describe it in the stage's `fields`")
        for name in stage.triggers:
            if name not in possible:
                raise PipelineError(where, f"it can never run: nothing before it writes its trigger {name!r}", add)
        for name in stage.reads:
            if name not in available and not (stage.triggers and name in possible):
                raise PipelineError(where, f"it reads {name!r}, which no stage before it writes", add)
        possible |= {*stage.writes, *stage.may_write}
        if not stage.triggers:
            available |= set(stage.writes)
