"""What a host does not do for anybody: jobs beyond its limits, connections that drip or wait, names and pages of
others, options that make no sense. Each costs it nothing, is one sentence, and leaves it serving the next one."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from hosting import in_thread

import ditkit
from ditkit.allowed import Limits
from ditkit.errors import PlaceError, RequestError
from ditkit.execution.place import Segment
from ditkit.execution.stage import BaseStage
from ditkit.placement.http import zero_copy
from ditkit.placement.http.client import JOB, HTTPChannel
from ditkit.placement.job import Job, options_to_send
from ditkit.placement.remote import Remote
from ditkit.placement.worker import Worker, worker_of
from ditkit.setup import Setup
from ditkit.state import State

TOKEN = "a-token-of-a-test-0123456789"


class Echo(BaseStage):
    name, reads, writes = "echo", ("latents",), ("latents",)

    def run(self, inputs, ctx):
        return {"latents": inputs["latents"]}


class Fails(BaseStage):
    name, optional, writes = "fails", ("step",), ("sigmas",)

    def run(self, inputs, ctx):
        kind, *given = FAULTS[inputs["step"]]
        raise kind(*given)


FAULTS = [
    (MemoryError,),
    (RecursionError, "deep"),
    (ValueError, "odd"),
    (KeyError, "?"),
    (OSError, 5, "io"),
    (SystemExit, 3),
]


class Waits(BaseStage):
    name, writes = "waits", ("sigmas",)

    def run(self, inputs, ctx):
        while True:
            ctx.cancel.check()
            time.sleep(0.01)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def host(tiny_model):
    worker = worker_of(Setup(model=str(tiny_model)))
    worker.stages |= {"echo": Echo(), "fails": Fails(), "waits": Waits()}
    with in_thread(worker, token=TOKEN, limits=Limits(queue=1, max_bytes=100_000_000)) as host:
        yield host


@pytest.fixture(scope="module")
def open_host():
    """For everybody on this machine."""
    with in_thread(Worker({"echo": Echo()}, {}, {})) as host:
        yield host


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


def inputs_of(pipe, state, stage):
    return State(
        {name: state[name] for name in (*pipe.stages[stage].reads, *pipe.stages[stage].optional) if name in state}
    )


def connected(host):
    return socket.create_connection(("127.0.0.1", host.listener.getsockname()[1]), timeout=20)


def ask(host, path, body=None, job="{}", **headers):
    """Status and answer; a header whose value is None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", host.listener.getsockname()[1], timeout=60)
    known = {"Authorization": f"Bearer {TOKEN}", JOB: job, **{k.replace("_", "-"): v for k, v in headers.items()}}
    with contextlib.closing(connection):
        method = "GET" if body is None else "POST"
        connection.putrequest(method, path, skip_host="Host" in known)
        for name, value in known.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def head(path="/stages/echo", length=50_000_000, token=TOKEN):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{JOB}: {{}}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


# --- how large a job may be


@pytest.mark.parametrize(
    ("limits", "asked", "flag"),
    [
        ({"max_pixels": 5 * 32 * 32}, {"width": 64}, "--max-pixels 10240"),
        ({"max_pixels": 5 * 32 * 32}, {"frames": 9}, "--max-pixels"),
        ({"max_pixels": 5 * 32 * 32}, {"seed": [1, 2], "batched": True}, "--max-pixels"),
        ({"max_steps": 4}, {"steps": 5}, "--max-steps 5"),
        ({"max_steps": 4}, {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]}, "--max-steps"),
        ({"max_tokens": 1000}, {"seed": [1, 2, 3]}, "--max-tokens"),
        ({"max_bytes": 100}, {}, "--max-bytes"),
    ],
)
def test_more_than_a_host_does_is_told_before_anything_is_sent_or_computed(tiny_model, limits, asked, flag):
    """By the client, who was told the limits; and by the host, whoever asks."""
    with in_thread(worker_of(Setup(model=str(tiny_model))), token=TOKEN, limits=Limits(**limits)) as host:
        there = ditkit.load(tiny_model, threads=1, placement=dict.fromkeys(("encode_text", "denoise"), host.url))
        with pytest.raises((RequestError, PlaceError), match=flag) as e:
            there.run(begin(there, **asked))
        assert host.url in str(e.value)
        assert host.server_state.total_requests <= 1, "it was asked who it is, and no more"
        state = inputs_of(there, begin(there, **asked), "encode_text")
        status, body = ask(host, "/stages/encode_text", state.to_bytes())
        if flag.startswith("--max-bytes"):
            assert status == 413
        elif flag not in ("--max-pixels 10240", "--max-pixels") or "batched" not in asked:
            assert status == 400
            assert flag in json.loads(body)["do"]


def test_what_fits_is_done(tiny_model, pipe):
    limits = Limits(max_pixels=5 * 32 * 32, max_steps=4, max_tokens=512)
    with in_thread(worker_of(Setup(model=str(tiny_model))), token=TOKEN, limits=limits) as host:
        places = dict.fromkeys(("encode_text", "denoise", "decode_latents"), host.url)
        there = ditkit.load(tiny_model, threads=1, placement=places)
        assert there.run(begin(there)).state.equal(pipe.run(begin(pipe)).state)
        said = HTTPChannel(host.url, 60, TOKEN).ask("describe")["limits"]
    assert said == limits.to_tell()
    assert said["max_seconds"] == 86_400


def test_strides_do_not_make_a_job_larger_than_its_request(tiny_model, pipe):
    text = pipe.run(begin(pipe), until="encode_text").state
    options = {**options_to_send(pipe.stages["denoise"]), "strides": [1, 1, 1]}
    with in_thread(worker_of(Setup(model=str(tiny_model))), token=TOKEN, limits=Limits(max_pixels=5 * 32 * 32)) as host:
        body = inputs_of(pipe, text, "denoise").to_bytes()
        status, said = ask(host, "/stages/denoise", body, json.dumps({"options": options}))
        assert (status, "--max-pixels" in json.loads(said)["do"]) == (400, True)
        latents = State({"latents": torch.zeros(1, 16, 2, 64, 64), "request": begin(pipe)["request"]})
        status, said = ask(host, "/stages/decode_latents", latents.to_bytes())
        assert (status, "--max-pixels" in json.loads(said)["do"]) == (400, True)


def test_a_job_has_so_many_seconds():
    with in_thread(Worker({"waits": Waits(), "echo": Echo()}, {}, {}), limits=Limits(max_seconds=0.2)) as host:
        status, said = ask(host, "/stages/waits", State({}).to_bytes())
        assert status == 409
        assert "longer than the 0.2 s" in json.loads(said)["found"]
        assert ask(host, "/stages/echo", State({"latents": torch.zeros(1, 1, 1, 1, 1)}).to_bytes())[0] == 200


def test_the_limits_are_flags(call, monkeypatch):
    from ditkit.placement.http import host as module

    found = []
    monkeypatch.setattr(module.Host, "serve_here", lambda self: found.append(self.jobs.limits))
    words = [
        "--max-pixels",
        7,
        "--max-steps",
        8,
        "--max-tokens",
        9,
        "--max-seconds",
        10,
        "--max-bytes",
        11,
        "--queue",
        2,
    ]
    assert call("host", "--model", "shapes", "--lazy", "--port", 0, *words).code == 0
    assert found == [Limits(11, 2, 2.0, 7, 8, 9, 10.0)]
    assert call("host", "--max-pixels", 0).code == 2


# --- connections


def test_who_has_the_token_gets_in_however_many_hold_the_door(host, monkeypatch):
    monkeypatch.setattr(zero_copy, "CONNECTIONS", 20)
    with contextlib.ExitStack() as stack:
        for i in range(60):
            stranger = stack.enter_context(connected(host))
            stranger.sendall([b"", b"GET /health HTTP/1.1\r\nHo", b"POST /stages/echo HTTP/1.1\r\n"][i % 3])
        wait_until(lambda: len(host.server_state.connections) <= 21)
        busy = stack.enter_context(connected(host))
        busy.sendall(head(length=1000) + b"1")
        wait_until(lambda: len(host.jobs.flags) == 1)
        for _ in range(60):
            stack.enter_context(connected(host))
        assert ask(host, "/stages")[0] == 200
        assert len(host.jobs.flags) == 1, "who is known is not put out"
    wait_until(lambda: not host.jobs.flags)


@pytest.mark.parametrize("first", [b"1", b"1" * 3_000_000])
def test_a_body_that_drips_is_ended(host, monkeypatch, capfd, first):
    monkeypatch.setattr(zero_copy, "PATIENCE", 0.3)
    monkeypatch.setattr(zero_copy, "SLOWEST", 100_000_000)
    with connected(host) as client:
        client.sendall(head() + first)
        got = b""
        with contextlib.suppress(OSError):
            while True:
                client.sendall(b"1")
                time.sleep(0.02)
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not (piece := client.recv(1000)):
                        break
                    got += piece
                client.setblocking(True)
        assert got == b"" or got.startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: not host.jobs.flags)
    assert capfd.readouterr().err == ""


def test_who_was_refused_cannot_go_on_sending(host, monkeypatch):
    monkeypatch.setattr(zero_copy, "PATIENCE", 0.3)
    with connected(host) as client:
        client.sendall(head(token="wrong-wrong-wrong-wrong"))
        assert b" 401 " in client.recv(1000)
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(200):
                client.sendall(b"1")
                time.sleep(0.05)


def test_a_client_that_takes_nothing_of_its_answer_is_gone(host, monkeypatch):
    monkeypatch.setattr(zero_copy, "STALLED", 0.4)
    data = State({"latents": torch.zeros(1, 1, 1, 1, 10_000_000)}).to_bytes()
    for more in ("", "Accept: application/x-ditkit-frames\r\n"):
        with connected(host) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
            client.sendall(head(length=len(data)).replace(b"Content-Length", f"{more}Content-Length".encode()) + data)
            wait_until(lambda: not host.jobs.flags and not host.server_state.connections)


def test_small_answers_do_not_wait_for_each_other(host):
    with connected(host) as client:
        wait_until(lambda: host.server_state.connections)
        for each in host.server_state.connections:
            assert each.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()


def test_clients_that_vanish_are_no_news(host, capfd):
    data = State({"latents": torch.zeros(1, 1, 1, 1, 500_000)}).to_bytes()
    for cut in (0, 1, 100, 70_000, 1_000_000, len(data)):
        for reset in (True, False):
            with connected(host) as client:
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.sendall(head(length=len(data)) + data[:cut])
    wait_until(lambda: not host.jobs.flags and not host.server_state.connections)
    assert capfd.readouterr().err == ""
    assert ask(host, "/stages/echo", data)[0] == 200


# --- names and pages


@pytest.mark.parametrize("path", ["/stages", "/health", "/docs", "/openapi.json", "/nothing"])
@pytest.mark.parametrize(
    "name",
    ["evil.example", "a{b.evil.com", "a`b.evil.com", 'a"b.evil.com', "evil.com:99999", "", "127.0.0.1:99999", "0.0.0.0",
     "127.0.0.1.evil.com", "localhost@evil.com", "[::1", "[::1].evil.com", "[evil.com]", "127.0.0.1:80:80", "8.8.8.8",
     "127.0.0.1 ", "localhost:1x", "localhost/x", "2130706433"],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered_to(open_host, path, name):
    status, body = ask(open_host, path, Authorization=None, Host=name)
    assert status in (400, 401)
    assert json.loads(body)["do"]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST:8700", "[::1]:8700", "127.0.0.5:1"])
def test_names_of_this_machine(open_host, name):
    for path in ("/stages", "/health", "/docs", "/openapi.json"):
        assert ask(open_host, path, Authorization=None, Host=name)[0] == 200


def test_one_name_and_no_other(open_host, host):
    for each in (open_host, host):
        for names in ("", "Host: localhost\r\nHost: evil.com\r\n"):
            with connected(each) as client:
                client.sendall(f"GET /health HTTP/1.1\r\n{names}Connection: close\r\n\r\n".encode())
                assert b" 400 " in client.recv(1000)
    assert ask(host, "/health", Host="mac.local:8700")[0] == 200, "with a token it may be reached by any name"
    assert ask(host, "/health", Host="a{b")[0] == 400


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "http://localhost", "http://127.0.0.1:1", "", "x"])
def test_pages_of_others_are_refused(open_host, host, origin):
    for each in (open_host, host):
        for path in ("/stages", "/health", "/docs"):
            assert ask(each, path, Origin=origin)[0] == 403
        assert ask(each, "/stages/echo", b"", Origin=origin)[0] == 403
        mine = each.url
        assert ask(each, "/health", Origin=mine)[0] == 200


def test_nobody_is_sent_to_another_name(host):
    for path in ("/stages/", "/health/", "/docs/", "//stages"):
        assert ask(host, path, Host="evil.com")[0] == 404


def test_its_page_is_one_file_and_shows_no_secret(host):
    status, body = ask(host, "/docs", Authorization=None)
    page = body.decode()
    assert status == 200
    assert "POST /stages/{name}" in page
    assert JOB.lower() in page.lower()
    assert "<script" not in page
    assert "://" not in page
    assert TOKEN not in page
    assert ask(host, "/redoc")[0] == 404


# --- jobs that make no sense


def options(stage, **change):
    return lambda pipe: {"options": {**options_to_send(pipe.stages[stage]), **change}}


JOBS = [
    ("denoise", options("denoise", strides=[0, 0, 0]), 400, "strides"),
    ("denoise", options("denoise", strides=[4, 8]), 400, "strides"),
    ("denoise", options("denoise", strides="abc"), 400, "strides"),
    ("denoise", options("denoise", strides=[1 << 70, 8, 8]), 400, "strides"),
    ("denoise", options("denoise", experts=[]), 400, "experts"),
    ("denoise", options("denoise", experts=["vae"]), 400, "experts"),
    ("denoise", options("denoise", experts=["transformer", "transformer"]), 400, "experts"),
    ("denoise", options("denoise", attention="nothing"), 400, "attention"),
    ("denoise", options("denoise", attention=["sdpa"]), 400, "attention"),
    ("denoise", options("denoise", timestep_scale=float("nan")), 400, "timestep_scale"),
    ("denoise", options("denoise", timestep_scale="x"), 400, "timestep_scale"),
    ("denoise", options("denoise", cfg=1), 400, "cfg"),
    ("denoise", options("denoise", more=1), 409, "more"),
    ("denoise", lambda pipe: {"options": {}}, 409, "options"),
    ("denoise", lambda pipe: {"plugs": ["x@y"]}, 400, "plug"),
    ("denoise", lambda pipe: {"plugs": ["x:" + "[" * 5000]}, 400, "plug"),
    ("denoise", lambda pipe: {"plugs": [1]}, 400, "no job"),
    ("decode_latents", options("decode_latents", frames_per_chunk=0), 400, "frame"),
    ("decode_latents", options("decode_latents", frames_per_chunk=10**300), 400, "frame"),
    ("decode_latents", options("decode_latents", frames_per_chunk=True), 400, "frames_per_chunk"),
    ("encode_text", options("encode_text", cfg=None), 400, "cfg"),
    ("encode_text", lambda pipe: {"made_by": "ditkit.stages.decode_latents.DecodeLatents"}, 409, "made by"),
    ("encode_text", lambda pipe: {"wire": 99}, 409, "wire version 99"),
    ("encode_text", lambda pipe: {"wire": 10**300}, 409, "wire version"),
    ("encode_text", lambda pipe: {"id": ""}, 400, "no job"),
    ("encode_text", lambda pipe: {"id": "x" * 9000}, 400, "no job"),
    ("encode_text", lambda pipe: {"weights": {"text_encoder": "other"}}, 400, "text_encoder"),
    ("encode_text", lambda pipe: {"stop_at_step": -1}, 400, "no job"),
    ("encode_text", lambda pipe: [1], 400, "no job"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bodies(pipe):
    whole = pipe.run(begin(pipe)).state
    text = pipe.run(begin(pipe), until="encode_text").state
    states = {"encode_text": begin(pipe), "denoise": text, "decode_latents": whole}
    return {name: inputs_of(pipe, state, name).to_bytes() for name, state in states.items()}


@pytest.mark.parametrize("index", range(len(JOBS)))
def test_jobs_that_make_no_sense(pipe, host, bodies, capfd, index):
    stage, change, status, found = JOBS[index]
    got, body = ask(host, f"/stages/{stage}", bodies[stage], json.dumps(change(pipe)))
    said = json.loads(body)
    assert (got, found in f"{said['asked']} {said['found']}") == (status, True), said
    assert len(body) < 5000
    assert capfd.readouterr().err == "", "it is no fault of the host"


def changed(**change):
    return lambda state: state.with_fields({k: v(state) if callable(v) else v for k, v in change.items()})


SIZES = [
    ("denoise", changed(prompt_embeds=lambda s: s["prompt_embeds"][:, :3]), "prompt_embeds"),
    ("denoise", changed(prompt_lengths=[1]), "do not fit"),
    ("denoise", changed(latents=torch.zeros(1, 16, 2, 3, 4)), "latents"),
    ("denoise", changed(latents=torch.zeros(1, 3, 2, 4, 4)), "latents"),
    ("denoise", changed(request=lambda s: {**s["request"], "width": 40}), "width"),
    ("denoise", changed(request=lambda s: {**s["request"], "scheduler": "nothing"}), "nothing"),
    ("denoise", changed(request=lambda s: {**s["request"], "scheduler_options": {"order": 10**300}}), "order"),
    ("decode_latents", changed(latents=torch.zeros(1, 3, 2, 4, 4)), "channels"),
    ("decode_latents", changed(latents=torch.zeros(1, 16, 0, 4, 4)), "latents"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_sizes_that_do_not_belong_together(host, bodies, capfd, index):
    stage, change, found = SIZES[index]
    got, body = ask(host, f"/stages/{stage}", change(State.from_bytes(bodies[stage])).to_bytes())
    said = json.loads(body)
    assert (got, found in f"{said['asked']} {said['found']}") == (400, True), said
    assert capfd.readouterr().err == ""


def test_a_request_may_be_short(host, bodies):
    short = State.from_bytes(bodies["denoise"]).with_fields(
        {"request": {"width": 32, "height": 32, "frames": 5, "steps": 1}}
    )
    assert ask(host, "/stages/denoise", short.to_bytes())[0] == 200


def test_two_jobs_of_one_name(host):
    with connected(host) as client:
        client.sendall(head("/stages/waits", 1000).replace(b"{}", b'{"id": "me"}'))
        wait_until(lambda: host.jobs.flags)
        status, body = ask(host, "/stages/echo", b"", '{"id": "me"}')
    assert (status, "it is here already" in json.loads(body)["found"]) == (409, True)
    wait_until(lambda: not host.jobs.flags)


@pytest.mark.parametrize("index", range(len(FAULTS)))
def test_a_job_that_fails_takes_nobody_along(host, index):
    body = State({"step": index}).to_bytes()
    status, said = ask(host, "/stages/fails", body)
    assert status == (400 if FAULTS[index][0] is SystemExit else 500)
    assert set(json.loads(said)) == {"kind", "asked", "found", "do"}
    *_, last = HTTPChannel(host.url, 60, TOKEN).submit(Job(f"fails {index}", "fails"), State({"step": index}))
    assert last.kind == "error"
    wait_until(lambda: not host.jobs.flags)
    assert ask(host, "/health")[0] == 200


ENDLESS = """
import sys, threading, torch
from ditkit.cli.host import leave
from ditkit.execution.stage import BaseStage
from ditkit.placement.http import host
from ditkit.placement.worker import Worker

class Endless(BaseStage):
    name, writes = "endless", ("sigmas",)
    def run(self, inputs, ctx):
        a = torch.zeros(600, 600)
        print("begun", flush=True)
        while True:
            a = a @ a

host.FAREWELL = 0.3
torch.set_num_threads(1)
worker = Worker({"endless": Endless()}, {}, {})
host.Host(worker, host.bind(), announce=lambda url: print(url, flush=True), ended=leave).serve_here()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="ends with a signal")
def test_a_host_ends_in_order_in_the_middle_of_a_step_that_does_not():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url = process.stdout.readline().strip()
    messages = HTTPChannel(url, 60).submit(Job("1", "endless"), State({}))
    threading.Thread(target=lambda: list(quietly(messages)), daemon=True).start()
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def quietly(messages):
    with contextlib.suppress(PlaceError):
        yield from messages


# --- many


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def one_of_many(host, bodies, rng):
    """One request of some kind, and whether it was answered as it should be."""
    what = rng.randrange(6)
    if what == 0:
        return ask(host, "/stages/encode_text", bodies["encode_text"])[0] == 200
    if what == 1:
        return ask(host, "/stages/decode_latents", bodies["decode_latents"])[0] == 200
    if what == 2:
        return ask(host, "/stages/encode_text", bodies["encode_text"], Authorization=None)[0] == 401
    if what == 3:
        return ask(host, "/stages/encode_text", rng.randbytes(rng.randrange(3000)))[0] == 400
    if what == 4:
        return ask(host, "/health")[0] == 200
    with connected(host) as client:
        client.sendall(
            (head("/stages/decode_latents", len(bodies["decode_latents"])) + rng.randbytes(99))[: rng.randrange(300)]
        )
    return True


@pytest.mark.slow
def test_many_requests_of_all_kinds_leave_nothing_behind(host, bodies, capfd):
    rng = random.Random(7)
    assert all(one_of_many(host, bodies, rng) for _ in range(20))
    wait_until(lambda: not host.server_state.connections)
    gc.collect()
    before = descriptors(), threading.active_count(), len(gc.get_objects())
    for _ in range(150):
        while not (done := one_of_many(host, bodies, rng)):
            pass
    assert done
    wait_until(lambda: not host.server_state.connections and not host.jobs.flags)
    gc.collect()
    assert descriptors() <= before[0] + 2
    assert threading.active_count() <= before[1] + 5
    assert len(gc.get_objects()) < before[2] + 5000
    assert len([each for each in gc.get_objects() if isinstance(each, zero_copy.Straight)]) < 5
    assert capfd.readouterr().err == ""


def test_remote_names_itself(pipe, host):
    """The client's own words for what the host refuses."""
    text = pipe.run(begin(pipe), until="encode_text").state
    places = {"denoise": [Segment(Remote(host.url, HTTPChannel(host.url, 10, TOKEN)))]}
    wrong = text.with_fields({"prompt_embeds": text["prompt_embeds"][:, :3]})
    with pytest.raises(ditkit.DitkitError, match=host.url):
        pipe.stages.run(wrong, pipe.components, places=places, until="denoise")
