"""``python -m ditkit.placement.process.child``: what a ``ProcessChannel`` starts. It offers stages on a Unix socket.

One line of JSON on stdin says what to offer and where. One line on stdout answers: an empty one when it listens, else
the error; before it dots, as signs of life. When stdin ends, so does the child, in the middle of whatever it does.
Leaves out: the socket's language (``host.py``)."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl: the signal that comes when the parent has died


def end_with_parent() -> None:
    """On Linux the kernel sees to it, even when this process is too busy to look at its stdin."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signs_of_life(file: BinaryIO, every: float) -> Iterator[None]:
    """Dots on ``file`` within the block."""
    ended = threading.Event()

    def live() -> None:
        while not ended.is_set():
            file.write(b".")
            file.flush()
            ended.wait(every)

    dots = threading.Thread(target=live, daemon=True)
    dots.start()
    try:
        yield
    finally:
        ended.set()
        dots.join()


def opened(told: dict[str, Any]) -> Any:
    """The app over a Worker. Raises LoadError, SetupError."""
    import torch

    from ditkit.allowed import Limits
    from ditkit.placement.http.host import app_of
    from ditkit.placement.worker import worker_of
    from ditkit.setup import Setup

    torch.set_num_threads(told["threads"])
    worker = worker_of(Setup(**told["setup"]), told["stages"])
    worker.describe()  # files are hashed now, when nobody counts the seconds
    return app_of(worker, token=told["token"], limits=Limits.unlimited(told["alive"]))


def main() -> None:
    file = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads what a library prints
    told = json.loads(sys.stdin.buffer.readline())
    end_with_parent()

    from ditkit.errors import DitkitError

    app, said = None, b""
    with signs_of_life(file, told["alive"]):
        try:
            app = opened(told)
        except DitkitError as e:
            from ditkit.placement.job import error_message

            said = bytes(error_message(e).payload)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(told["socket"])
    listener.listen()
    file.write(said + b"\n")
    file.close()
    if app is None:
        return

    import uvicorn

    from ditkit.placement.http.host import HOW

    uvicorn.Server(uvicorn.Config(app, **HOW)).run(sockets=[listener])


if __name__ == "__main__":
    main()
