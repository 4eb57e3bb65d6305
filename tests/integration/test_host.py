"""A real `ditkit host` in a process of its own: what it offers, refuses and streams, and that it stops for nobody."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from hosting import in_thread

import ditkit
from ditkit.errors import PlaceError, SetupError
from ditkit.execution.place import Segment
from ditkit.placement.http.client import CRC, JOB, HTTPChannel
from ditkit.placement.http.framing import checksum
from ditkit.placement.http.host import Limits, bind
from ditkit.placement.job import Job, options_to_send
from ditkit.placement.remote import Remote
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup
from ditkit.state import State

LOADS = ("loading", "loaded")
TOKEN = "a-token-of-a-test-0123456789"


def start_host(model, *words, **environment):
    """The process and the address that it printed."""
    command = [sys.executable, "-m", "ditkit", "host", "--model", str(model), "--port", "0", "--threads", "1", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DITKIT_")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**clean, **environment}
    )
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, line.split()[0]


@pytest.fixture(scope="module")
def host(tiny_model):
    process, url = start_host(tiny_model, "--max-bytes", "200000", DITKIT_HOST_TOKEN=TOKEN)
    yield url
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    loads = [f"{word} {part}" for part in ("tokenizer", "text_encoder", "transformer", "vae") for word in LOADS]
    told = [line.split()[:2] for line in err.splitlines()]
    assert (process.returncode, out) == (0, ""), "it ends in order"
    assert told == [text.split() for text in loads], "it tells what it loads, and had nothing to complain about"


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe.run(begin(pipe)).state


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


def ask(url, data=None, **headers):
    """Status, headers and body, as curl would see them."""
    names = {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Bearer {TOKEN}", **names})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.headers, e.read()


def inputs_of(pipe, state, stage):
    names = (*pipe.stages[stage].reads, *pipe.stages[stage].optional)
    return State({name: state[name] for name in names if name in state})


def test_every_stage_there_gives_the_same_state(tiny_model, host, whole):
    placement = dict.fromkeys(("encode_text", "denoise", "decode_latents"), host)
    pipe = ditkit.load(tiny_model, placement=placement)
    result = pipe.run(begin(pipe))
    assert result.state.equal(whole)
    assert result.state.fingerprints == whole.fingerprints
    assert result.receipt["places"] == {name: [host] for name in placement}
    assert {t["stage"] for t in result.receipt["travelled"]} == set(placement)
    assert TOKEN not in json.dumps(result.manifests), "a token is written nowhere"
    assert not pipe.components.holder.loaded, "nothing was loaded here"


def test_what_it_says_of_itself(host):
    status, _, body = ask(f"{host}/stages")
    said = json.loads(body)
    assert status == 200
    assert list(said["stages"]) == ["encode_text", "denoise", "decode_latents"]
    text = said["stages"]["encode_text"]
    assert text["writes"]["prompt_embeds"] == {"kind": "tensor", "dtype": "float", "shape": "R D"}
    assert len(text["components"]["text_encoder"]) == 64
    assert said["parts"]["vae"]["dtype"] == "float32"
    assert said["machine"]["threads"] == 1
    assert TOKEN not in body.decode()
    status, _, body = ask(f"{host}/openapi.json")
    assert status == 200
    assert "/stages/{name}" in json.loads(body)["paths"]


def test_health_needs_no_token_and_all_else_does(host):
    assert ask(f"{host}/health", Authorization="")[0] == 200
    for path in ("/stages", "/stages/encode_text/probe"):
        for wrong in ("", "Bearer another-token-entirely", f"Basic {TOKEN}"):
            status, headers, body = ask(f"{host}{path}", Authorization=wrong, **{JOB: "probe"})
            assert status == 401, (path, wrong)
            assert headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in body.decode()
    assert ask(f"{host}/stages/encode_text", b"x", Authorization="", **{JOB: "{}"})[0] == 401
    assert ask(f"{host}/jobs/1/cancel", b"", Authorization="", **{JOB: "1"})[0] == 401


def test_curl_gets_the_outcome_as_a_state(pipe, whole, host):
    state = inputs_of(pipe, begin(pipe), "encode_text")
    status, headers, body = ask(f"{host}/stages/encode_text", state.to_bytes(), **{JOB: "{}"})
    assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
    assert State.from_bytes(body)["prompt_embeds"].equal(whole["prompt_embeds"])


@pytest.mark.parametrize(
    ("path", "data", "job", "status", "found"),
    [
        ("/stages/encode_txt", b"", "{}", 404, "offered are encode_text"),
        ("/stages/encode_text", b"abc", "{}", 400, "not a complete safetensors file"),
        ("/stages/encode_text", State({}).to_bytes(), "{}", 400, "the State has no prompt"),
        ("/stages/encode_text", State({"video": 3}).to_bytes(), "{}", 400, "which it does not read"),
        ("/stages/encode_text", b"", "nonsense", 400, "is no job"),
        ("/stages/encode_text", b"", '{"stage": "denoise"}', 400, "the job is for 'denoise'"),
        ("/stages/encode_text", b"", '{"keep_every": 0}', 400, "is no job of this version"),
        ("/stages/encode_text", b"", '{"options": ' + "[" * 20_000 + "]" * 20_000 + "}", 400, "is no job"),
        ("/stages/encode_text", State({"request": {"steps": []}}).to_bytes(), "{}", 400, "should be a valid integer"),
        ("/stages/encode_text", b"x" * 200_001, "{}", 413, "200001 bytes and 200000 are allowed"),
    ],
)
def test_requests_that_are_refused(host, path, data, job, status, found):
    code, _, body = ask(f"{host}{path}", data, **{JOB: job})
    assert code == status
    assert found in json.loads(body)["found"]


def test_a_client_that_died_while_it_sent_is_noticed():
    with bind() as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_page_of_a_browser_cannot_start_anything(host):
    """Without a question beforehand, which the host never answers, a page may not send a header of ours."""
    assert ask(f"{host}/stages/encode_text", b"x")[0] == 422
    assert ask(f"{host}/jobs/1/cancel", b"")[0] == 422
    assert ask(f"{host}/stages/encode_text/probe")[0] == 422
    request = urllib.request.Request(f"{host}/stages/encode_text", method="OPTIONS", headers={
        "Origin": "http://page", "Access-Control-Request-Method": "POST"})  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=60)


def test_a_body_of_unknown_length_has_the_same_limit(host):
    connection = http.client.HTTPConnection(host.removeprefix("http://"), timeout=60)
    headers = {"Authorization": f"Bearer {TOKEN}", JOB: "{}"}
    connection.request("POST", "/stages/encode_text", iter([b"x" * 150_000] * 2), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_content_that_changed_on_its_way_is_refused(pipe, host):
    data = inputs_of(pipe, begin(pipe), "encode_text").to_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    status, _, body = ask(f"{host}/stages/encode_text", changed, **{JOB: "{}", CRC: f"{checksum([data]):08x}"})
    assert status == 400
    assert "changed on the way" in json.loads(body)["found"]


def test_the_probe_can_be_demanded(tiny_model, host, whole):
    found = HTTPChannel(host, 60, TOKEN).ask("probe", "encode_text")["hash"]
    placement = {"encode_text": host}
    pipe = ditkit.load(tiny_model, placement=placement, expected_probes={"encode_text": found[:8]})
    assert pipe.run(begin(pipe), until="encode_text").state["prompt_embeds"].equal(whole["prompt_embeds"])
    other = ditkit.load(tiny_model, placement=placement, expected_probes={"encode_text": "0" * 8})
    with pytest.raises(PlaceError, match=f"its probe is {found[:16]}, expected is 00000000"):
        other.run(begin(other))


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"encode_txt": "0" * 8}, "placed nowhere .did you mean 'encode_text'"),
        ({"encode_text": "0" * 7}, "8 to 64 hexadecimal digits"),
        ({"denoise": "0" * 8}, "it runs in this process"),
    ],
)
def test_expectations_that_nobody_could_meet(tiny_model, expect, message):
    with pytest.raises(SetupError, match=message):
        ditkit.load(
            tiny_model, placement={"encode_text": "http://127.0.0.1:9", "denoise": "cpu"}, expected_probes=expect
        )


# --- in this process, where jobs can be looked at


@pytest.fixture
def here(tiny_model, monkeypatch):
    """A host whose stages tell of each step, and take none before ``go`` is set."""
    monkeypatch.delenv("DITKIT_HOST_TOKEN")
    worker = worker_of(Setup(model=str(tiny_model)))
    with in_thread(worker, limits=Limits(queue=1, alive=0.1)) as host:
        yield worker, host


class Slow:
    """A transformer's seam B that counts the forward passes and holds each up until it may go on."""

    def __init__(self, inner):
        self.inner, self.passes, self.begun, self.go = inner, 0, threading.Event(), threading.Event()

    def __call__(self, blocks, x, ctx):
        self.passes += 1
        self.begun.set()
        assert self.go.wait(60)
        return self.inner(blocks, x, ctx)


@pytest.fixture
def slow(here):
    transformer = here[0].components["transformer"]
    transformer.run_blocks = held = Slow(transformer.run_blocks)
    yield held
    held.go.set()


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def job_for(pipe, stage="denoise"):
    return Job(os.urandom(8).hex(), stage, options_to_send(pipe.stages[stage]))


def test_a_client_that_goes_away_stops_its_job_within_a_step(pipe, whole, here, slow):
    host = here[1]
    text = pipe.run(begin(pipe), until="encode_text").state
    frames = HTTPChannel(host.url, 60).submit(job_for(pipe), inputs_of(pipe, text, "denoise"))
    next(frames)
    assert slow.begun.wait(60)
    assert len(host.jobs.flags) == 1
    frames.close()
    flag = next(iter(host.jobs.flags.values()))
    assert flag.wait(60), "the host saw it go, in the middle of a step"
    slow.go.set()
    wait_until(lambda: len(host.jobs.flags) == 0)
    assert slow.passes <= 2, "the step that was begun has two branches; no other one is"
    again = pipe.stages.run(text, pipe.components, places={"denoise": [Segment(Remote("it", HTTPChannel(host.url)))]})
    assert again.equal(whole), "and it serves the next one"


def test_a_job_that_waits_for_its_turn_goes_too_and_the_queue_has_an_end(pipe, here, slow):
    host = here[1]
    channel = HTTPChannel(host.url, 60)
    text = inputs_of(pipe, pipe.run(begin(pipe), until="encode_text").state, "denoise")
    first = channel.submit(job_for(pipe), text)
    next(first)
    assert slow.begun.wait(60)
    second = channel.submit(job_for(pipe), text)
    assert next(second).kind == "alive", "it hears that it waits"
    status, headers, body = ask(f"{host.url}/stages/denoise", text.to_bytes(), Authorization="", **{JOB: "{}"})
    assert (status, headers["Retry-After"]) == (503, "5")
    assert "2 jobs are waiting" in json.loads(body)["found"]
    second.close()
    wait_until(lambda: len(host.jobs.flags) == 1)
    assert slow.passes == 1, "the first is still in its first step"
    slow.go.set()
    assert [f.kind for f in first][-1] == "outcome"


def test_cancelling_keeps_the_state(pipe, whole, here, slow):
    host = here[1]
    text = pipe.run(begin(pipe), until="encode_text").state

    def press(event):
        if event.name == "step.start" and event["step"].index == 1:
            threading.Timer(0.2, slow.go.set).start()
            raise KeyboardInterrupt
        if event.name == "step.start":
            slow.go.set()
        if event.name == "step.end":
            slow.go.clear()

    places = {"denoise": [Segment(Remote("it", HTTPChannel(host.url)))]}
    with pytest.raises(ditkit.Interrupted) as e:
        pipe.stages.run(text, pipe.components, places=places, events=ditkit.Events(press))
    assert 1 <= e.value.state["step"] <= 2
    slow.go.set()
    assert pipe.run(e.value.state).state.equal(whole)


def test_a_name_that_others_could_give_to_this_machine_is_refused(here):
    status, _, body = ask(f"{here[1].url}/stages", Host="evil.example", Authorization="")
    assert status == 401
    assert "evil.example" in json.loads(body)["found"]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_others_are_not_let_in_without_a_token(address):
    with pytest.raises(SetupError, match="there is no token"):
        bind(address)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "there is no token"),
        (["--stages", "encode_txt"], "did you mean 'encode_text'"),
        (["--set", "steps=3"], "requests come with the jobs"),
        (["--token-file", "absent"], "no such file"),
        (["--placement", "denoise=process"], "no such option"),
        (["--set", "placement.denoise=process"], "placed"),
        (["--ssl-keyfile", "key.pem"], "only one of its two files"),
    ],
)
def test_hosts_that_do_not_start(call, tiny_model, words, message):
    said = call("host", "--model", tiny_model, "--port", 0, *words)
    assert said.code == 2
    assert message in said.err.lower()


def test_a_token_has_to_be_hard_to_guess(call, tmp_path, tiny_model):
    (tmp_path / "token").write_text("short\n")
    said = call("host", "--model", tiny_model, "--port", 0, "--token-file", "token")
    assert said.code == 2
    assert "16 or more" in said.err
    assert "short" not in said.err
