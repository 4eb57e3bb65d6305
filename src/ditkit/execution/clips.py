"""Clips: the clips of one run, one after the other. What they share is made first, for all of them. A batch is one
Execution. Leaves out: how a State is divided (``samples.py``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Self

from ditkit import samples
from ditkit.execution.execution import Execution, table_of
from ditkit.execution.place import Interrupted, failed, so_far
from ditkit.execution.stage import Stage, readable, writes_of
from ditkit.state import State


class Clips:
    """``with clips: for part in clips: part.run()`` takes a run to its end; then ``state`` holds all clips.

    ``whole``: the run as if it were one Execution. ``begun``: the States of clips that an earlier run began or
    finished, by number. Within ``with``, Ctrl-C raises Interrupted that knows the clips; other errors know them as
    ``so_far``."""

    def __init__(self, whole: Execution, begun: Mapping[int, State]):
        self.whole, self.begun, self.part = whole, begun, whole
        self.finished: list[State] = []
        self.clip: int | None = None

    @property
    def state(self) -> State:
        """How far it came; of all clips once it is at its end."""
        return self.part.state

    @property
    def together(self) -> bool:
        return self.whole.state["request"]["batched"] or samples.count(self.whole.state) == 1

    def prepare(self) -> None:
        """Load what the rest of the run calls (``Execution.prepare``)."""
        waiting = self.together or len(self.begun) < samples.count(self.whole.state)
        for state in (*([self.whole.state] if waiting else []), *self.begun.values()):
            try:
                replace(self.whole, state=state).prepare()
            except Exception as e:
                if (had := so_far(e)) is not None:
                    had.state = self.whole.state  # and not that of one clip
                raise

    def __iter__(self) -> Iterator[Execution]:
        if self.together:
            yield self.whole
            return
        table, due, names = table_of(self.whole.stages), self.whole.due, shared_by_all(self.whole.stages)
        shared = [stage for stage in due if stage.name in names]
        if self.whole.asked:  # whatever stands behind a stage that runs once more has to run once more after it
            shared = list(takewhile(lambda stage: stage.name in names, due))
        if shared:
            self.part = replace(self.whole, due=shared)
            yield self.part
        if len(shared) == len(due):
            return
        due = due[len(shared) :] if self.whole.asked else due
        keep, clips = self.whole.keep, samples.split(self.state, table)
        for i, state in enumerate(clips):
            self.clip = i
            self.part = replace(self.whole, state=self.begun.get(i, state), due=due, keep=keep and keep.of_clip(i))
            self.part.events.emit("clip", index=i, count=len(clips))
            yield self.part
            self.finished.append(self.state)
        self.part = replace(self.whole, state=samples.join(self.finished, table))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):  # between two of them
            error = Interrupted(self.part.due[0].name, self.state)
        elif isinstance(error, Exception) and so_far(error) is None:
            failed(error, self.part.due[0].name, self.state)
        if error is not None and (had := so_far(error)) is not None:
            had.clip, had.finished = self.clip, self.finished[: self.clip]
            if had is error:
                raise error from None


def shared_by_all(stages: Sequence[Stage]) -> set[str]:
    """Names of the stages that run for all clips at once: those that say so (``Stage.together``), unless they look at
    what an earlier one makes for each clip."""
    found, apart = set[str](), set[str]()
    for stage in stages:
        if stage.together and not apart & readable(stage):
            found.add(stage.name)
        else:
            apart |= {*writes_of(stage)}
    return found
