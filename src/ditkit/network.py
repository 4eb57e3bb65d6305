"""The way to a server: through which proxy, if any, and by whose certificates. From the environment, as other programs
have it. Leaves out: hosts of stages, which are reached without a proxy (``placement/http``)."""

from __future__ import annotations

import importlib.util
import os
import ssl
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies

from ditkit.addresses import Address
from ditkit.errors import PlaceError

KINDS = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """``variable``: who names it. The address may hold a password, so it is not shown."""

    variable: str
    address: str = field(repr=False)


def proxy_for(server: Address, asked: str) -> Proxy | None:
    """The proxy for ``server``; None for one of this machine, for one in NO_PROXY, and where there is none. Raises
    PlaceError for one that cannot be used."""
    proxies = getproxies()
    kind = server.scheme if proxies.get(server.scheme) else "all"
    text = (proxies.get(kind) or "").strip()
    if not text or server.is_loopback or _is_excepted(server, proxies.get("no", "")):
        return None
    variable = next((name for name in os.environ if name.lower() == f"{kind}_proxy" and os.environ[name].strip()),
                    "the system's settings")  # fmt: skip
    do = f"Correct {variable}, or put {server.host} into NO_PROXY"
    address = text if "://" in text else f"http://{text}"
    try:
        url = urlsplit(address)
        usable = bool(url.hostname) and url.port != 0 and url.scheme in KINDS and address.isprintable()
    except ValueError:
        usable = False
    if not usable or " " in address:
        raise PlaceError(asked, f"the proxy in {variable} is no address that begins with {', '.join(KINDS)}", do)
    if url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        found = f"{variable} names a SOCKS proxy, and socksio is not installed"
        raise PlaceError(
            asked, found, f"Run: pip install socksio; or unset {variable}, or put {server.host} into NO_PROXY"
        )
    return Proxy(variable, address)


def _is_excepted(server: Address, listed: str) -> bool:
    """NO_PROXY: names with all below them, numbers, ranges of numbers (10.0.0.0/8), each with a port or not; ``*``."""
    name, port = server.host.rstrip("."), str(server.origin[2])
    try:
        number = ip_address(name)
    except ValueError:
        number = None
    for entry in listed.replace(";", ",").replace(",", " ").lower().split():
        entry = entry.partition("://")[2] or entry
        if entry == "*":
            return True
        if number is not None:
            host, end, rest = entry.removeprefix("[").partition("]")
            host, rest = (host, rest) if end else (entry, "") if entry.count(":") != 1 else entry.split(":")
            try:
                fits = number in ip_network(host, strict=False)
            except ValueError:
                continue
            wanted = rest.removeprefix(":")
        else:
            host, _, wanted = entry.partition(":")
            host = host.removeprefix("*").strip(".")
            fits = bool(host) and (name == host or name.endswith(f".{host}"))
        if fits and wanted in ("", port):
            return True
    return False


def certificates(asked: str) -> ssl.SSLContext | None:
    """Those that SSL_CERT_FILE or SSL_CERT_DIR name; None where neither is set. Raises PlaceError."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and not folder:
        return None
    variable, place = ("SSL_CERT_FILE", file) if file else ("SSL_CERT_DIR", folder)
    if folder and not file and not any(os.path.isdir(each) for each in folder.split(os.pathsep)):
        raise PlaceError(asked, f"{variable} names {place}, where there is no folder", f"Correct or unset {variable}")
    try:
        return ssl.create_default_context(cafile=file or None, capath=None if file else folder)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        found = (
            "no certificate is in it" if isinstance(e, ssl.SSLError) else (getattr(e, "strerror", "") or str(e)).lower()
        )
        raise PlaceError(asked, f"{variable} names {place}: {found}", f"Correct or unset {variable}") from None
