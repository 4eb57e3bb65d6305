"""Hosts that are down, slow, half dead, liars or strangers: each is its own clear error, and only what is safe is tried
again. Real sockets; one host is killed in the middle of its work."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hosting import in_thread

import ditkit
from ditkit.errors import Lost, PlaceError, StateError
from ditkit.execution.place import Segment, StageResult
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.http.framing import HEAD, LARGEST, MEDIA_TYPE, pack
from ditkit.placement.job import Job, Message, options_to_send, outcome_to_state
from ditkit.placement.remote import Remote
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup
from ditkit.state import State


@contextlib.contextmanager
def server(*answers, read=True):
    """A socket that gives each connection one of ``answers``: bytes to send before it closes, or None to stay silent.
    The last one serves all that come after."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    over, taken = threading.Event(), []

    def take(connection, answer):
        with connection:
            connection.settimeout(10)
            if read:
                with contextlib.suppress(OSError):
                    _request(connection)
            if answer is None:
                over.wait(30)
            else:
                with contextlib.suppress(OSError):
                    connection.sendall(answer)

    def listen():
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                taken.append(1)
                answer = answers[min(len(taken), len(answers)) - 1]
                threading.Thread(target=take, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
    finally:
        over.set()
        thread.join()
        listener.close()


def _request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length")]
    while len(body) < sum(sizes):
        body += connection.recv(65536)


def answer(status=200, body=b"", kind="application/json", length=None, **headers):
    more = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n".encode() + body


def frames(*sent, cut=None, more=0):
    body = b"".join(bytes(piece) for frame in sent for piece in pack(frame))[:cut]
    return answer(200, body, MEDIA_TYPE, len(body) + more)


JOB = Job("1", "encode_text")


def last(channel, state=None):
    return [*channel.submit(JOB, state or State({}))][-1]


@pytest.mark.parametrize(
    ("reply", "kind", "found"),
    [
        (b"", Lost, "stopped in the middle"),
        (b"\x00\x01garbage\r\n\r\n", PlaceError, "not in HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", PlaceError, "not as a ditkit host does .no type"),
        (answer(200, b"<html>hello</html>", "text/html"), PlaceError, "not as a ditkit host does .text/html"),
        (answer(200, b"[1]"), PlaceError, "not as a ditkit host does"),
        (answer(401), PlaceError, "does not take our token"),
        (answer(404), PlaceError, "no ditkit host at that address"),
        (answer(413), PlaceError, "too much for it"),
        (answer(418), PlaceError, "it answers 418"),
        (answer(500), PlaceError, "it answers 500"),
        (answer(502), Lost, "it answers 502"),
        (answer(503), Lost, "it answers 503"),
        (answer(504), Lost, "it answers 504"),
        (answer(302, Location="http://elsewhere/"), PlaceError, "sends us on to 'http://elsewhere/'"),
    ],
)
def test_answers_that_are_none(reply, kind, found):
    """Both to a question and to a job."""
    with server(reply) as (url, _):
        for ask in (partial(HTTPChannel(url, 10).ask, "describe"), lambda: last(HTTPChannel(url, 10))):
            with pytest.raises(PlaceError, match=found) as e:
                ask()
            assert type(e.value) is kind
            assert url in str(e.value), "it names the host"


def test_half_a_description():
    with server(answer(200, b'{"a": 1', length=50)) as (url, _), pytest.raises(Lost, match="stopped in the middle"):
        HTTPChannel(url, 10).ask("describe")


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_an_end(monkeypatch, status):
    monkeypatch.setattr("ditkit.placement.http.client.MOST_WORDS", 1000)
    for more in ({"length": 1 << 40}, {}):
        with server(answer(status, b" " * 2000, **more)) as (url, _):
            for ask in (partial(HTTPChannel(url, 10).ask, "describe"), lambda: last(HTTPChannel(url, 10))):
                with pytest.raises(PlaceError, match=r"larger than 1000 bytes|not as a ditkit host does"):
                    ask()


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_that_is_too_deep(status):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with server(answer(status, deep)) as (url, _), pytest.raises(PlaceError, match=r"not as a ditkit host|answers 400"):
        HTTPChannel(url, 10).ask("describe")


def test_a_frame_that_announces_more_than_there_is_room_for():
    """Where the system gives it all the same (memory that is not touched costs nothing), its end comes too soon."""
    with server(answer(200, HEAD.pack(2, LARGEST - 1) + b"x" * 100, MEDIA_TYPE)) as (url, _):
        with pytest.raises(PlaceError, match=r"announces 68719476735 bytes|stopped in the middle") as e:
            last(HTTPChannel(url, 10))
        assert url in str(e.value)


def test_the_body_of_an_error_of_ours_is_the_error():
    body = json.dumps({"kind": "StateError", "asked": "a", "found": "b", "do": "c"}).encode()
    with server(answer(400, body)) as (url, _), pytest.raises(StateError, match=f"a .at {url}.: b. c"):
        HTTPChannel(url, 10).ask("describe")


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Lost, match=f"127.0.0.1:{port}: connection refused"):
        HTTPChannel(f"http://127.0.0.1:{port}", 10).ask("describe")
    with pytest.raises(Lost, match=r"nowhere\.invalid"):
        HTTPChannel("http://nowhere.invalid", 10).ask("describe")


def test_silence_is_lost_when_patience_ends():
    with server(None) as (url, _):
        for ask in (partial(HTTPChannel(url, 0.3).ask, "describe"), lambda: last(HTTPChannel(url, 0.3))):
            with pytest.raises(Lost, match=r"no sign of life in 0.3 s"):
                ask()
    with server(None, read=False) as (url, _), pytest.raises(Lost, match="no sign of life"):
        last(HTTPChannel(url, 0.3), State({"a": torch.zeros(1 << 22)}))  # nobody even reads what is sent


@pytest.mark.parametrize(
    ("reply", "kind", "found"),
    [
        (frames(), Lost, "stopped in the middle"),
        (frames(Message("alive"), Message("event", b"{}"), cut=-1), Lost, "stopped in the middle"),
        (
            frames(Message("outcome", State({"a": torch.zeros(999)})), cut=2000, more=3000),
            Lost,
            "stopped in the middle",
        ),
        (answer(200, b"\x63" * 64, MEDIA_TYPE), PlaceError, "it is no message"),
        (answer(200, HEAD.pack(2, 1 << 60), MEDIA_TYPE), PlaceError, "it is no message"),
        (answer(200, HEAD.pack(2, 3) + b"abc" + bytes(4), MEDIA_TYPE), PlaceError, "changed on the way"),
    ],
)
def test_streams_that_are_none(reply, kind, found):
    with server(reply) as (url, _):
        with pytest.raises(PlaceError, match=found) as e:
            last(HTTPChannel(url, 10))
        assert type(e.value) is kind
        assert url in str(e.value)


# --- a whole run against a host that is not what it says


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe.run(begin(pipe)).state


@pytest.fixture(scope="module")
def said(tiny_model):
    """What a real host says of itself."""
    return json.loads(json.dumps(worker_of(Setup(model=str(tiny_model))).describe()))


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


def run_at(pipe, url, state=None, stage="encode_text", timeout=10.0, retries=2, **more):
    places = {stage: [Segment(Remote(url, HTTPChannel(url, timeout), retries))]}
    return pipe.stages.run(state or begin(pipe), pipe.components, places=places, until=stage, **more)


PARTS = {"tokenizer": "0" * 64, "text_encoder": "0" * 64}


def told(about):
    return answer(200, json.dumps(about).encode())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"wire": 99}, "its wire version is 99, ours is"),
        ({"schema": 0}, "its schema version is 0, ours is"),
        ({"stages": {}}, "it offers nothing"),
        ({"stages": [1]}, "its answer is damaged"),
        ({"stages": {"encode_text": {"version": 1}}}, "its answer is damaged"),
        ({"stages": {"encode_text": {"version": 99, "components": PARTS}}}, "its version of the stage is 99, ours is"),
    ],
)
def test_hosts_of_another_kind(pipe, said, change, found):
    with server(told({**said, **change})) as (url, taken):
        with pytest.raises(PlaceError, match=found):
            run_at(pipe, url)
        assert len(taken) == 1, "nothing is sent to it"


def outcome(**written):
    return frames(Message("outcome", outcome_to_state(StageResult(written, {}, {}))))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (outcome(prompt_embeds=torch.zeros(3), prompt_lengths=[3]), r"it is float32 \[3\], it must be float \[R D\]"),
        (outcome(prompt_embeds=torch.zeros(3, 4).int(), prompt_lengths=[3]), r"it is int32 \[3, 4\]"),
        (outcome(prompt_embeds=torch.zeros(3, 4), prompt_lengths=["3"]), r"it must be list\[int\]"),
        (outcome(latents=torch.zeros(1)), "nobody asked for it|latents"),
        (outcome(prompt_lengths=[3]), "did not write prompt_embeds"),
        (frames(Message("outcome", State({"a": 1}))), "does not say what it came from"),
        (frames(Message("outcome", b"abc")), "not a complete safetensors file"),
        (frames(Message("event", b"abc")), "it is damaged"),
        (frames(Message("error", b"abc")), "its error is damaged"),
    ],
)
def test_outcomes_whose_label_and_bytes_disagree(pipe, said, reply, found):
    with server(told(said), reply) as (url, taken):
        with pytest.raises(ditkit.DitkitError, match=found):
            run_at(pipe, url)
        assert len(taken) == 2, "what is wrong once is wrong again: it is not tried again"


def test_what_is_lost_is_tried_again_and_not_for_ever(pipe, said):
    half = frames(Message("alive"), Message("alive"), cut=-1)
    heard = []
    with server(told(said), half) as (url, taken), pytest.raises(PlaceError, match=r"in the middle.* \(3 times\)") as e:
        run_at(pipe, url, events=ditkit.Events(heard.append))
    assert url in str(e.value)
    assert len(taken) == 4
    assert [h["attempt"] for h in heard if h.name == "place.retry"] == [1, 2]


def test_a_full_host_says_when_to_come_again():
    with server(answer(503, Retry_After="0.5")) as (url, _), pytest.raises(Lost) as e:
        last(HTTPChannel(url, 10))
    assert e.value.after == 0.5


def test_other_weights_between_two_stages_are_noticed(pipe, tiny_model, tmp_path):
    """The handshake was with one host; what answers now at that address has another text encoder."""
    with in_thread(worker_of(Setup(model=str(tiny_model)))) as host:
        channel = HTTPChannel(host.url, 10)
        remote = Remote(host.url, channel)
        remote.prepare(pipe.stages["encode_text"], ["text_encoder"], ditkit.Events())
    with in_thread(worker_of(Setup(model=str(tiny_model), dtypes={"text_encoder": "bfloat16"}))) as host:
        channel.__init__(host.url, 10)
        with pytest.raises(StateError, match=r"its text_encoder is .* and the caller knows"):
            pipe.stages.run(begin(pipe), pipe.components, places={"encode_text": [Segment(remote)]})


# --- a host that dies


def start(tiny_model, port=0):
    command = [
        sys.executable,
        "-m",
        "ditkit",
        "host",
        "--model",
        str(tiny_model),
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DITKIT_")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean)
    return process, process.stdout.readline().split()[0]


def test_killed_in_the_middle_and_started_again(pipe, tiny_model):
    """It dies in the fourth step of twenty; the next one goes on from the last State that was kept."""
    steps, kept = 20, []
    whole = pipe.run(begin(pipe, steps=steps), until="denoise").state
    process, url = start(tiny_model)
    processes = [process]

    def listen(event):
        if event.name == "step.end" and event["step"].index == 3 and len(processes) == 1:
            processes[0].kill()
            processes[0].wait()
        if event.name == "place.retry" and len(processes) == 1:
            processes.append(start(tiny_model, url.rpartition(":")[2])[0])
        if event.name == "step.start":
            kept.append(event["step"].index)

    class Keep:
        every = 1

        def __call__(self, state):
            pass

    try:
        state = pipe.run(begin(pipe, steps=steps), until="encode_text").state
        there = run_at(pipe, url, state, "denoise", events=ditkit.Events(listen), keep=Keep(), timeout=60)
    finally:
        for each in processes:
            each.kill()
            each.communicate()
    assert there.equal(whole)
    assert there.fingerprints == whole.fingerprints
    assert len(processes) == 2
    first, again = kept[:4], kept[4:]
    assert first == [0, 1, 2, 3]
    assert max(kept.count(i) for i in range(steps)) <= 2
    assert sorted(set(again)) == list(range(again[0], steps))
    assert again[0] > 0, "it does not begin anew"


def test_a_host_that_stays_dead_is_named_at_last(pipe, tiny_model, monkeypatch):
    monkeypatch.setattr("ditkit.limits.RESTART", 0.3)
    with in_thread(worker_of(Setup(model=str(tiny_model)))) as host:
        url = host.url
        remote = Remote(url, HTTPChannel(url, 10), retries=1)
        remote.prepare(pipe.stages["encode_text"], ["text_encoder"], ditkit.Events())
    with pytest.raises(PlaceError, match=r"refused \(2 times\), and it was not there again in 0.3 s") as e:
        pipe.stages.run(begin(pipe), pipe.components, places={"encode_text": [Segment(remote)]})
    assert url in str(e.value)
    assert e.value.exit_code == 1


def test_a_job_of_another_version(pipe, tiny_model):
    with in_thread(worker_of(Setup(model=str(tiny_model)))) as host:
        stage = pipe.stages["encode_text"]
        job = Job("1", "encode_text", options_to_send(stage), wire=99)
        [*_, frame] = HTTPChannel(host.url, 10).submit(job, State({}))
    assert frame.kind == "error"
    assert b"wire version 99" in frame.payload
