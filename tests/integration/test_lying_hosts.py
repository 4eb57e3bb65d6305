"""A host may lie, drip, or never end. Whoever asks it gets one sentence with its name, in bounded time and memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
import struct
import threading
import time

import pytest
import torch
from hosting import in_thread

import ditkit
from ditkit import limits
from ditkit.cancel import Cancel
from ditkit.errors import DitkitError, Lost, PlaceError, SetupError
from ditkit.execution.place import Segment, StageResult
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.http.framing import HEAD, MEDIA_TYPE, pack
from ditkit.placement.job import Job, Message, outcome_to_state
from ditkit.placement.remote import Remote
from ditkit.placement.remote_parts import part_of
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup
from ditkit.state import State

JSON, STREAM = "Content-Type: application/json\r\n", f"Content-Type: {MEDIA_TYPE}\r\n"


@contextlib.contextmanager
def server(*answers):
    """Sends each connection the pieces of one of ``answers`` (an iterable, or bytes), the last one to all later ones,
    as long as somebody listens."""
    listener, over, taken = socket.create_server(("127.0.0.1", 0)), threading.Event(), []

    def take(connection, answer):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            connection.recv(1 << 20)
            for piece in [answer] if isinstance(answer, bytes) else answer():
                if over.is_set():
                    return
                connection.sendall(piece)

    def listen():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                taken.append(1)
                answer = answers[min(len(taken), len(answers)) - 1]
                threading.Thread(target=take, args=(connection, answer), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def answer(body=b"", kind=JSON, status="200 OK", **headers):
    more = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in ({"Content_Length": len(body)} | headers).items() if v)
    return f"HTTP/1.1 {status}\r\n{kind}{more}\r\n".encode("latin-1") + body


def endless(piece, first=b"", wait=0.0):
    def pieces():
        yield first
        while True:
            yield piece
            time.sleep(wait)

    return pieces


def message(kind, payload=b""):
    return b"".join(map(bytes, pack(Message(kind, payload))))


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNKED = answer(Transfer_Encoding="chunked", Content_Length=None)
OPEN = answer(kind=STREAM, Transfer_Encoding="chunked", Content_Length=None)

TO_QUESTIONS = {
    "100 for ever": endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "100 now and then": endless(b"HTTP/1.1 100 Continue\r\n\r\n", wait=0.05),
    "headers for ever": endless(b"X-A: b\r\n" * 50, b"HTTP/1.1 200 OK\r\n"),
    "a header without an end": endless(b"b" * 1000, b"HTTP/1.1 200 OK\r\nX-A: "),
    "a head that drips": endless(b"b", b"HTTP/1.1 200 OK\r\nX-A: ", wait=0.05),
    "a body that drips": endless(b" ", answer(Content_Length=10**6), wait=0.05),
    "chunks that drip": endless(chunk(b" "), CHUNKED, wait=0.05),
    "chunks for ever": endless(chunk(b" " * 100_000), CHUNKED),
    "crumbs for ever": endless(chunk(b" ") * 1000, CHUNKED),
    "trailers for ever": endless(b"X-A: b\r\n" * 1000, CHUNKED + b"0\r\n"),
    "60 MB": answer(b'{"a": "' + b"a" * 60_000_000 + b'"}'),
    "many numbers": answer(b'{"a": [' + b"1," * 5_000_000 + b"1]}"),
    "deep": answer(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "digits": answer(b'{"a": ' + b"1" * 5000 + b"}"),
    "gzip": answer(gzip.compress(b" " * 10_000_000), Content_Encoding="gzip"),
    "too long a length": answer(b"{}", Content_Length=10**30),
    "a negative chunk": CHUNKED + b"-5\r\nabcdefgh\r\n0\r\n\r\n",
    "chunks of letters": CHUNKED + b"xyz\r\n{}\r\n",
    "a large chunk": CHUNKED + b"ffffffffffffffff\r\n{}",
    "a redirect": answer(status="307 X", Location="http://evil.example/" + "x" * 5000),
    "a redirect with escapes": answer(status="302 X", Location="\x1b]0;evil\x07"),
    "words with escapes": answer(status="418 \x1b[2J" + "x" * 3000),
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no HTTP": b"\x00\xff" * 100,
    "an error of nobody": answer(b'{"kind": 1, "asked": [], "found": {}, "do": null}', status="400 X"),
    "a long error": answer(json.dumps(dict.fromkeys(("kind", "asked", "found", "do"), "x\x1b" * 100_000)).encode(),
                           status="400 X"),
    "a list": answer(b"[]"),
    "come again": answer(status="503 X", Retry_After="inf"),
}  # fmt: skip

TO_JOBS = {
    "alive for ever": endless(chunk(message("alive")) * 500, OPEN),
    "alive now and then": endless(chunk(message("alive")), OPEN, wait=0.02),
    "alive with a load": OPEN + chunk(HEAD.pack(4, 1 << 20)),
    "events for ever": endless(
        chunk(message("event", b'{"name": "a.b", "seconds": 0.0, "span": 0, "parent": 0, "values": {}}')) * 100, OPEN
    ),
    "a message that drips": endless(chunk(b"\0"), OPEN, wait=0.05),
    "a payload that drips": endless(chunk(b"a"), OPEN + chunk(HEAD.pack(0, 1 << 20)), wait=0.05),
    "a large error": OPEN + chunk(HEAD.pack(3, 1 << 33)),
    "a large event": OPEN + chunk(HEAD.pack(0, 1 << 33)),
    "a large outcome": OPEN + chunk(HEAD.pack(2, 1 << 40)),
    "crumbs": endless(chunk(b"a") * 1000, OPEN + chunk(HEAD.pack(2, 1000))),
}


@pytest.fixture
def hurry(monkeypatch):
    """Budgets of tests."""
    for name, value in {"MESSAGES": 2000, "AT_WORK": 0.5, "RESTART": 0.5}.items():
        monkeypatch.setattr(limits, name, value)
    monkeypatch.setattr("ditkit.placement.http.client.MOST_WORDS", 1 << 18)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def said(tiny_model):
    return json.loads(json.dumps(worker_of(Setup(model=str(tiny_model))).describe()))


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


def run_at(pipe, url, retries=0, stage="encode_text", state=None, timeout=0.6, **more):
    places = {stage: [Segment(Remote(url, HTTPChannel(url, timeout), retries))]}
    return pipe.stages.run(state or begin(pipe), pipe.components, places=places, until=stage, **more)


def check_sentence(error, url):
    assert url in str(error)
    assert len(str(error)) < 7000
    assert str(error).isprintable()


@pytest.mark.parametrize("what", TO_QUESTIONS)
def test_what_a_host_answers_to_a_question(what, hurry):
    begun = time.monotonic()
    with server(TO_QUESTIONS[what]) as (url, _):
        with pytest.raises(DitkitError) as e:
            HTTPChannel(url, 0.6).ask("describe")
        check_sentence(e.value, url)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("what", TO_JOBS)
def test_what_a_host_answers_to_a_job(pipe, said, what, hurry):
    begun = time.monotonic()
    with server(answer(json.dumps(said).encode()), TO_JOBS[what]) as (url, _):
        with pytest.raises(DitkitError) as e:
            run_at(pipe, url)
        check_sentence(e.value, url)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("text", "after"),
    [("inf", 300), ("1e9", 300), ("999999999999999999999", 300), ("nan", 0), ("-5", 0), ("soon", 0), ("2", 2), ("", 0),
     ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("1e400", 300)],
)  # fmt: skip
def test_how_long_a_host_may_ask_to_wait(text, after):
    with server(answer(status="503 X", Retry_After=text)) as (url, _), pytest.raises(Lost) as e:
        HTTPChannel(url, 5).ask("describe")
    assert e.value.after == after


def test_an_error_that_comes_before_all_was_sent_is_told():
    said = {"kind": "PlaceError", "asked": "a", "found": "too much", "do": "c"}

    def refuse():
        yield answer(json.dumps(said).encode(), status="413 X", Connection="close")

    with server(refuse) as (url, _), pytest.raises(PlaceError, match="too much"):
        list(HTTPChannel(url, 5).submit(Job("1", "a"), State({"a": torch.zeros(1 << 24)})))


@pytest.mark.parametrize("name", ["http://" + "a" * 70, "http://a..b", "http://xn--" + "ü" * 80])
def test_names_that_are_none(name):
    with pytest.raises((PlaceError, SetupError)) as e:
        HTTPChannel(name, 2).ask("describe")
    assert name in str(e.value)


FIELDS = [
    ("stages.encode_text.version", None), ("stages.encode_text.version", True), ("stages.encode_text", []),
    ("stages.encode_text.components", []), ("stages.encode_text.components", {"text_encoder": 1}),
    ("stages.encode_text.made_by", 5), ("versions", "x"), ("versions", {"torch": 2}), ("machine", 1),
    ("machine.threads", "x"), ("model", []), ("model.task", 1), ("model.boundary", 7), ("model.boundary", float("nan")),
    ("model.flow_shift", -1), ("model.defaults", []), ("model.preview", {"factors": 1}), ("parts", []),
    ("parts.vae", 1), ("parts.vae.config", 1), ("parts.vae.identity", None), ("parts.vae.files", {"a": 1}),
    ("parts.vae.notes", "abc"), ("code", []), ("code", {"a": []}), ("limits", []), ("limits", {"max_pixels": "x"}),
    ("limits", {"max_steps": -1}), ("wire", "1"), ("schema", {}), ("wire", "\x1b" * 5000),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), FIELDS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(FIELDS)])
def test_descriptions_with_other_types(pipe, said, path, value):
    lie = json.loads(json.dumps(said))
    *above, last = path.split(".")
    inner = lie
    for key in above:
        inner = inner[key]
    inner[last] = value
    with server(answer(json.dumps(lie).encode())) as (url, taken):
        with pytest.raises(PlaceError) as e:
            run_at(pipe, url)
        check_sentence(e.value, url)
        assert len(taken) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"out_dim": None}, {"dim": "x"}, {"num_heads": 7}, {"vace_layers": [9, 1]}, {"patch_size": [0, 0, 0]},
        {"patch_size": 3}, {"dim": 10**300}, {"more": 1},
    ],
)  # fmt: skip
def test_parts_with_sizes_that_are_none(said, change):
    told = said["parts"]["transformer"]
    with pytest.raises(PlaceError, match="http://it"):
        part_of("transformer", {**told, "config": {**told["config"], **change}}, "http://it")
    without = {name: value for name, value in told["config"].items() if name not in change}
    if "more" not in change and "out_dim" in change:
        with pytest.raises(PlaceError, match="http://it"):
            part_of("transformer", {**told, "config": without}, "http://it")


@pytest.mark.parametrize("absent", ["settings", "plugs", "stopped", "cacheable", "seconds"])
def test_outcomes_without_a_field(pipe, said, absent):
    written = {"prompt_embeds": torch.zeros(3, 4), "prompt_lengths": [3]}
    whole = outcome_to_state(StageResult(written, {}, {}))
    for about in ({k: v for k, v in whole["outcome"].items() if k != absent}, {**whole["outcome"], absent: "x"}, []):
        lie = message("outcome", State({**written, "outcome": about}).to_bytes())
        with server(answer(json.dumps(said).encode()), answer(lie, STREAM)) as (url, _):
            with pytest.raises(PlaceError, match="does not say what it came from") as e:
                run_at(pipe, url, timeout=5)
            check_sentence(e.value, url)


def test_a_step_that_comes_twice(pipe, said):
    text = pipe.run(begin(pipe), until="encode_text").state
    half = pipe.run(text, stop_at_step=2).state
    written = {name: half[name] for name in ("latents", "sigmas", "step", "history")}
    kept = message("kept", outcome_to_state(StageResult(written, {}, pipe.seams.describe())).to_bytes())

    class Keep:
        every = 1

        def __call__(self, state):
            pass

    lies = server(answer(json.dumps(said).encode()), endless(chunk(kept), OPEN))
    with lies as (url, _), pytest.raises(PlaceError, match="step 2 after step 2"):
        run_at(pipe, url, stage="denoise", state=text, timeout=5, keep=Keep())


# --- a host that is started again


def test_a_host_that_is_known_is_waited_for(pipe, tiny_model, monkeypatch):
    monkeypatch.setattr(limits, "RESTART", 30.0)
    worker, heard = worker_of(Setup(model=str(tiny_model))), []
    with in_thread(worker) as host:
        url, port = host.url, host.listener.getsockname()[1]
        remote = Remote(url, HTTPChannel(url, 10), retries=1)
        remote.prepare(pipe.stages["encode_text"], ["text_encoder"], ditkit.Events())
    back, over = threading.Event(), threading.Event()

    def again():
        over.wait(1.5)
        with in_thread(worker, port=port):
            back.set()
            over.wait(60)

    thread = threading.Thread(target=again)
    thread.start()
    try:
        places = {"encode_text": [Segment(remote)]}
        state = pipe.stages.run(begin(pipe), pipe.components, places=places, until="encode_text",
                                events=ditkit.Events(heard.append))  # fmt: skip
    finally:
        assert back.is_set()
        over.set()
        thread.join()
    assert state.equal(pipe.run(begin(pipe), until="encode_text").state)
    assert [event["attempt"] for event in heard if event.name == "place.retry"] == [1], "waiting is one attempt"
    assert "waited for, 30 s" in next(event["why"] for event in heard if event.name == "place.retry")


def test_waiting_for_a_host_can_be_ended(pipe, said):
    with server(answer(json.dumps(said).encode())) as (url, _):
        remote = Remote(url, HTTPChannel(url, 10), retries=5)
        remote.prepare(pipe.stages["encode_text"], ["text_encoder"], ditkit.Events())
    cancel, begun = Cancel(), time.monotonic()
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(ditkit.Interrupted):
        pipe.stages.run(begin(pipe), pipe.components, places={"encode_text": [Segment(remote)]}, cancel=cancel)
    assert time.monotonic() - begun < 5


def test_a_host_that_was_never_there_is_told_soon(pipe):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    begun = time.monotonic()
    with pytest.raises(PlaceError, match=r"refused \(3 times\)\. "):
        run_at(pipe, url, retries=2)
    assert time.monotonic() - begun < 3


# --- anything


def changed(rng, value):
    """``value`` with one odd thing in it."""
    odd = rng.choice([None, True, -1, 0, 2**63, 10**30, 1e308, "", "x" * 3000, "\x1b[2J", [], [[]], {}, {"a": 1}, "1"])
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], changed(rng, value[at]), *value[at + 1 :]]
    return odd


def changed_state(rng, data):
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        about = json.loads(header["__metadata__"]["ditkit.state"])
        header["__metadata__"] = {"ditkit.state": json.dumps(changed(rng, about))}
    else:
        header = changed(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


class Lying:
    def __init__(self, said, messages):
        self.said, self.messages = said, messages

    def ask(self, question, name=""):
        return self.said if question == "describe" else {}

    def submit(self, job, inputs):
        return iter(self.messages)

    def close(self):
        pass


@pytest.mark.slow
def test_whatever_a_host_says_is_one_sentence_or_right(pipe, said, tiny_model):
    worker, rng = worker_of(Setup(model=str(tiny_model))), random.Random(11)
    text = pipe.run(begin(pipe), until="encode_text").state
    messages = []
    inputs = State({k: text[k] for k in (*pipe.stages["denoise"].reads, *pipe.stages["denoise"].optional) if k in text})
    worker.run(Job("1", "denoise", worker_options(worker)), inputs, messages.append, threading.Event())
    ends = {"ok": 0, "told": 0}
    for _ in range(400):
        lie, lies = said, list(messages)
        if rng.random() < 0.4:
            lie = changed(rng, said)
        else:
            at = rng.randrange(len(lies)) if rng.random() < 0.6 else len(lies) - 1
            data = bytes(lies[at].payload)
            data = json.dumps(changed(rng, json.loads(data))).encode() if data[:1] == b"{" else changed_state(rng, data)
            lies[at] = Message(lies[at].kind, data)
        if not isinstance(lie, dict):
            continue
        places = {"denoise": [Segment(Remote("http://it", Lying(lie, lies), 0))]}
        try:
            pipe.stages.run(text, pipe.components, places=places, until="denoise", events=ditkit.Events(lambda e: None))
            ends["ok"] += 1
        except DitkitError as e:
            check_sentence(e, "http://it")
            ends["told"] += 1
    assert min(ends.values()) > 20, ends


def worker_options(worker):
    from ditkit.placement.job import options_to_send

    return options_to_send(worker.stages["denoise"])
