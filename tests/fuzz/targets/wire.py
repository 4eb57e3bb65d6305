"""The wire, both ways: what a host sends to whoever trusts it, and what anybody sends to a host."""

from __future__ import annotations

import io
import json
import threading

from ditkit.events import Events
from ditkit.execution.place import StageCall
from ditkit.placement.http.framing import HEAD, pack, unpack
from ditkit.placement.http.host import job_of
from ditkit.placement.job import (
    Job,
    Message,
    error_of,
    event_of,
    made_by,
    options_to_send,
    outcome_to_state,
    state_to_outcome,
)
from ditkit.placement.remote import Remote
from ditkit.placement.remote_parts import part_of
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup
from ditkit.state import State

from .. import bases
from ..mutate import INTS, as_json, bytes_mutated, put, tree_mutated
from .state import mutated

NAMED = ()
PLACE = "http://127.0.0.1:9"
STAGES = ("encode_text", "denoise", "decode_latents")


def prepare(folder):
    global WORKER, PIPE, INPUTS, SENT, SAID, JOBS
    PIPE = bases.pipeline(folder, "t2v")
    WORKER = worker_of(Setup(model=str(bases.model(folder, "t2v", "diffusers")), threads=1))
    first, text, half, whole, _ = bases.states(folder)
    INPUTS = {name: _read_by(name, state) for name, state in zip(STAGES, (first, text, whole), strict=True)}
    INPUTS["denoise-half"] = _read_by("denoise", half)
    JOBS = {}
    for name in STAGES:
        stage = WORKER.stages[name]
        job = Job("j", name, options_to_send(stage), {}, None, 1, (), made_by(stage))
        JOBS[name] = json.loads(job.to_json())
    SENT = {name: _answers(Job.from_json(json.dumps(JOBS[name])), INPUTS[name]) for name in STAGES}
    SAID = json.loads(json.dumps(WORKER.describe()))


def _stage(name):
    return PIPE.stages.stages[PIPE.stages.index(name)]


def _read_by(name: str, state: State) -> State:
    stage = _stage(name)
    return State({n: state[n] for n in state if n in (*stage.reads, *stage.optional, *stage.loop)})


def _answers(job: Job, inputs: State) -> list[Message]:
    found = []
    WORKER.run(job, inputs, found.append, threading.Event())
    return found


class Liar:
    """A channel that says what it was told to say."""

    def __init__(self, said, messages):
        self.said, self.messages = said, messages

    def ask(self, question, name=""):
        return self.said if question == "describe" else {"hash": "0"} if question == "probe" else {}

    def submit(self, job, inputs):
        return iter(self.messages)

    def close(self):
        pass


def make(rng, folder) -> str:
    how = rng.choice(
        (
            "frame",
            "event",
            "event",
            "outcome",
            "outcome",
            "remote",
            "said",
            "said",
            "error",
            "job",
            "job",
            "job",
            "input",
            "input",
        )
    )
    name = rng.choice(STAGES)
    if how == "frame":
        data = b"".join(map(bytes, pack(rng.choice(SENT["encode_text"]))))
        data = bytes_mutated(rng, data)[0]
        if rng.random() < 0.5:
            data = HEAD.pack(rng.randrange(7), rng.choice(INTS) & (2**64 - 1)) + data[9:]
    elif how == "event":
        payload = bytes(rng.choice([m for m in SENT[name] if m.kind == "event"]).payload)
        if payload[:1] == b"{":
            data = (
                as_json(tree_mutated(rng, json.loads(payload))[0])
                if rng.random() < 0.8
                else bytes_mutated(rng, payload)[0]
            )
        else:
            data = mutated(rng, payload)
    elif how in ("outcome", "remote"):
        data = mutated(rng, bytes(SENT[name][-1].payload))
    elif how == "said":
        data = as_json(tree_mutated(rng, SAID)[0])
    elif how == "error":
        data = as_json(tree_mutated(rng, {"kind": "LoadError", "asked": "a", "found": "b", "do": "c"})[0])
    elif how == "job":
        data = as_json(tree_mutated(rng, JOBS[name])[0])
    else:
        if name == "denoise" and rng.random() < 0.5:
            put(folder / "kind", "denoise-half")
        kind = (folder / "kind").read_text() if (folder / "kind").exists() else name
        data = mutated(rng, INPUTS[kind].to_bytes())
    put(folder / "data", data)
    return f"{how} {name}"


def run(folder, how):
    what, name = how.split()
    data, stage = (folder / "data").read_bytes(), _stage(name)
    if what == "frame":
        stream = io.BytesIO(data)

        def read(count):
            if count > 1 << 30:
                raise MemoryError
            if len(found := stream.read(count)) < count:
                raise EOFError
            return bytearray(found)

        try:
            message = unpack(read, PLACE)
            if message.kind == "event":
                event_of(message)
        except EOFError:  # the connection ended
            pass
    elif what == "event":
        event_of(Message("event", data))
    elif what == "outcome":
        outcome, _ = state_to_outcome(Message("outcome", data).state(PLACE))
        outcome_to_state(outcome)
    elif what == "remote":
        task = StageCall(stage, INPUTS[name], {}, Events(lambda _: None), keep=lambda _: None)
        Remote(PLACE, Liar(SAID, [*SENT[name][:-1], Message("kept", data), Message("outcome", data)]), retries=0).call(
            task
        ).run()
    elif what == "said":
        _heard(data)
    elif what == "error":
        raise error_of(data, PLACE)
    else:
        state, job = INPUTS[name], json.dumps(JOBS[name])
        if what == "job":
            job = data.decode("utf-8", "replace")
        else:
            state = State.from_buffer(bytearray(data), "the caller")
        answers = _answers(job_of(job, WORKER, name), state)
        if answers[-1].kind == "error":
            raise error_of(answers[-1].payload, PLACE)


def _heard(data: bytes) -> None:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):  # the client of HTTP says so before
        return
    if not isinstance(said, dict):
        return
    remote = Remote(PLACE, Liar(said, []), retries=0)
    for name in STAGES:
        stage = _stage(name)
        remote.prepare(stage, stage.components, Events())
        remote.fingerprints(stage, stage.components)
    remote.software()
    for name, told in (remote.description.get("parts") or {}).items():
        part_of(name, told, PLACE)
