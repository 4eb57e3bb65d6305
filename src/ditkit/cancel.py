"""Cancel: a token that ends a run from any thread, as Ctrl-C does from the terminal."""

import threading


class Cancel:
    """``pipe(..., cancel=cancel)``: ``cancel.set()`` ends the run with Interrupted, which carries the State so far.

    A run looks at it between steps, stages and clips, and between the components that it loads. It stays set: a run
    that is given it later ends before it begins. ``event``: one that somebody else sets."""

    def __init__(self, event: threading.Event | None = None):
        self._event = event or threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise KeyboardInterrupt if it is set. A stage may call ``ctx.cancel.check()`` between pieces of its work."""
        if self._event.is_set():
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until it is set; then raise KeyboardInterrupt."""
        self._event.wait(seconds)
        self.check()
