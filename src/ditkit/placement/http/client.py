"""HTTPChannel: a Worker behind HTTP, over TCP, TLS or a Unix socket.

Built on the standard library's client, which reads into memory that is given to it: a State of 64 MB comes and goes
without a copy. A host is reached directly, never through a proxy, and is never followed to another address. Its token
is in no setting, log or manifest. Leaves out: the other end (``host.py``), retries (``remote.py``)."""

import contextlib
import http.client
import math
import os
import socket
import ssl
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ditkit import limits
from ditkit.config import TOKEN
from ditkit.errors import DitkitError, Lost, PlaceError, SetupError
from ditkit.placement.http.framing import MEDIA_TYPE, checksum, fresh, pieces, unpack
from ditkit.placement.http.paced import Answer, TooMuch
from ditkit.placement.job import LOG, Job, Message, Question, error_of, printable
from ditkit.reading import parse_json
from ditkit.state import State

JOB, CRC = "X-Ditkit-Job", "X-Ditkit-Crc32"

CONNECT = 5.0  # seconds after which a host that does not take a connection counts as not there
MOST_WORDS = limits.ANSWER
SHORTEST = 16  # characters of a token at least; a short one can be guessed
ADDRESS = "Check the address"

ANSWERS = {
    401: ("it does not take our token", "Put the host's token into DITKIT_HOST_TOKEN"),
    404: ("there is no ditkit host at that address (404)", ADDRESS),
    413: ("so large a State is too much for it", "Raise its limit"),
}

ROUTES: Mapping[Question, tuple[str, str]] = {
    "health": ("GET", "/health"),
    "describe": ("GET", "/stages"),
    "probe": ("GET", "/stages/{}/probe"),
    "cancel": ("POST", "/jobs/{}/cancel"),
}


class HTTPChannel:
    """``timeout``: seconds without a byte after which the host is Lost. ``token``: shown to the host. ``uds``: a Unix
    socket that takes the place of the address's host and port."""

    def __init__(self, address: str, timeout: float = 60.0, token: str | None = None, uds: str | None = None):
        self.address, self.timeout, self.uds = address.rstrip("/"), timeout, uds
        self._token, self._parts, self.asked = token, urlsplit(address), f"asking {self.address}"

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        """``health`` needs no token, and answers with the number of ``jobs``."""
        method, path = ROUTES[question]
        path = path.format(name)
        with self.answer(method, path, {JOB: path}) as response:
            data = self.words(response)
            self.check(response, data)
        if (said := _object(data)) is None:
            raise self.stranger(response)
        return said

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        """Closed early, it closes the connection: the host sees that nobody waits any more, and stops."""
        buffers = inputs.buffers()
        headers = {JOB: job.to_json(), CRC: f"{checksum(buffers):08x}", "Accept": MEDIA_TYPE,
                   "Content-Type": "application/octet-stream",
                   "Content-Length": str(sum(map(len, buffers)))}  # fmt: skip
        with self.answer("POST", f"/stages/{job.stage}", headers, pieces(buffers)) as response:
            if response.status != 200:
                self.check(response, self.words(response))
            if response.headers.get("Content-Type") != MEDIA_TYPE:
                raise self.stranger(response)
            while True:
                message = unpack(exactly(response), self.address)
                yield message
                if message.last:
                    return

    def close(self) -> None:
        """Nothing stays open between two requests."""

    def words(self, response: Answer) -> bytes:
        """All of an answer that is no stream. Raises PlaceError where it has no end."""
        response.paced.expect(MOST_WORDS)
        data = response.read(MOST_WORDS + 1)
        if len(data) > MOST_WORDS:
            raise PlaceError(self.asked, f"its answer is larger than {MOST_WORDS} bytes", ADDRESS)
        if response.length:  # what was announced and did not come
            raise http.client.IncompleteRead(data, response.length)
        return data

    def connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self.uds is not None:
            return _Unix(self.uds)
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=CONNECT, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=CONNECT)

    @contextlib.contextmanager
    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Iterable[memoryview] | None = None
    ) -> Iterator[Answer]:
        """All of ``body`` goes out before anything comes back, or as much of it as the host takes. Faults are as
        ``faults`` says, here and in the block."""
        token = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        path = f"{self._parts.path.rstrip('/')}{path}"
        with self.faults(), contextlib.closing(self.connection()) as connection:
            try:
                connection.connect()
            except (TimeoutError, ConnectionError) as e:
                raise self.absent(e.strerror or f"it takes no connection in {CONNECT:g} s") from None
            except UnicodeError:
                raise PlaceError(self.asked, "that is no name of a machine", ADDRESS) from None
            connection.sock.settimeout(self.timeout)
            refused: OSError | None = None
            try:
                connection.request(method, path, body, {"Host": self._parts.netloc, **headers, **token})
            except ConnectionError as e:  # it may have said why before it closed
                refused = e
            with contextlib.closing(Answer(connection.sock, method=method, timeout=self.timeout)) as response:
                try:
                    response.begin()
                except (OSError, http.client.HTTPException) as e:
                    raise refused or e from None
                yield response

    def absent(self, why: str) -> Lost:
        """Nobody takes a connection there."""
        lost = Lost(self.asked, why.lower(), f"{ADDRESS}, and whether the host runs")
        lost.absent = True
        return lost

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Faults of the way there are Lost; an answer that is no HTTP is a PlaceError."""
        asked = self.asked
        try:
            yield
        except DitkitError:
            raise
        except ssl.SSLCertVerificationError as e:
            found = f"its certificate does not hold: {e.verify_message}"
            raise PlaceError(asked, found, "Correct it, or name the one to trust in SSL_CERT_FILE") from None
        except ssl.SSLError as e:
            if e.reason != "WRONG_VERSION_NUMBER":
                raise Lost(asked, f"TLS failed ({e.reason or e})".lower(), LOG) from None
            raise PlaceError(asked, "it does not speak TLS", "Write http://, or give it a certificate") from None
        except TooMuch:
            raise PlaceError(asked, "it sends more than any answer has", ADDRESS) from None
        except TimeoutError:
            raise Lost(asked, f"it gave no sign of life in {self.timeout:g} s", LOG) from None
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, EOFError):
            raise Lost(asked, "it stopped in the middle of its answer", LOG) from None
        except http.client.HTTPException as e:
            raise PlaceError(asked, f"it answers, but not in HTTP ({type(e).__name__})", ADDRESS) from None
        except ValueError as e:  # half a line of a chunk's size
            raise PlaceError(asked, f"its answer is garbage ({printable(e):.100})", ADDRESS) from None
        except OSError as e:
            raise Lost(asked, (e.strerror or str(e)).lower(), f"{ADDRESS}, and whether the host runs") from None

    def check(self, response: http.client.HTTPResponse, data: bytes = b"") -> None:
        """Raises what an answer other than 200 means."""
        status, what = response.status, f"it answers {response.status} {printable(response.reason):.100}".rstrip()
        if status == 200:
            return
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise PlaceError(self.asked, f"it sends us on to {where!r:.200}", "Give the address itself")
        ours = {"kind", "asked", "found", "do"} <= {*(_object(data) or ())}  # an error as our hosts tell them
        if status in (502, 503, 504):
            said = error_of(data, self.address).found if ours else what
            lost = Lost(self.asked, said, "Try again later")
            lost.after = _seconds(response.headers.get("Retry-After", "0"))
            raise lost
        if ours:
            raise error_of(data, self.address)
        raise PlaceError(self.asked, *ANSWERS.get(status, (what, LOG)))

    def stranger(self, response: http.client.HTTPResponse) -> PlaceError:
        kind = f"{printable(response.headers.get('Content-Type', 'no type')):.100}"
        return PlaceError(self.asked, f"it answers, but not as a ditkit host does ({kind})", ADDRESS)


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost", timeout=CONNECT)
        self._file = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT)
        self.sock.connect(self._file)


def _seconds(text: str) -> float:
    """That a host asks us to wait; none for what is no such number, and never longer than COME_AGAIN."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), limits.COME_AGAIN) if not math.isnan(seconds) else 0.0


def exactly(response: Answer) -> Callable[[int], bytearray | memoryview]:
    """Reads exactly so many bytes of the body. Raises EOFError where it ends before."""

    def read(size: int) -> bytearray | memoryview:
        response.paced.expect(size)
        data = fresh(size)
        view, at = memoryview(data), 0
        while at < size:
            got = response.readinto(view[at:])
            if not got:
                raise EOFError
            at += got
        return data

    return read


def _object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that it is, if it is one."""
    try:
        found = parse_json(data, "an answer")
    except DitkitError:
        return None
    return found if isinstance(found, dict) else None


def token_of() -> str | None:
    """The one of this machine as a host, from the environment, or None. Raises SetupError."""
    text = os.environ.get(TOKEN)
    return None if text is None else _checked(text.strip(), TOKEN)


def token_for(address: str, addresses: Collection[str], plain_http: bool) -> str | None:
    """The token for the host at ``address``, which is one of the ``addresses`` of this run; None where the environment
    has none for it. A token belongs to one host: DITKIT_HOST_TOKEN is a token where the run has one host, else pairs
    of an address and its token, with spaces between. Raises SetupError for a token that could go to the wrong host, or
    over plain http beyond this machine."""
    words = os.environ.get(TOKEN, "").split()
    if not words:
        return None
    asked, form = f"the token for {address}", f"Write {TOKEN}='{address} TOKEN', with a pair for each host"
    if "://" in words[0]:
        if len(words) % 2 or not all("://" in word for word in words[::2]):
            raise SetupError(asked, f"{TOKEN} holds no pairs of an address and a token", form)
        token = {origin_of(host): token for host, token in zip(words[::2], words[1::2], strict=True)}.get(
            origin_of(address)
        )
    elif len({*map(origin_of, addresses)}) > 1:
        raise SetupError(asked, f"the run has {len(addresses)} hosts, and {TOKEN} does not say whose it is", form)
    else:
        token = " ".join(words)
    if token is not None and not plain_http and address.startswith("http://") and not _is_loopback(address):
        do = "Use https:// or a tunnel to this machine, or --plain-http if you trust the network"
        raise SetupError(asked, "it would go over the network as plain text", do)
    return None if token is None else _checked(token, TOKEN)


def origin_of(address: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what a token belongs to."""
    url = urlsplit(address)
    return url.scheme, (url.hostname or "").rstrip("."), url.port or {"http": 80, "https": 443}.get(url.scheme)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def token_in(file: Path) -> str:
    """The one in ``file``. Raises SetupError."""
    asked = f"the token in {file}"
    try:
        return _checked(file.read_text(encoding="utf-8").strip(), asked)
    except (OSError, UnicodeDecodeError) as e:
        found = (e.strerror or str(e)).lower() if isinstance(e, OSError) else "it is not text"
        raise SetupError(asked, found, "Check the path") from None


def _checked(text: str, asked: str) -> str:
    if len(text) < SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        found = f"it is not {SHORTEST} or more letters, digits and signs without spaces"
        raise SetupError(asked, found, "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'")
    return text
