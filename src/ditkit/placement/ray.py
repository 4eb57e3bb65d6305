"""Ray: a Worker in an actor, on a cluster of this machine (``ray``) or on another one (``ray://HOST:PORT``).

Ray starts the actor, finds it a GPU and tells when it died; plain text and bytes travel. Messages are asked for in turn
and not streamed by a generator, which a ``ray://`` connection does not offer. Leaves out: starting a cluster of many
machines (``ray start``), and what has to lie there: this package and the model's files."""

import contextlib
import functools
import json
import os
import queue
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ditkit.errors import DitkitError, Lost, MissingDependency, PlaceError, SetupError
from ditkit.placement.job import SAME, Job, Message, Question, error_message, error_of
from ditkit.reading import parse_json
from ditkit.setup import Setup
from ditkit.state import State

TURN = 1.0  # seconds after which the actor answers that there is nothing new; a sign of life
CALLS = 16  # calls that an actor answers at once; stages take turns all the same
START = 600.0  # seconds that Ray has to find a machine, which it may have to start first
Answer = tuple[str, bytes]  # the kind of a message, or ``value`` for JSON, and its payload


def answering(tell: Callable[..., dict[str, Any] | None]) -> Callable[..., Answer]:
    """A method of the actor: what it tells, or its error, as bytes."""

    @functools.wraps(tell)
    def answer(*given: Any) -> Answer:
        try:
            return "value", json.dumps(tell(*given) or {}).encode()
        except Exception as e:
            if not isinstance(e, DitkitError):
                traceback.print_exc()
            return "error", bytes(error_message(e).payload)

    return answer


class Actor:
    """Runs in the cluster. Its methods take and give text and bytes."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[queue.SimpleQueue[Message], threading.Event]] = {}
        self.worker: Any = None

    @answering
    def start(self, setup: str, stages: Sequence[str], threads: int | None) -> None:
        from ditkit.placement.worker import worker_of

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.worker = worker_of(Setup(**json.loads(setup)), stages)

    @answering
    def ask(self, question: Question, name: str) -> dict[str, Any] | None:
        from ditkit.placement.probe import probe_of

        if question == "probe":
            return probe_of(self.worker, name)
        if question == "cancel" and name in self.running:
            self.running[name][1].set()
        return self.worker.describe() if question == "describe" else None

    @answering
    def submit(self, job: str, inputs: bytes) -> None:
        asked, state = Job.from_json(job), State.from_bytes(inputs, "the caller")
        messages, cancelled = self.running[asked.id] = queue.SimpleQueue(), threading.Event()
        threading.Thread(target=self._work, args=(asked, state, messages, cancelled), daemon=True).start()

    def _work(self, job: Job, inputs: State, messages: queue.SimpleQueue[Message], cancelled: threading.Event) -> None:
        try:
            self.worker.run(job, inputs, messages.put, cancelled)
        except Exception:  # its text has been sent; the log of the actor has the rest
            traceback.print_exc()

    def take(self, job: str) -> list[Answer]:
        """What has come since the last turn; nothing after ``TURN`` seconds without news."""
        if job not in self.running:
            return [("error", bytes(error_message(PlaceError("asking for a job", "it is not here", SAME)).payload))]
        messages, found = self.running[job][0], list[Answer]()
        with contextlib.suppress(queue.Empty):
            while job in self.running:
                message = messages.get(timeout=0 if found else TURN)
                found.append((message.kind, bytes(message.payload)))
                if message.last:
                    del self.running[job]
        return found


class RayChannel:
    """``address``: ``ray://HOST:PORT``, or None for a cluster on this machine, which is started unless the process has
    one. ``device``: ``cpu`` or ``cuda``; None for that of the Setup, where ``auto`` is a GPU if the cluster has one.
    With ``cuda`` the actor gets one whole GPU, of Ray's choice. ``stages``: those that it shall offer.

    A token for a cluster that wants one is Ray's own matter (``RAY_AUTH_TOKEN``). An actor on another machine uses as
    many CPU threads as Ray gives it, unless the Setup has a number. Raises SetupError for a device with a number."""

    def __init__(self, setup: Setup, address: str | None, device: str | None, stages: Sequence[str]):
        self.device = device or setup.device
        asked = f"a Ray actor on {self.device}"
        if self.device.startswith("cuda:"):
            raise SetupError(asked, "Ray chooses the GPU itself", "Write ray:cuda")
        if self.device == "mps":
            raise SetupError(asked, "Ray knows no such device", "Write process:mps")
        self.name = address or ("ray" if device is None else f"ray:{device}")
        moved: dict[str, Any] = {} if device is None else {"devices": {}}
        self.setup = setup.model_copy(update={"placement": {}, "expected_probes": {}, **moved})
        self.address, self.stages = address, list(stages)
        self._actor: Any = None
        self._kill: Callable[[], Any] = lambda: None
        self._lock = threading.RLock()

    def ask(self, question: Question, name: str = "") -> dict[str, Any]:
        if question == "cancel" and self._actor is None:
            return {}
        actor, asked = self._started(), f"asking {self.name} for {question} {name}".rstrip()
        return self._wait(asked, actor, actor.ask.remote(question, name))

    def submit(self, job: Job, inputs: State) -> Iterator[Message]:
        asked, actor = f"running stage {job.stage!r} at {self.name}", self._started()
        self._value(asked, actor.submit.remote(job.to_json(), inputs.to_bytes()))
        ended = False
        try:
            while not ended:
                found = _answers(self._get(asked, actor.take.remote(job.id)), asked)
                for message in (Message(kind, payload) for kind, payload in found or [("alive", b"")]):
                    ended = message.last
                    yield message
        finally:
            if not ended and self._actor is not None:
                self._actor.ask.remote("cancel", job.id)

    def close(self) -> None:
        with self._lock:
            self._forget()
            CLUSTER.left(self)

    def _started(self) -> Any:
        with self._lock:
            if self._actor is None:
                ray = CLUSTER.joined(self, self.address)
                gpu = self._gpu(ray)
                cpus = int(self.address is not None)  # nobody else computes on our own cluster
                actor = ray.remote(num_cpus=cpus, num_gpus=int(gpu), max_concurrency=CALLS)(Actor).remote()
                self._kill = weakref.finalize(self, _kill, actor)
                try:
                    self._start(actor, ("cuda" if gpu else "cpu") if self.device == "auto" else self.device)
                except BaseException:
                    self._forget()
                    raise
                self._actor = actor
            return self._actor

    def _forget(self) -> None:
        """The actor ends; who asks next gets another."""
        with self._lock:
            self._actor = None
            self._kill()

    def _gpu(self, ray: Any) -> bool:
        """Whether it is to have one. Raises PlaceError."""
        there = ray.cluster_resources().get("GPU", 0)
        if self.device == "cuda" and self.address is None and not there:
            raise PlaceError(f"starting an actor at {self.name}", "Ray finds no GPU on this machine", "Use ray:cpu")
        return self.device == "cuda" or (self.device == "auto" and there >= 1)

    def _start(self, actor: Any, device: str) -> None:
        """``device``: inside of the actor, where the GPU that Ray gave it is number 0."""
        import torch

        asked = f"starting an actor at {self.name}"
        self._get(asked, actor.ask.remote("health", ""), START)
        setup = self.setup.model_copy(update={"device": device}).model_dump_json()
        threads = torch.get_num_threads() if self.address is None else self.setup.threads
        self._wait(asked, actor, actor.start.remote(setup, self.stages, threads))

    def _wait(self, asked: str, actor: Any, answer: Any) -> dict[str, Any]:
        """What it tells, however long it takes, as long as the actor shows that it is alive."""
        while not CLUSTER.ray.wait([answer], timeout=self.setup.timeout)[0]:
            self._get(asked, actor.ask.remote("health", ""))
        return self._value(asked, answer)

    def _value(self, asked: str, answer: Any) -> dict[str, Any]:
        [(kind, payload)] = _answers([self._get(asked, answer)], asked)
        if kind == "error":
            raise error_of(payload, self.name)
        value = parse_json(payload, asked, PlaceError, do=SAME)
        if kind != "value" or not isinstance(value, dict):
            raise PlaceError(asked, "its answer is damaged", SAME)
        return value

    def _get(self, asked: str, answer: Any, timeout: float | None = None) -> Any:
        """Raises Lost for an actor that has died or is silent; the next one who asks starts another."""
        from ray.exceptions import GetTimeoutError, RayError

        timeout = timeout or self.setup.timeout
        try:
            return CLUSTER.ray.get(answer, timeout=timeout)
        except GetTimeoutError:
            found = f"it gave no sign of life for {timeout:g} seconds"
            do = "See with `ray status` whether a machine is free that has what the actor needs"
        except (RayError, ConnectionError) as e:
            found, do = f"its actor died ({_first_line(e)})", "Look at Ray's log"
        self._forget()
        raise Lost(asked, found, do) from None


def _answers(given: Any, asked: str) -> list[Answer]:
    """Raises PlaceError for what an actor of this version does not answer."""
    whole = isinstance(given, list) and all(
        isinstance(each, tuple | list) and list(map(type, each)) == [str, bytes] for each in given
    )
    if not whole:
        raise PlaceError(asked, "its answer is damaged", SAME)
    return [(kind, payload) for kind, payload in given]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):  # the cluster may be gone already
        CLUSTER.ray.kill(actor)


class Cluster:
    """The one that this process is connected to: Ray allows one. Started here, it ends when its last channel is closed,
    or with this process; one that was there already is left as it was found. A channel that nobody closed is no user
    any more; nothing is ended while memory is collected."""

    def __init__(self) -> None:
        self.ray: Any = None
        self.address: str | None = None
        self.ours, self.users = False, weakref.WeakSet[RayChannel]()
        self._lock = threading.RLock()

    def joined(self, user: RayChannel, address: str | None) -> Any:
        """Ray, connected. Raises MissingDependency, PlaceError, Lost."""
        with self._lock:
            try:
                import ray
            except ImportError:
                raise MissingDependency(*MISSING) from None
            self.ray = ray
            if not ray.is_initialized():
                self._begin(address)
            elif address != (self.address if self.ours else None):
                found = f"this process is connected to {self.address or 'a cluster'} already"
                raise PlaceError(f"running stages at {address or 'ray'}", found, "Use one cluster in each process")
            self.users.add(user)
            return ray

    def _begin(self, address: str | None) -> None:
        ours: dict[str, Any] = {}
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
            ours = {"num_cpus": os.cpu_count(), "include_dashboard": False}
        try:
            self.ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **ours)
        except (ValueError, ImportError) as e:  # Ray Client is a package of its own
            if "ray[client]" in str(e):
                raise MissingDependency(*MISSING) from None
            raise
        except (ConnectionError, RuntimeError) as e:
            asked = f"connecting to {address or 'a cluster on this machine'}"
            raise Lost(asked, _first_line(e), "Check the address, and RAY_AUTH_TOKEN") from None
        self.ours, self.address = True, address
        self.users.clear()

    def left(self, user: RayChannel) -> None:
        with self._lock:
            last = {*self.users} == {user}
            self.users.discard(user)
            if last and self.ours:
                self.ray.shutdown()
                self.ours = False


CLUSTER = Cluster()
MISSING = "running a stage on Ray", "Ray is not installed", 'Install it: pip install "ditkit[ray]"'
