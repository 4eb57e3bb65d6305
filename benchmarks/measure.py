"""Time two things in turns, and keep what was found as rows of a report.

Turns (A B, B A, A B, ...) put slow spells of the machine on both sides; the ratio is the median of the ratios of
neighbours, so a drift of the clock speed does not reach it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One figure. ``theirs`` is None where there is nothing to compare with; then ``limit`` is in the row's own unit.
    Otherwise ``limit`` is the largest ratio ours / theirs that meets the target."""

    group: str
    name: str
    unit: str
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    limit: float | None = 1.0
    spread: tuple[float, float] | None = None  # smallest and largest ratio of neighbours
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) <= self.limit


def in_turns(
    ours: Callable[[], float | None], theirs: Callable[[], float | None], repeats: int, clock: Clock, warm_up: int = 1
) -> tuple[list[float], list[float]]:
    """Each function ``repeats`` times. One that returns a number has measured itself; otherwise its call is timed."""

    def once(function: Callable[[], float | None]) -> float:
        begun = clock()
        own = function()
        return clock() - begun if own is None else own

    for _ in range(warm_up):
        once(ours), once(theirs)
    a, b = [], []
    for turn in range(repeats):
        for function, values in ((ours, a), (theirs, b))[:: 1 if turn % 2 == 0 else -1]:
            values.append(once(function))
    return a, b


def compared(group: str, name: str, unit: str, ours: Sequence[float], theirs: Sequence[float], note: str = "") -> Row:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        group,
        name,
        unit,
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        samples={"ours": list(ours), "theirs": list(theirs)},
        note=note,
    )
