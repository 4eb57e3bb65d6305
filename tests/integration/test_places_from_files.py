"""A file from somebody else does not decide where anything goes: clips, States, run folders and forks that name an
address reach nobody, and read no picture, until the person names it too. Tokens go to the host that they are for."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import ditkit
from ditkit import replay
from ditkit.addresses import origin_of
from ditkit.errors import SetupError, StateError
from ditkit.keys import token_for
from ditkit.runs import Run
from ditkit.state import State
from ditkit.trust import check_places, placed_by

PROMPT = "a red circle"
SECRET = "a-secret-token-of-this-user-0123456789"
OUT = ("--out", "a.npz", "--no-sheet", "--quiet")


@pytest.fixture
def sink():
    """A server of a stranger; the requests that it got, with their headers."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append((self.path, dict(self.headers)))
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def secrets(call, monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + SECRET)


def edited(file: Path, change) -> Path:
    card = json.loads(file.read_text())
    change(card)
    file.write_text(json.dumps(card))
    return file


PLACES = {
    "placement": lambda url: {"placement": {"denoise": url}},
    "placement of an expert": lambda url: {"placement": {"denoise.transformer": url}},
    "ray": lambda url: {"placement": {"denoise": url.replace("http", "ray")}},
    "components": lambda url: {"components": {"vae": url}},
    "model": lambda url: {"model": url},
    "model of a hub": lambda _: {"model": "hf:stranger/model"},
    "expander": lambda url: {"expander": url},
    "loras": lambda _: {"loras": ["hf:stranger/lora"]},
}
MORE = {
    "expander of a folder": lambda _: {"expander": "transformers:/somewhere"},
    "cache": lambda _: {"cache": "/tmp/x"},
}


@pytest.mark.parametrize("what", sorted(PLACES.keys() - {"expander"}))
def test_a_clip_reaches_nobody(call, model, sink, what):
    url, got = sink
    assert call("generate", PROMPT, "--model", model, *OUT).code == 0
    edited(Path("a.json"), lambda card: card["manifest"]["setup"].update(PLACES[what](url)))
    said = call("replay", "a.json")
    assert (said.code, got) == (2, [])
    assert "a file does not decide where anything goes. Name it yourself if it is meant: --" in said.err
    assert said.err.count("\n") == 1
    assert SECRET not in said.err + said.out
    with pytest.raises(StateError, match="a file does not decide"):
        replay.prepare(replay.read("a.json"))
    assert got == []


def test_a_clip_is_replayed_without_the_language_model(call, model, sink):
    url, got = sink
    assert call("generate", PROMPT, "--model", model, *OUT).code == 0
    edited(Path("a.json"), lambda card: card["manifest"]["setup"].update({"expander": url}))
    assert call("replay", "a.json", "--quiet").code == 0
    edited(Path("a.json"), lambda card: card["manifest"]["request"].update({"expand": "yes"}))
    assert f"it names expander {url}, and a file does not decide" in call("replay", "a.json").err
    assert got == []


@pytest.mark.parametrize("what", [*PLACES, *MORE])
@pytest.mark.parametrize("way", ["resume", "fork", "python"])
def test_a_run_reaches_nobody(call, model, sink, what, way):
    url, got = sink
    words = ["--model", model, "--stop-at-step", 1, "--no-sheet", "--quiet"]
    assert call("run", PROMPT, "--run", "runs/a", *words).code == 0
    edited(Path("runs/a/run.json"), lambda about: about["setup"].update((PLACES | MORE)[what](url)))
    if way == "python":
        with pytest.raises(StateError, match="a file does not decide"):
            Run.open("runs/a").go()
    else:
        said = call("run", "--resume", "runs/a", "--quiet") if way == "resume" else call("fork", "runs/a", "--quiet")
        assert said.code == 2
        assert "a file does not decide where anything goes" in said.err
        assert SECRET not in said.err + said.out
    assert got == []


def test_a_state_reaches_nobody(call, model, sink):
    url, got = sink
    assert call("run", PROMPT, "--model", model, "--stop-at-step", 1, "--save-state", "a.safetensors").code == 0
    state = State.load("a.safetensors")
    state.with_fields({"model": {**state["model"], "name": url}}).save("a.safetensors")
    said = call("run", "--from", "a.safetensors", *OUT)
    assert (said.code, got) == (2, [])
    assert f"--model {url}; or --allow-from-file model" in said.err


def test_what_is_named_or_allowed_is_followed(call, model, sink):
    url, got = sink
    assert call("run", PROMPT, "--run", "runs/a", "--model", model, "--stop-at-step", 1, "--quiet").code == 0
    edited(Path("runs/a/run.json"), lambda about: about["setup"].update({"placement": {"denoise": url}, "retries": 0}))
    for words in (["--placement", f"denoise={url}"], ["--allow-from-file", "placement"]):
        got.clear()
        assert call("run", "--resume", "runs/a", "--quiet", *OUT[:2], *words).code == 1
        assert got, "the host was asked"
    got.clear()
    assert "there is no such thing" in call("run", "--resume", "runs/a", "--allow-from-file", "placements").err
    assert call("run", "--resume", "runs/a", "--quiet", "--placement", "{}", *OUT).code == 0
    assert got == []


def test_the_words_to_type_are_right_and_none_is_ignored(call, model):
    said = call("generate", PROMPT, "--model", model, *OUT, "--allow-from-file", "placement")
    assert (said.code, "no file is opened that says where anything goes" in said.err) == (2, True)
    with pytest.raises(StateError, match="if it is meant: --plain-http; or --allow-from-file plain_http"):
        check_places({"plain_http": True}, {}, (), "x")


def test_places_on_this_machine_are_followed(call, model):
    words = ["--model", model, "--placement", "denoise=process:cpu", "--stop-at-step", 1, "--quiet"]
    assert call("run", PROMPT, "--run", "runs/a", *words).code == 0
    assert call("run", "--resume", "runs/a", *OUT).code == 0


# --- pictures


def test_no_picture_is_read_because_a_clip_names_it(call, tmp_path):
    for name in ("mine", "private"):
        Image.new("RGB", (64, 64), (200 if name == "mine" else 10, 30, 30)).save(tmp_path / f"{name}.png")
    words = ["generate", PROMPT, "--model", "shapes-i2v", "--image", "mine.png", "--steps", 2, *OUT]
    assert call(*words).code == 0
    assert call("replay", "a.npz", "--quiet", "--picture", "image=mine.png").code == 0
    assert call("replay", "a.npz", "--quiet", "--allow-from-file", "pictures").code == 0
    assert "image is not the one that it was made with" in call("replay", "a.npz", "--picture", "image=private.png").err
    said = call("replay", "a.npz")
    assert said.code == 2
    assert "and a file does not decide which picture is read. Name it: --picture image=FILE" in said.err

    def other(card):
        card["manifest"]["request"]["image"] = str(tmp_path / "private.png")
        del card["manifest"]["inputs"]

    edited(Path("a.json"), other)
    said = call("replay", "a.json", "--allow-from-file", "pictures")
    assert "does not say what that showed. Use an untouched file" in said.err


# --- tokens


def test_a_token_goes_to_its_host(monkeypatch):
    one, other = "http://127.0.0.1:8700", "https://gpu.example:443"
    assert token_for(one, [one], False) == SECRET
    with pytest.raises(SetupError, match=f"the run has 2 hosts, .* Write DITKIT_HOST_TOKEN='{one} TOKEN'"):
        token_for(one, [one, other], False)
    monkeypatch.setenv("DITKIT_HOST_TOKEN", f"{one}/ {SECRET} https://gpu.example other-{SECRET}")
    assert token_for(one, [one, other], False) == SECRET
    assert token_for(other, [one, other], False) == f"other-{SECRET}"
    for stranger in (
        "http://127.0.0.1:8701",
        "https://127.0.0.1:8700",
        "https://gpu.example:444",
        "https://gpu.example.com",
    ):
        assert token_for(stranger, [one, stranger], False) is None
    monkeypatch.setenv("DITKIT_HOST_TOKEN", f"{one} {SECRET} more")
    with pytest.raises(SetupError, match="holds no pairs of an address and a token") as e:
        token_for(one, [one], False)
    assert SECRET not in str(e.value)
    monkeypatch.delenv("DITKIT_HOST_TOKEN")
    assert token_for(one, [one, other], False) is None


def test_a_token_goes_over_plain_http_on_this_machine_only():
    for near in ("http://127.0.0.1:8700", "http://localhost:1", "http://[::1]:8700", "https://gpu.example"):
        assert token_for(near, [near], False) == SECRET
    for far in ("http://gpu.example:8700", "http://192.168.0.2:8700", "http://127.0.0.1.example:8700"):
        with pytest.raises(SetupError, match=r"as plain text\. Use https:// or a tunnel .* or --plain-http"):
            token_for(far, [far], False)
        assert token_for(far, [far], True) == SECRET


def test_origins():
    assert origin_of("http://a") == origin_of("http://A:80/") != origin_of("https://a")


# --- the rule


def test_what_counts_as_a_place():
    setup = ditkit.Setup(
        placement={"denoise": "process:cpu", "encode_text": "cuda:1"}, model="folder", loras=["a.safetensors"]
    )
    assert placed_by(setup.model_dump()) == {}
    check_places({"placement": {"denoise": "https://x"}}, {"placement": {"denoise": "https://x"}}, (), "x")
    with pytest.raises(StateError, match="encode_text=https://y"):
        check_places({"placement": {"denoise": "https://x", "encode_text": "https://y"}},
                     {"placement": {"denoise": "https://x"}}, (), "x")  # fmt: skip
