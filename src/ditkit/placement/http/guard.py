"""Guard: what a host asks of a request before anything else looks at it, and what becomes of failures.

A browser on this machine runs pages of strangers, which can send requests here. A page is told by the name that it
gives to this machine (Host) and by where it comes from (Origin): both are checked, exactly, for every path. Leaves out:
the token (``host.py``) and how fast bytes come (``zero_copy.py``)."""

import asyncio
import contextlib
import ipaddress
import logging
import re
from typing import Any

from starlette.requests import ClientDisconnect

from ditkit.errors import DitkitError, PlaceError
from ditkit.placement.job import error_message

NAME = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
ERRORS = logging.getLogger("uvicorn.error")


class Refused(PlaceError):
    """A request that is not taken: 400 it means nothing, 401 who asks is not known, 403 a page of somebody else, 404
    there is no such thing, 408 it comes too slowly, 409 it cannot be done here, 413 a State is too large, 503 too many
    jobs wait."""

    def __init__(self, status: int, asked: str, found: str, do: str):
        super().__init__(asked, found, do)
        self.status = status


class Guard:
    """An app around ``app``; ``jobs`` are those that it has. ``any_name``: whether others than this machine may reach
    it, by whatever name, because a token tells who they are."""

    def __init__(self, app: Any, jobs: Any, any_name: bool):
        self.app, self.jobs, self.any_name = app, jobs, any_name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if scope["type"] == "http":
                check_names(scope, self.any_name)
            await self.app(scope, receive, noted)
        except (ClientDisconnect, asyncio.CancelledError):  # nobody is there to be told, or the host ends
            return
        except Exception as e:
            if not isinstance(e, DitkitError):
                ERRORS.error("a request failed", exc_info=e)
            if not begun:
                await answer(send, getattr(e, "status", 500), bytes(error_message(e).payload))


async def answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def check_names(scope: Any, any_name: bool) -> None:
    """Raises Refused."""
    hosts, origins = ([v for k, v in scope["headers"] if k == key] for key in (b"host", b"origin"))
    name = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
    parts = NAME.fullmatch(name)
    if parts is None or int(parts[2] or 0) > 65535 or (name.startswith("[") and number_of(parts[1][1:-1]) is None):
        found = f"its header Host is {name!r:.100}" if len(hosts) == 1 else f"it has {len(hosts)} headers Host"
        raise Refused(400, "a request", found, "Send one name or address of this machine, with a port")
    number = number_of(parts[1].strip("[]").lower())
    if not any_name and (number is None or not number.is_loopback):
        found = f"it is for {parts[1]}, a name that anybody can give to this machine"
        raise Refused(401, "a request", found, "Ask 127.0.0.1 or localhost, or give the host a token")
    mine = {f"{scheme}://{name}".lower() for scheme in ("http", "https")}  # a proxy may end TLS
    if scope["method"] != "OPTIONS" and any(o.decode("latin-1").lower() not in mine for o in origins):
        raise Refused(403, "a request", "it comes from a page of another place", "Ask from a program, not from a page")


def number_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a name is, with no DNS in between; None for any other name but localhost."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address("127.0.0.1" if name == "localhost" else name)
    return None
