"""Faults of remote text encoders and prompt expanders that are in use elsewhere; each test is one.

Encoders: a dtype that both ends assume, float32 bytes under a label that says bfloat16, rows without their lengths,
pickles on the wire, nothing at all in place of an error. Expanders: a failure that looks like a success, a language
model that shares a card with the transformer, a template that nobody can name afterwards.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from chat_server import ChatServer, failing, serving
from hosting import in_thread
from safetensors.torch import load as read_safetensors
from shell import alone

import ditkit
from ditkit.contracts import Wish
from ditkit.errors import Lost, MissingDependency, PlaceError, StateError
from ditkit.execution.place import Segment
from ditkit.placement.http.client import CRC, JOB
from ditkit.placement.http.framing import checksum
from ditkit.placement.job import Message
from ditkit.placement.remote import Remote
from ditkit.placement.worker import worker_of
from ditkit.prompting.server import ServerExpander
from ditkit.setup import Setup
from ditkit.state import State

PROMPTS = ["a red circle", "a blue square moving left on a black background"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pipe(tiny_model, request):
    return ditkit.load(tiny_model, threads=1, dtypes={"text_encoder": request.param})


@pytest.fixture(scope="module")
def host(pipe):
    with in_thread(worker_of(pipe.setup, ["encode_text"])) as host:
        yield host.url


@pytest.fixture(scope="module")
def chat():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_of_mine(monkeypatch):
    for name in ("OPENAI_API_KEY", "DITKIT_HOST_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


def begin(pipe, **request):
    return pipe.begin(pipe.model.request({"prompt": PROMPTS, "seed": 3, "batched": True, **request}))


def posted(url, body, **headers):
    names = {JOB: "{}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(f"{url}/stages/encode_text", data=body, headers=names)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def wanted(pipe):
    """What the stage reads, as it travels."""
    state, stage = begin(pipe), pipe.stages["encode_text"]
    return State({name: state[name] for name in stage.reads}).to_bytes()


class Forger:
    """A host whose outcome went through ``forge``; everything else is true."""

    def __init__(self, url, forge):
        from ditkit.placement.http.client import HTTPChannel

        self.channel, self.forge = HTTPChannel(url), forge

    def __getattr__(self, name):
        return getattr(self.channel, name)

    def submit(self, job, inputs):
        for frame in self.channel.submit(job, inputs):
            if frame.kind != "outcome":
                yield frame
                continue
            forged = self.forge(bytes(frame.payload))
            if forged is not None:
                yield Message("outcome", forged)


def run_at(pipe, url, forge):
    remote = Remote("forger", Forger(url, forge), retries=0)
    return pipe.stages.run(
        begin(pipe), pipe.components, until="encode_text", places={"encode_text": [Segment(remote, 0)]}
    )


def with_header(data: bytes, change) -> bytes:
    """A safetensors file whose header was changed, and whose bytes were not."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def edited(change):
    """A State that was made anew with other fields."""

    def forge(data):
        state = State.from_bytes(data)
        fields = dict(state.items())
        change(fields)
        return State(fields).to_bytes()

    return forge


# --- encoders


def test_the_dtype_of_rows_is_said_not_assumed(pipe, host):
    """Elsewhere: raw bytes and a shape, read in the dtype of the client's own config."""
    status, body = posted(host, wanted(pipe))
    rows, dtype = read_safetensors(body)["prompt_embeds"], pipe.setup.dtype_of("text_encoder")
    assert status == 200
    assert rows.dtype is getattr(torch, dtype)
    assert rows.equal(pipe.run(begin(pipe), until="encode_text").state["prompt_embeds"])


@pytest.mark.parametrize("label", ["BF16", "F32", "F64"])  # F16 has as many bytes as BF16: only a probe tells those
def test_bytes_under_the_label_of_another_dtype_are_refused(pipe, host, label):
    """Elsewhere: the payload is always float32, whatever the field beside it says."""
    true = {"float32": "F32", "bfloat16": "BF16"}[pipe.setup.dtype_of("text_encoder")]

    def relabel(header):
        assert header["prompt_embeds"]["dtype"] == true
        header["prompt_embeds"]["dtype"] = label

    if label == true:
        assert "prompt_embeds" in run_at(pipe, host, lambda data: with_header(data, relabel))
        return
    with pytest.raises(PlaceError, match="forger"):
        run_at(pipe, host, lambda data: with_header(data, relabel))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda fields: fields.pop("prompt_lengths"), "prompt_lengths"),
        (lambda fields: fields.pop("prompt_embeds"), "prompt_embeds"),
        (lambda fields: fields.update(prompt_lengths=[3, 3]), "fit together"),
        (lambda fields: fields.update(prompt_lengths=[1]), "prompt_lengths"),
        (lambda fields: fields.update(prompt_embeds=fields["prompt_embeds"].reshape(1, -1, 32)), "prompt_embeds"),
    ],
    ids=["no lengths", "no rows", "other lengths", "one length", "another shape"],
)
def test_rows_without_lengths_that_fit_are_refused(pipe, host, change, found):
    """Elsewhere: no mask and no lengths, so that padding is taken for text."""
    with pytest.raises((PlaceError, StateError, ditkit.errors.PipelineError), match=found):
        run_at(pipe, host, edited(change))


def test_padding_does_not_travel(pipe, host):
    state = State.from_bytes(posted(host, wanted(pipe))[1])
    lengths = state["prompt_lengths"]
    assert lengths[0] < lengths[1], "prompts of different lengths"
    assert len(state["prompt_embeds"]) == sum(lengths)


class Trap:
    """Unpickled, it would be noticed."""

    def __reduce__(self):
        return exec, ("import ditkit; ditkit.trapped = True",)


def test_a_pickle_is_opened_at_neither_end(pipe, host):
    """Elsewhere: ``torch.load`` of what a server sent."""
    plain, packed = pickle.dumps(Trap()), io.BytesIO()
    torch.save({"prompt_embeds": Trap()}, packed)
    for bad in (plain, packed.getvalue()):
        assert posted(host, bad)[0] == 400
        with pytest.raises(PlaceError, match="not a complete safetensors file"):
            run_at(pipe, host, lambda data, bad=bad: bad)
    assert not hasattr(ditkit, "trapped")


def test_no_answer_is_an_error_not_an_empty_embedding(pipe, host):
    """Elsewhere: None, and a run without text."""
    with pytest.raises((Lost, PlaceError), match="no outcome"):
        run_at(pipe, host, lambda data: None)
    with pytest.raises(PlaceError, match="safetensors"):
        run_at(pipe, host, lambda data: b"")


def test_content_that_changed_on_the_way_is_refused(pipe, host):
    body = wanted(pipe)
    assert posted(host, body, **{CRC: f"{checksum([body]):08x}"})[0] == 200
    status, said = posted(host, body.replace(b"red", b"tan"), **{CRC: f"{checksum([body]):08x}"})
    assert (status, json.loads(said)["found"]) == (400, "its content has changed on the way")


# --- expanders


def expanded(pipe, **request):
    state = pipe.begin(pipe.model.request({"prompt": PROMPTS[0], "seed": 3, "expand": "yes", **request}))
    return pipe.run(state, until="expand_prompt").state


def test_an_expansion_that_failed_is_never_taken_for_one(tiny_model, chat: ChatServer):
    """Elsewhere: the original prompt with a line in the log, which users do not notice."""
    pipe = ditkit.load(tiny_model, expander=chat.url, retries=0)
    chat.replies[:] = [failing(500)]
    with pytest.raises(PlaceError, match="expand_fallback"):
        expanded(pipe)
    chat.replies[:] = [failing(500)]
    state = expanded(pipe, expand_fallback=True)
    assert state["expanded_prompt"] == [PROMPTS[0]]
    assert "500" in state["expansion"][0]["failure"]
    assert "failure" not in expanded(pipe)["expansion"][0], "and the next try is a new one"


def test_the_template_of_an_expansion_can_be_named_afterwards(tiny_model, chat, tmp_path):
    """Elsewhere: instructions in the code of that day."""
    pipe = ditkit.load(tiny_model, expander=chat.url, retries=0)
    told = expanded(pipe)["expansion"][0]
    assert (told["template"], type(told["template_version"])) == ("t2v-en", int)
    file = tmp_path / "own.toml"
    hashes = []
    for instructions in ("Say it in verse.", "Say it in prose."):
        file.write_text(f'name = "own"\nversion = 7\nlanguage = "en"\npictures = []\ninstructions = "{instructions}"\n')
        told = expanded(pipe, expand_template=str(file))["expansion"][0]
        assert (told["template"], told["template_version"]) == ("own", 7)
        hashes.append(told["template_sha256"])
    assert hashes[0] != hashes[1], "a change that keeps the version is seen too"


def test_a_language_model_can_be_kept_out_of_the_process_of_the_transformer(tiny_model, chat, monkeypatch):
    """Elsewhere: loaded beside the transformer, which is the first out-of-memory of a card of 24 GB."""
    with in_thread(worker_of(Setup(model=str(tiny_model), expander=chat.url), ["expand_prompt"])) as host:
        pipe = ditkit.load(tiny_model, expander="transformers:nowhere", placement={"expand_prompt": host.url})
        state = expanded(pipe)
    assert state["expanded_prompt"] == [f"{PROMPTS[0]}, expanded with seed 3"]
    assert state["expansion"][0]["expander"] == chat.url, "the one that did it"


def test_a_missing_client_is_named(monkeypatch):
    """Elsewhere: an import at the top, which breaks those who never expand."""
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    expander = ServerExpander("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(MissingDependency, match=r"ditkit\[prompts\]"):
        _ = expander.fingerprint
    with pytest.raises(MissingDependency, match=r"ditkit\[prompts\]"):
        ServerExpander("http://127.0.0.1:9/v1", "some", retries=0)(Wish("Say it at length.", "a", (), 0.7, 1, 100))


def test_nothing_of_a_server_is_imported_by_those_who_use_none(tiny_model):
    code = (
        "import sys, ditkit\n"
        f"pipe = ditkit.load({str(tiny_model)!r})\n"
        "pipe.run(pipe.begin(pipe.model.request({'prompt': 'a'})), until='encode_text')\n"
        "print(*sorted({'openai', 'fastapi', 'uvicorn', 'ray', 'mlx'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone(), timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
