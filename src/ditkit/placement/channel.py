"""Channel: a way to a Worker, whatever carries the bytes: HTTP, the pipe to a child process, Ray.

Leaves out: retries (``remote.py``) and what is asked (``handshake.py``, ``attempt.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from ditkit.placement.job import Job, Message
from ditkit.state import State

Question = Literal["health", "describe", "probe", "cancel"]


class Channel(Protocol):
    """Methods raise Lost when the Worker is not there or stops answering, PlaceError when it refuses."""

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        """A short answer: ``health`` that it is there, ``describe`` what ``Worker.describe`` says, ``probe`` what stage
        ``name`` makes of its fixed input (``probe.py``), ``cancel`` that job ``name`` is to stop at its next event;
        what it has is still sent."""
        ...

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        """Messages as they come, the last one an outcome or an error."""
        ...

    def close(self) -> None: ...
