"""Secrets of this user go where they belong and nowhere else: not into what is printed, not into a file, and not to a
server that sends us on. Planted ones are searched for in all that a run leaves behind, in several spellings."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from chat_server import chat, failing, serving

import ditkit
from ditkit.errors import PlaceError, SetupError
from ditkit.placement.http.client import HTTPChannel, words_of
from ditkit.placement.job import Message
from ditkit.state import State

PROMPT = "a red circle"
SECRET = "sk-4f9aZq71+LmXw/82Rt=="
TOKEN = "token-of-this-host-8271Qx/+="
SHORT = ("--steps", 1, "--no-sheet", "--quiet")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DITKIT_EXPANDER_KEY", "NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(server):
    server.replies.clear()
    server.keys.clear()
    server.asked.clear()


def spelled(secret: str) -> set[bytes]:
    half = len(secret) // 2
    words = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], secret[:half], secret[half:]}
    coded = {base64.b64encode(f"{user}{secret}".encode())[8:-4] for user in ("", "me:")}
    return {word.encode() for word in words} | coded


def search(folder: Path, *texts: str, secret: str = SECRET) -> None:
    """Neither a text nor a file of ``folder`` holds it."""
    for text in texts:
        assert not [word for word in spelled(secret) if word in text.encode()], text
    for file in folder.rglob("*"):
        if file.is_file():
            assert not [word for word in spelled(secret) if word in file.read_bytes()], file


@contextmanager
def answering(respond):
    """A server of a stranger; what it got. ``respond(handler)`` writes an answer."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            got.append((self.path, dict(self.headers)))
            respond(self)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


# --- the key of a server of prompts


ECHOES = {
    "in an error": [failing(401, f"no such key: {SECRET}")],
    "percent-encoded": [failing(400, f"no such key: {quote(SECRET, safe='')}")],
    "as base64": [failing(400, base64.b64encode(f"me:{SECRET}".encode()).decode())],
    "a half of it": [failing(403, f"no such key: {SECRET[:12]}...")],
    "as a header": [failing(500, json.dumps({"Authorization": f"Bearer {SECRET}"}))],
    "no JSON": [(500, f"key {SECRET}".encode(), "text/plain")],
    "in its answer": [chat(f"A circle, {SECRET}.")],
    "in its reasoning": [chat("A circle.", reasoning_content=f"he sent {SECRET}")],
    "a refusal": [chat(None, refusal=f"not with {SECRET}")],
}


@pytest.mark.parametrize("case", ECHOES)
def test_a_server_that_repeats_the_key(call, model, server, monkeypatch, tmp_path, case):
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", f" {SECRET}\r\n")
    words = ["--model", model, "--expander", server.url, "--expand", "yes", "--retries", 0, "--cache", "kept"]
    server.replies[:] = ECHOES[case]
    said = call("run", PROMPT, "--run", "r", *words, *SHORT, "--until", "expand_prompt", "--debug")
    assert server.keys == [f"Bearer {SECRET}"]
    assert said.code == 1
    server.replies[:] = ECHOES[case]
    end = ("--out", "a.mp4") if case == "in an error" else ("--until", "expand_prompt")
    made = call("run", PROMPT, "--run", "s", *words, *SHORT, "--expand-fallback", *end)
    assert (made.code, "note: expanding a prompt at http" in made.err) == (0, True)
    listed = call("runs", "--json")
    search(tmp_path, said.out, said.err, made.out, made.err, listed.out)


@pytest.mark.parametrize("fallback", [(), ("--expand-fallback",)])
@pytest.mark.parametrize("secret", ["sk-4f9aZq71\r82RtLmXw", "sk-4f9aZq71\x00", "sk-ümlaut-LmXw82Rt"])
def test_a_key_that_cannot_be_sent(call, model, server, monkeypatch, tmp_path, secret, fallback):
    if "\0" in secret:  # no variable can hold it
        secret = secret.replace("\0", "\x01x")
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", secret)
    words = ["--model", model, "--expander", server.url, "--expand", "yes", "--out", "a.mp4", *fallback]
    said = call("generate", PROMPT, *words, *SHORT)
    assert said.code == 2
    assert "the key in DITKIT_EXPANDER_KEY: character " in said.err
    assert server.asked == []
    search(tmp_path, said.err, secret=secret)


def test_a_key_of_somebody_else_is_not_sent(call, server, monkeypatch):
    more = "X-Mine: private\nAuthorization: Bearer other-secret-1"
    for name, value in (("API_KEY", SECRET), ("ORG_ID", "org-1"), ("PROJECT_ID", "p-1"), ("CUSTOM_HEADERS", more)):
        monkeypatch.setenv(f"OPENAI_{name}", value)
    with answering(lambda handler: say(handler, 404)) as (url, got):
        assert call("expand", "a cat", "--expander", url, "--retries", 0).code == 1
    headers = {name.lower(): value for name, value in got[0][1].items()}
    assert headers["authorization"] == "Bearer none"
    assert not {"openai-organization", "openai-project", "x-mine"} & {*headers}
    assert call("expand", "a cat", "--expander", server.url).code == 0
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert call("expand", "a cat", "--expander", server.url).code == 0
    assert server.keys == ["Bearer none", f"Bearer {SECRET}"]


@pytest.mark.parametrize("status", [302, 308])
def test_a_server_that_sends_us_on_is_not_followed(call, monkeypatch, status):
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", SECRET)
    with answering(lambda handler: say(handler, 200, b"{}")) as (other, got):
        onward = {"Location": f"{other}/v1/models?token=abcdef123"}
        with answering(lambda handler: say(handler, status, **onward)) as (url, _):
            said = call("expand", "a cat", "--expander", url, "--retries", 0)
    assert (said.code, got) == (1, [])
    assert f"it sends us on to '{other}/v1/models?token=***'. Give the address itself" in said.err


def test_a_server_of_this_machine_is_asked_without_a_proxy(call, server, monkeypatch):
    for proxy in ("http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"):
        for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        said = call("expand", "a cat", "--expander", server.url, "--retries", 0)
        assert said.code == 0, said.err


def test_a_proxy_is_used_and_named(call, model, monkeypatch, tmp_path):
    with answering(lambda handler: say(handler, 407, b"who are you?")) as (proxy, got):
        monkeypatch.setenv("HTTP_PROXY", proxy.replace("//", "//me:pass-word-99@"))
        said = call("expand", "a cat", "--expander", "http://llm.example/v1", "--retries", 0)
        assert said.code == 1
        assert got[0][0] == "http://llm.example/v1/models"
    said = call("expand", "a cat", "--expander", "http://llm.example/v1", "--retries", 0)
    assert "it was not reached through the proxy of HTTP_PROXY (" in said.err
    monkeypatch.setenv("HTTP_PROXY", "nonsense://me:pass-word-99@x")
    words = ["--expander", "http://llm.example/v1", "--expand", "yes", "--expand-fallback", "--model", model]
    said = call("generate", PROMPT, *words, *SHORT, "--out", "a.mp4")
    assert (said.code, "the proxy in HTTP_PROXY is no address" in said.err) == (0, True)
    search(tmp_path, said.err, secret="pass-word-99")


# --- the token of a host


def test_a_host_that_repeats_the_token(call, model, monkeypatch, tmp_path):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    error = {"kind": "PlaceError", "asked": TOKEN, "found": quote(TOKEN, safe=""), "do": json.dumps(f"Bearer {TOKEN}")}
    for status, body in (
        (200, {"wire": 2, "versions": {"torch": TOKEN}, "stages": {}}), (200, {"a": [{"b": TOKEN[:14]}]}), (500, error),
        (503, error), (404, TOKEN),
    ):  # fmt: skip
        with answering(lambda handler, s=status, b=body: say(handler, s, json.dumps(b).encode())) as (url, got):
            words = ["--model", model, "--placement", f"denoise={url}", "--retries", 0, "--out", "a.mp4", *SHORT]
            said = call("run", PROMPT, "--run", f"r{status}{len(got)}{len(str(body))}", *words, "--debug")
            assert got[0][1]["Authorization"] == f"Bearer {TOKEN}"
            doctor = call("doctor", "--placement", f"denoise={url}", "--retries", 0)
        assert (said.code, doctor.code) == (1, 1)
        if status == 200:
            assert "its answer repeats our token" in said.err
        search(tmp_path, said.out, said.err, doctor.out, doctor.err, secret=TOKEN)


def test_a_host_that_repeats_the_token_in_a_result():
    channel = HTTPChannel("http://127.0.0.1:1", token=TOKEN)
    for message in (
        Message("outcome", State({"outcome": {"settings": {"a": TOKEN}}}).to_bytes()),
        Message("kept", State({"x": [TOKEN[14:]]}).to_bytes()),
        Message("event", json.dumps({"a": TOKEN}).encode()),
    ):
        with pytest.raises(PlaceError, match="its answer repeats our token"):
            channel.check_silent(words_of(message))
    channel.check_silent(words_of(Message("outcome", State({"outcome": {}}).to_bytes())))


def test_a_token_that_cannot_be_sent_is_not_shown(call, model, monkeypatch, tmp_path):
    for token in ("half-of-a-token-1\rother-half", "half-of-a-token-1\x1bother-half", "ö-half-of-a-token-1"):
        monkeypatch.setenv("DITKIT_HOST_TOKEN", token)
        words = ["--model", model, "--placement", "denoise=http://127.0.0.1:9", "--out", "a.mp4", *SHORT]
        for said in (call("generate", PROMPT, *words), call("host", "--model", model, "--port", 0)):
            assert (said.code, said.err.count("\n")) == (2, 1)
            search(tmp_path, said.err, secret="half-of-a-token-1")


def test_a_host_that_sends_us_on_is_not_followed(monkeypatch):
    with answering(lambda handler: say(handler, 200, b"{}")) as (other, got):
        onward = {"Location": f"{other}/stages?key=abcdef123"}
        with answering(lambda handler: say(handler, 307, **onward)) as (url, _), pytest.raises(PlaceError) as e:
            HTTPChannel(url, token=TOKEN).ask("describe")
    assert got == []
    assert str(e.value).endswith("/stages?key=***'. Give the address itself.")


# --- settings


SETTINGS = {
    "--model": "https://me:{}@host", "--expander": "http://host/v1?token={}", "--cache": "https://host/?key={}",
    "--placement": "denoise=http://me:{}@host:1", "--components": "vae=https://host/?access_token={}",
    "--loras": "https://me:{}@host/x", "--set": "expander=http://host/v1?Authorization={}",
    "--image": "https://me:{}@host/a.png",
}  # fmt: skip


@pytest.mark.parametrize("flag", SETTINGS)
def test_an_address_with_a_secret_is_refused_and_not_shown(call, model, monkeypatch, tmp_path, flag):
    text, secret = SETTINGS[flag].format("pass-word-4711"), "pass-word-4711"
    words = [flag, text] if flag == "--model" else ["--model", model, flag, text]
    for said in (call("run", PROMPT, *words, "--run", "r", *SHORT, "--debug"), call("plan", PROMPT, *words)):
        if flag != "--image":
            assert said.code == 2
        search(tmp_path, said.out, said.err, secret=secret)
    with pytest.raises(SetupError, match="a password or a key"):
        ditkit.Setup.of({"model": SETTINGS["--model"].format(secret)})


@pytest.mark.slow
def test_a_child_process_shows_none(tiny_model, server, monkeypatch, tmp_path):
    """It has the environment, and its command line is for everybody to read."""
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", SECRET)
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    server.replies[:] = [failing(401, f"not {SECRET}")]
    pipe = ditkit.load(
        tiny_model, threads=1, expander=server.url, retries=0, timeout=30, placement={"expand_prompt": "process"}
    )
    try:
        with pytest.raises(PlaceError, match=r"\(at process\): it wants another key") as e:
            pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "expand": "yes"})), until="expand_prompt")
        assert server.keys == [f"Bearer {SECRET}"]
        lines = [file.read_text(errors="replace") for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
        search(tmp_path, str(e.value), *lines)
        search(tmp_path, str(e.value), *lines, secret=TOKEN)
    finally:
        pipe.places.close()
