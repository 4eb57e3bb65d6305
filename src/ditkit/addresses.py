"""Addresses of hosts and servers: read in one way, whoever names one.

Leaves out: which secret goes to which (``keys.py``), and the words around an address (``placement/spec.py``)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
LONGEST = 253  # characters of a name of DNS


@dataclass(frozen=True)
class Address:
    """``host``: in small ASCII letters, an IPv6 address without its brackets. ``path`` has no slash at its end."""

    scheme: str
    host: str
    port: int | None
    path: str = ""
    query: str = ""

    @property
    def origin(self) -> tuple[str, str, int | None]:
        """Scheme, host and port: what a secret belongs to."""
        return self.scheme, self.host.rstrip("."), self.port or PORTS.get(self.scheme)

    @property
    def netloc(self) -> str:
        """Host and port as a header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it can only be this machine."""
        name = self.host.rstrip(".")
        try:
            return name == "localhost" or ip_address(name.partition("%")[0]).is_loopback
        except ValueError:
            return False


def parse(text: str, schemes: Collection[str] = ("http", "https")) -> Address:
    """``SCHEME://HOST[:PORT][/PATH]``. Raises ValueError, which says what is wrong and repeats nothing of ``text``."""
    if re.search(r"[\s\x00-\x20\x7f-\x9f\\]", text):
        raise ValueError("it holds a space or a character that no address has")
    try:
        url = urlsplit(text)
        host = url.hostname or ""
    except ValueError:
        raise ValueError("its host is no name and no number; a bracket may be missing") from None
    if url.scheme not in schemes:
        raise ValueError(f"it does not begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if "@" in url.netloc:
        raise ValueError("it holds a name or a password, which would stand in every manifest")
    try:
        port = url.port
    except ValueError:
        raise ValueError("its port is no number from 1 to 65535") from None
    if port == 0 or url.netloc.endswith(":"):
        raise ValueError("its port is no number from 1 to 65535")
    return Address(url.scheme, _host(host, url.netloc), port, url.path.rstrip("/"), url.query or url.fragment)


def _host(host: str, netloc: str) -> str:
    if not host:
        raise ValueError("it names no host")
    if "[" in netloc or ":" in host:
        try:
            ip_address(host)
        except ValueError:
            raise ValueError("what stands in its brackets is no IPv6 address") from None
        return host
    try:
        name = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        name = ""
    labels = name.removesuffix(".").split(".")
    if len(name) > LONGEST or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("its host is no name that a machine can have")
    return name.lower()


def origin_of(text: str) -> tuple[str, str, int | None]:
    """That of an address. Raises ValueError."""
    return parse(text).origin
