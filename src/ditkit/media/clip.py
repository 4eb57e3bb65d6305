"""A file of frames that is open: how many it has, how fast they play, and the frames themselves, one after the other.

Which of them a run takes is decided here, by time. Leaves out: what kinds of files there are (``read.py``)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ditkit.errors import StateError

from .guard import check_clip

Timed = Iterator[tuple[float, Callable[[], np.ndarray]]]
"""When each frame comes up, in seconds after the first, and what makes it: uint8 [height, width, 3]."""

_EARLY = 0.2
"""Containers round times, some to a hundredth of a second: by this part of a frame it counts as there before its time.
No usual pair of rates (24, 25, 30, 50 or 60 to 16 or 24) has frames just at that border."""


@dataclass(frozen=True)
class Clip:
    """``count`` frames, as upright as they are shown, in a file of ``size`` bytes. ``rate``: frames a second, on
    average; ``seconds``: how long they last together. Both None where nothing in the file says."""

    asked: str
    count: int
    width: int
    height: int
    size: int
    rate: float | None
    seconds: float | None
    timed: Timed

    def lasts(self, fps: float | None) -> int:
        """How many frames of ``fps`` a second it gives; for None, how many it has."""
        if fps is None or self.seconds is None:
            return self.count
        return max(1, math.ceil(round((self.seconds - self._early(fps)) * fps, 6)))

    def take(self, count: int, fps: float | None = None) -> tuple[np.ndarray, list[int]]:
        """uint8 [count, height, width, 3] and their numbers in the file: the first frames, or with ``fps`` those that
        are on screen at 0, 1 / fps, 2 / fps, ... seconds. It decodes one more than it needs. Raises StateError where
        the file ends earlier than it said, and for more than may be unpacked."""
        check_clip(count, self.width, self.height, self.size, self.asked, StateError)
        frames, taken = np.empty((count, self.height, self.width, 3), np.uint8), list[int]()
        for number, make in self._at(count, fps):
            at = len(taken)
            frames[at] = frames[at - 1] if taken[-1:] == [number] else make()
            taken.append(number)
        if len(taken) < count:
            found = f"it is damaged: only {len(taken)} of {count} frames can be read"
            raise StateError(self.asked, found, "Save it again")
        return frames, taken

    def _early(self, fps: float) -> float:
        assert self.seconds is not None
        return _EARLY * min(1 / fps, self.seconds / self.count)

    def _at(self, count: int, fps: float | None) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        if fps is None or self.seconds is None:
            yield from ((number, make) for number, (_, make) in zip(range(count), self.timed, strict=False))
            return
        shown, given, early = None, 0, self._early(fps)
        for number, (time, make) in enumerate(self.timed):
            while shown is not None and given < count and given / fps + early < time:
                yield shown
                given += 1
            if given == count:
                return
            shown = number, make
        while shown is not None and given < count and given / fps + early < self.seconds:
            yield shown
            given += 1
