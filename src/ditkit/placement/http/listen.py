"""A host that listens: its socket, uvicorn behind it, and the end that stops its jobs.

Leaves out: what it answers (``host.py``).
"""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ditkit.errors import SetupError
from ditkit.placement.http.host import Limits, app_of, number_of
from ditkit.placement.http.zero_copy import Straight
from ditkit.placement.worker import Worker

GONE = 60_000
"""Milliseconds after which a client that confirms nothing that was sent to it counts as gone (Linux)."""

FAREWELL = 5
"""Seconds that jobs have to end when the host ends."""


def bind(address: str = "127.0.0.1", port: int = 0, token: str | None = None) -> socket.socket:
    """A listening socket; port 0 is a free one. Raises SetupError for an address that others reach where there is no
    token, and for one that cannot be had."""
    number = number_of(address)
    if token is None and not (number and number.is_loopback):
        do = "Put one into DITKIT_HOST_TOKEN or give --token-file, or listen at 127.0.0.1"
        raise SetupError(f"listening at {address}", "others reach that address, and there is no token", do)
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, port), family=family)
    except OSError as e:
        asked = f"listening at {address}, port {port}"
        raise SetupError(asked, (e.strerror or str(e)).lower(), "Choose another one") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # one that died while it sent is noticed, too
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE // 2000)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections take it over from the listener
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE)
    return listener


class Host(uvicorn.Server):
    """``announce`` is told its URL once it listens. Options are uvicorn's own, such as ssl_keyfile."""

    def __init__(
        self, worker: Worker, listener: socket.socket, token: str | None = None, limits: Limits | None = None,
        announce: Callable[[str], Any] = lambda url: None, **options: Any,
    ):  # fmt: skip
        app = app_of(worker, token=token, limits=limits)
        self.jobs, self.listener, self.announce = app.state.jobs, listener, announce
        more = {"http": Straight, "log_level": "warning", "timeout_graceful_shutdown": FAREWELL, **options}
        super().__init__(uvicorn.Config(app, **more))

    @property
    def url(self) -> str:
        address, port = self.listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        return f"{'https' if self.config.is_ssl else 'http'}://{shown}:{port}"

    def serve_here(self) -> None:
        """Until it is told to end."""
        self.run(sockets=[self.listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.announce(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.jobs.cancel_all()
        await super().shutdown(sockets)
