"""HTTPChannel: a Worker behind HTTP, over TCP, TLS or a Unix socket.

Built on the standard library's client, which reads into memory that is given to it: a State of 64 MB comes and goes
without a copy. A host is reached directly, never through a proxy, and is never followed to another address. Its token
is in no setting, log or manifest. Leaves out: the other end (``host.py``), retries (``remote.py``)."""

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ditkit.errors import DitkitError, Lost, PlaceError
from ditkit.hiding import echoes
from ditkit.keys import read
from ditkit.network import certificates
from ditkit.placement.http.framing import MEDIA_TYPE, checksum, fresh, pieces, unpack
from ditkit.placement.job import LOG, Job, Message, Question, error_of
from ditkit.state import State

JOB, CRC = "X-Ditkit-Job", "X-Ditkit-Crc32"

CONNECT = 5.0  # seconds after which a host that does not take a connection counts as not there
MOST_WORDS = 1 << 26  # bytes of an answer that is no stream: a model of a thousand files needs a hundredth of it
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
        self.asked = f"asking {self.address}"
        self._token, self._parts = token, read(address, self.asked)

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        """``health`` needs no token, and answers with the number of ``jobs``."""
        method, path = ROUTES[question]
        path = path.format(name)
        with self.answer(method, path, {JOB: path}) as response:
            data = self.words(response)
            self.check(response, data)
        if (said := _object(data)) is None:
            raise self.stranger(response)
        self.check_silent(json.dumps(said))
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
                self.check_silent(words_of(message))
                yield message
                if message.last:
                    return

    def check_silent(self, words: str) -> None:
        """Raise PlaceError where ``words`` repeat our token: they would be written into clips."""
        if self._token is not None and self.uds is None and echoes(words, self._token):
            raise PlaceError(self.asked, "its answer repeats our token", "Trust it no more, and make another token")

    def close(self) -> None:
        """Nothing stays open between two requests."""

    def words(self, response: http.client.HTTPResponse) -> bytes:
        """All of an answer that is no stream. Raises PlaceError where it has no end."""
        data = response.read(MOST_WORDS + 1)
        if len(data) > MOST_WORDS:
            raise PlaceError(self.asked, f"its answer is larger than {MOST_WORDS} bytes", ADDRESS)
        if response.length:  # what was announced and did not come
            raise http.client.IncompleteRead(data, response.length)
        return data

    def connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.host, self._parts.port
        if self.uds is not None:
            return _Unix(self.uds)
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=CONNECT, context=self.trusted())
        return http.client.HTTPConnection(host, port, timeout=CONNECT)

    def trusted(self) -> ssl.SSLContext:
        return certificates(self.asked) or ssl.create_default_context()

    @contextlib.contextmanager
    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Iterable[memoryview] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """All of ``body`` goes out before anything comes back. Faults are as ``faults`` says, here and in the block."""
        token = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        path = f"{self._parts.path}{path}"
        with self.faults(), contextlib.closing(self.connection()) as connection:
            connection.connect()
            connection.sock.settimeout(self.timeout)
            connection.request(method, path, body, {"Host": self._parts.netloc, **headers, **token})
            with contextlib.closing(connection.getresponse()) as response:  # it holds the socket of a host that closed
                yield response

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
        except TimeoutError:
            raise Lost(asked, f"it gave no sign of life in {self.timeout:g} s", LOG) from None
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, EOFError):
            raise Lost(asked, "it stopped in the middle of its answer", LOG) from None
        except http.client.HTTPException as e:
            raise PlaceError(asked, f"it answers, but not in HTTP ({type(e).__name__})", ADDRESS) from None
        except ValueError as e:  # half a line of a chunk's size
            raise PlaceError(asked, f"its answer is garbage ({e})", ADDRESS) from None
        except OSError as e:
            raise Lost(asked, (e.strerror or str(e)).lower(), f"{ADDRESS}, and whether the host runs") from None

    def check(self, response: http.client.HTTPResponse, data: bytes = b"") -> None:
        """Raises what an answer other than 200 means."""
        status, what = response.status, f"it answers {response.status} {response.reason}"
        if status == 200:
            return
        if 300 <= status < 400:
            where = response.headers.get("Location", "nowhere")
            raise PlaceError(self.asked, f"it sends us on to {where!r}", "Give the address itself")
        ours = {"kind", "asked", "found", "do"} <= {*(_object(data) or ())}  # an error as our hosts tell them
        if status in (502, 503, 504):
            said = error_of(data, self.address).found if ours else what
            lost = Lost(self.asked, said, "Try again later")
            with contextlib.suppress(ValueError):
                lost.after = float(response.headers.get("Retry-After", "0"))
            raise lost
        if ours:
            raise error_of(data, self.address)
        raise PlaceError(self.asked, *ANSWERS.get(status, (what, LOG)))

    def stranger(self, response: http.client.HTTPResponse) -> PlaceError:
        kind = response.headers.get("Content-Type", "no type")
        return PlaceError(self.asked, f"it answers, but not as a ditkit host does ({kind})", ADDRESS)


def words_of(message: Message) -> str:
    """What a message says but for its tensors. An error has no place here: errors hold no secrets."""
    if message.kind not in ("event", "kept", "outcome"):
        return ""
    data = memoryview(message.payload)
    if bytes(data[:1]) != b"{":  # safetensors: the length of its head, then the head
        data = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return bytes(data).decode("latin-1")


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost", timeout=CONNECT)
        self._file = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT)
        self.sock.connect(self._file)


def exactly(response: http.client.HTTPResponse) -> Callable[[int], bytearray | memoryview]:
    """Reads exactly so many bytes of the body. Raises EOFError where it ends before."""

    def read(size: int) -> bytearray | memoryview:
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
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
