"""Expanding prompts as a stage: what it writes, when it runs, what fails and how, and the command line around it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import chat_models
import numpy as np
import pytest
import tiny
import typer
from chat_server import HELD, MODEL, ChatServer, chat, failing, serving

import ditkit
from ditkit import replay
from ditkit.cli import expand
from ditkit.contracts import Wish
from ditkit.errors import LoadError, PlaceError, RequestError, SetupError
from ditkit.state import State

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quiet(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DITKIT_EXPANDER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    server.replies.clear()
    server.asked.clear()
    server.keys.clear()


@pytest.fixture(scope="module")
def pipe(tiny_model, server):
    return ditkit.load(tiny_model, threads=1, expander=server.url, retries=0, timeout=5)


def run(pipe, until: str | None = "encode_text", listeners=(), **request):
    state = pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": 3, "expand": "yes", **request}))
    return pipe.run(state, until=until, listeners=listeners).state


# --- what it writes


def test_the_original_stays_and_the_expansion_is_encoded(pipe, server):
    state = run(pipe)
    text = f"{PROMPT}, expanded with seed 3"
    assert (state["prompt"], state["expanded_prompt"]) == ([PROMPT], [text])
    plain = run(pipe, prompt=text, expand="no")
    assert state["prompt_embeds"].equal(plain["prompt_embeds"])
    assert "expanded_prompt" not in plain
    assert len(server.asked) == 1


def test_what_is_asked_and_what_is_told(pipe, server):
    about = run(pipe, expand_temperature=0.2, expand_max_tokens=99)["expansion"][0]
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["seed"], asked["max_tokens"]) == (MODEL, 0.2, 3, 99)
    assert [m["role"] for m in asked["messages"]] == ["system", "user"]
    assert "80 to 100 words in English" in asked["messages"][0]["content"]
    assert asked["messages"][1]["content"] == PROMPT
    expected = {
        "expander": server.url, "model": MODEL, "told_model": f"{MODEL}@1", "told_build": "build-1",
        "template": "t2v-en", "template_version": 2, "language": "en", "pictures": [], "temperature": 0.2, "seed": 3,
        "raw": f"{PROMPT}, expanded with seed 3", "reasoning": "", "finish": "stop", "prompt_tokens": 20, "tokens": 30,
    }  # fmt: skip
    assert {k: v for k, v in about.items() if k != "template_sha256"} == expected
    assert len(about["template_sha256"]) == 64


def test_the_key_is_sent_and_nowhere_kept(tiny_model, server, monkeypatch):
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", "very-secret")
    state = run(ditkit.load(tiny_model, threads=1, expander=server.url))
    assert server.keys == ["Bearer very-secret"]
    assert b"very-secret" not in state.to_bytes()


def test_each_clip_has_its_own_expansion(pipe, server):
    state = run(pipe, prompt=["a red circle", "一个红色的圆"], seed=[3, 4])
    assert state["expanded_prompt"] == ["a red circle, expanded with seed 3", "一个红色的圆, expanded with seed 4"]
    assert [about["language"] for about in state["expansion"]] == ["en", "zh"]


def test_a_large_seed_fits_into_every_server(pipe, server):
    run(pipe, seed=2**63 - 1)
    assert 0 <= server.asked[0]["seed"] < 2**31


def test_a_picture_goes_into_the_message(tmp_path, server):
    folder = tiny.write(tmp_path / "i2v", "i2v")
    pipe = ditkit.load(folder, threads=1, expander=server.url, retries=0)
    picture = np.zeros((40, 3000, 3), np.uint8)
    state = pipe.begin(*_with_picture(pipe, picture))
    server.replies.append(chat("It rolls."))
    told = pipe.run(state, until="expand_prompt").state["expansion"][0]
    image, text = server.asked[0]["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": PROMPT}
    assert (told["template"], told["pictures"]) == ("i2v-en", ["image"])
    assert _size(image["image_url"]["url"]) == (1024, 14)


def _with_picture(pipe, picture):
    from ditkit import pictures

    values, pixels = pictures.take(
        {
            "prompt": PROMPT,
            "image": picture,
            "expand": "yes",
            "width": 32,
            "height": 32,
            "frames": 5,
            "size_from": "request",
        }
    )
    return pipe.model.request(values), pixels


def _size(url: str) -> tuple[int, int]:
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size


# --- when it runs


def test_without_an_expander_the_pipeline_is_as_ever(tiny_model):
    pipe = ditkit.load(tiny_model, threads=1)
    assert pipe.stages.names == ["encode_text", "denoise", "decode_latents"]
    with pytest.raises(SetupError, match="Name a server or a folder with expander"):
        run(pipe)


def test_with_no_it_does_not_run_even_when_named(pipe, server):
    skipped = {}
    state = pipe.begin(pipe.model.request({"prompt": PROMPT}))
    pipe.run(state, start="expand_prompt", until="encode_text", listeners=[
        lambda e: skipped.update({e["stage"]: e["reason"]}) if e.name == "stage.skipped" else None])  # fmt: skip
    assert skipped == {"expand_prompt": "the request has expand=no"}
    assert server.asked == []


def test_a_state_that_no_longer_wants_it_goes_on_without(pipe):
    state = run(pipe)
    plain = pipe.run(state.with_fields({"request": {**state["request"], "expand": "no"}}), until="encode_text").state
    assert "expanded_prompt" not in plain
    assert "expansion" not in plain
    assert plain["prompt_embeds"].equal(run(pipe, expand="no")["prompt_embeds"])


def test_it_runs_once_and_again_when_what_it_read_is_another(pipe, server):
    state = run(pipe)
    pipe.run(State.from_bytes(state.to_bytes()), until="encode_text")
    assert len(server.asked) == 1
    warmer = {**state["request"], "expand_temperature": 1.5}
    pipe.run(state.with_fields({"request": warmer}), until="encode_text")
    assert len(server.asked) == 2
    wider = {**state["request"], "guidance_scale": 2.0}
    pipe.run(state.with_fields({"request": wider}), until="encode_text")
    assert len(server.asked) == 2


def test_another_template_file_is_another_result(pipe, server, tmp_path):
    file = tmp_path / "mine.toml"
    text = 'name = "mine"\nversion = 1\nlanguage = "en"\npictures = []\ninstructions = "Shout."\n'
    file.write_text(text)
    first = run(pipe, expand_template=str(file))
    assert server.asked[0]["messages"][0]["content"] == "Shout."
    file.write_text(text.replace("Shout", "Whisper"))
    second = run(pipe, expand_template=str(file))
    assert first.fingerprints["prompt_embeds"] != second.fingerprints["prompt_embeds"]
    file.unlink()
    pipe.run(first, start="expand_prompt", until="encode_text")  # the State is whole without the file
    assert server.asked[-1]["messages"][0]["content"] == "Shout."


def test_ask_from_python_says_how_and_that_works(pipe):
    with pytest.raises(RequestError, match="Run it until='expand_prompt', change expanded_prompt"):
        run(pipe, until=None, expand="ask")
    state = run(pipe, until="expand_prompt", expand="ask")
    mine = state.with_fields({"expanded_prompt": ["a blue square"]})
    went_on = pipe.run(mine, until="encode_text").state
    assert went_on["expanded_prompt"] == ["a blue square"]
    assert went_on["prompt_embeds"].equal(run(pipe, prompt="a blue square", expand="no")["prompt_embeds"])


# --- what fails, and how


BAD = {
    "500": ([failing(500)], r"answered 500 .*out of order.*Look at its log"),
    "401": ([failing(401, "no such key")], r"wants another key .*no such key.*Set OPENAI_API_KEY"),
    "400": ([failing(400, "context too long")], r"answered 400 for model 'tiny-writer' .*context too long"),
    "html": ([(200, b"<html>It works!</html>", "text/html")], r"no chat completion"),
    "half json": ([(200, b'{"choices": [', "application/json")], r"cannot be read"),
    "other json": ([(200, b'{"hello": 1}', "application/json")], r"no chat completion"),
    "strange choices": ([(200, b'{"choices": [7]}', "application/json")], r"no chat completion"),
    "content is a number": ([chat(7)], r"its answer is no text"),  # type: ignore[arg-type]
    "empty": ([chat("  \n")], r"the answer is empty"),
    "none": ([chat(None)], r"the answer is empty"),
    "only quotes": ([chat('""')], r"the answer is empty"),
    "cut": ([chat("A long and", "length")], r"cut off at 512 tokens\. Raise expand_max_tokens"),
    "cut while reasoning": ([chat("<think>Well", "length")], r"still reasoning"),
    "only reasoning": ([chat("", reasoning_content="Well")], r"reasoned and did not answer"),
    "refusal": ([chat(None, refusal="I would rather not")], r"the model refused: I would rather not"),
    "filter": ([chat("A", "content_filter")], r"filter"),
    "slow": ([HELD], r"did not answer in time"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_failure_is_an_error_or_the_raw_prompt_and_then_it_is_told(case, pipe, tiny_model, server):
    replies, said = BAD[case]
    if case == "slow":
        pipe = ditkit.load(tiny_model, threads=1, expander=server.url, retries=0, timeout=0.3)
    server.replies[:] = replies
    with pytest.raises(PlaceError, match=said) as e:
        run(pipe, until="expand_prompt")
    assert str(e.value).endswith("or go on with the raw prompt by expand_fallback.")
    server.replies[:] = replies
    told = []
    state = run(pipe, expand_fallback=True, listeners=[told.append])
    assert state["expanded_prompt"] == [PROMPT]
    assert state["expansion"][0]["failure"].startswith("expanding a prompt at http")
    assert [e["prompt"] for e in told if e.name == "prompt.fallback"] == [PROMPT]


def test_a_server_that_is_not_there(tiny_model):
    with serving() as gone:
        url = gone.url
    pipe = ditkit.load(tiny_model, threads=1, expander=url, retries=0)
    with pytest.raises(PlaceError, match="it was not reached"):
        run(pipe)
    assert run(pipe, expand_fallback=True)["expanded_prompt"] == [PROMPT]


def test_a_busy_server_is_asked_again_as_often_as_the_setup_says(tiny_model, server):
    pipe = ditkit.load(tiny_model, threads=1, expander=server.url, retries=1)
    server.replies[:] = [failing(503), chat("A circle.")]
    assert run(pipe)["expanded_prompt"] == ["A circle."]
    server.replies[:] = [failing(503), failing(503), chat("A circle.")]
    with pytest.raises(PlaceError, match="answered 503"):
        run(pipe)
    assert len(server.asked) == 4


def test_reasoning_is_kept_beside_the_answer(pipe, server):
    server.replies[:] = [chat("<think>\nred, round\n</think>\n\n“A red circle rolls.”"),
                         chat("A red circle rolls.", reasoning_content="red, round")]  # fmt: skip
    for _ in range(2):
        state = run(pipe, until="expand_prompt")
        assert state["expanded_prompt"] == ["A red circle rolls."]
        assert state["expansion"][0]["reasoning"] == "red, round"


def test_a_fallback_is_not_kept_for_other_runs(tiny_model, server, tmp_path):
    pipe = ditkit.load(tiny_model, threads=1, expander=server.url, retries=0, cache=str(tmp_path / "cache"))
    server.replies[:] = [failing(500)]
    assert run(pipe, expand_fallback=True)["expanded_prompt"] == [PROMPT]
    assert run(pipe, expand_fallback=True)["expanded_prompt"] == [f"{PROMPT}, expanded with seed 3"]
    assert run(pipe)["expanded_prompt"] == [f"{PROMPT}, expanded with seed 3"]
    assert len(server.asked) == 2  # the third run found the answer of the second


def test_another_process_gives_the_same_state(tiny_model, pipe, server):
    elsewhere = ditkit.load(
        tiny_model, threads=1, expander=server.url, retries=0, timeout=30, placement={"expand_prompt": "process"}
    )
    try:
        one, other = run(pipe), run(elsewhere)
        assert other.equal(one)
        assert other.fingerprints == one.fingerprints
        server.replies.append(failing(500))
        with pytest.raises(PlaceError, match=r"\(at process\): it answered 500"):
            run(elsewhere, seed=9)
    finally:
        elsewhere.places.close()


# --- a model in this process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return chat_models.write_text_model(root / "text"), chat_models.write_seeing_model(root / "seeing")


@pytest.mark.parametrize("which", [0, 1])
def test_a_local_model_repeats_itself_and_leaves_torch_as_it_was(folders, tiny_model, which):
    import torch

    pipe = ditkit.load(tiny_model, threads=1, expander=f"transformers:{folders[which]}")
    asked = {
        "expand_temperature": 1.0,
        "expand_max_tokens": 1500,
        "until": "expand_prompt",
        "expand_fallback": True,
    }  # fmt: skip; it may say nothing
    torch.manual_seed(5)
    first = run(pipe, **asked)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert drawn.equal(torch.rand(3))
    again = ditkit.load(tiny_model, threads=1, expander=f"transformers:{folders[which]}")
    assert run(again, **asked).equal(first)
    assert run(pipe, seed=4, **asked)["expansion"][0]["raw"] != first["expansion"][0]["raw"]
    assert first["expansion"][0]["finish"] == "stop"
    expander = pipe.components["prompt_expander"]
    short = [expander(Wish("Say it.", PROMPT, (), 1.0, seed, 1)) for seed in range(8)]
    assert ("length", 1) in {(answer.finish, answer.tokens) for answer in short}  # some say nothing and stop


def test_a_local_model_that_reads_text_alone_says_so(folders, tmp_path):
    folder = tiny.write(tmp_path / "i2v", "i2v")
    picture = np.full((32, 32, 3), 200, np.uint8)
    pipe = ditkit.load(folder, threads=1, expander=f"transformers:{folders[0]}")
    with pytest.raises(SetupError, match="template that shows no picture"):
        pipe.run(pipe.begin(*_with_picture(pipe, picture)), until="expand_prompt")


def test_a_folder_that_is_no_model_is_refused_before_anything_is_loaded(tiny_model, tmp_path):
    loads = []
    pipe = ditkit.load(tiny_model, threads=1, expander=f"transformers:{tmp_path}")
    with pytest.raises(SetupError, match=r"holds no config\.json"):
        run(pipe, until=None, listeners=[lambda e: loads.append(e.name) if e.name == "load.end" else None])
    assert loads == []


def test_code_in_the_folder_is_not_run(tmp_path, monkeypatch):
    """Also not when somebody pipes a yes into transformers' question."""
    import io
    import sys

    from ditkit.prompting.local import LocalExpander

    names = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": names}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(LoadError, match="custom code"):
        LocalExpander(str(tmp_path), lambda: ("float32", "cpu")).load()
    assert not (tmp_path / "ran").exists()


def test_its_fingerprint_is_that_of_its_files(folders, tmp_path):
    import shutil

    from ditkit.prompting.local import LocalExpander

    def of(folder, dtype="float32"):
        return LocalExpander(str(folder), lambda: (dtype, "cpu")).fingerprint

    copied = shutil.copytree(folders[0], tmp_path / "copy")
    assert of(copied) == of(folders[0]) != of(folders[0], "bfloat16")
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    assert of(copied) != of(folders[0])


# --- the command line


def test_expand_shows_what_changed(call, server):
    said = call("expand", PROMPT, "--expander", server.url, "--seed", 3)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == [
        f"prompt   {PROMPT}",
        f"expanded {PROMPT}, expanded with seed 3  (t2v-en, {MODEL}@1, 30 tokens)",
        f"changes  {PROMPT}{{+, expanded with seed 3+}}",
    ]
    assert call("expand", PROMPT, "--expander", server.url, "-q").out == f"{PROMPT}, expanded with seed 0\n"
    told = json.loads(call("expand", PROMPT, "--expander", server.url, "--json").out)
    assert told["expansion"][0]["model"] == MODEL


def test_expand_with_a_picture(call, server, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    server.replies.append(chat("It rolls."))
    said = call("expand", PROMPT, "--image", "a.png", "--expander", server.url)
    assert "(i2v-en" in said.out
    assert server.asked[0]["messages"][1]["content"][0]["type"] == "image_url"


def test_expand_without_a_model_or_a_server(call):
    said = call("expand", PROMPT)
    assert said.code == 2
    assert "Add --expander URL" in said.err
    with serving() as gone:
        url = gone.url
    said = call("expand", PROMPT, "--expander", url, "--retries", 0)
    assert said.code == 1
    assert "was not reached" in said.err
    said = call("expand", PROMPT, "--expander", url, "--retries", 0, "--expand-fallback")
    assert said.code == 0
    assert "The raw prompt is used." in said.err
    assert "failed: raw prompt" in said.out


def make(call, model, server, *words):
    return call("generate", PROMPT, "--model", model, "--seed", 3, "--expander", server.url, "--retries", 0,
                "--out", "a.npz", "--no-sheet", *words)  # fmt: skip


def test_a_clip_remembers_its_expansion_and_replays_without_the_server(call, model, tmp_path):
    with serving() as server:
        said = make(call, model, server, "--expand", "yes")
        assert said.code == 0, said.err
        assert f"changes  {PROMPT}{{+, expanded with seed 3+}}" in said.out
        assert len(server.asked) == 1
    manifest = replay.read(tmp_path / "a.npz").manifest
    assert manifest["request"]["prompt"] == PROMPT
    assert manifest["expanded"]["expanded_prompt"] == [f"{PROMPT}, expanded with seed 3"]
    said = call("replay", "a.npz", "--quiet")
    assert (said.code, said.err) == (0, "")
    plain = call("generate", f"{PROMPT}, expanded with seed 3", "--model", model, "--seed", 3, "--json",
                 "--out", "b.npz", "--no-sheet")  # fmt: skip
    assert json.loads(plain.out)["output_sha256"] == [manifest["output_sha256"]]


def test_a_state_goes_on_beside_the_file_that_its_template_came_from(call, model, server, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nversion = 1\nlanguage = "en"\npictures = []\ninstructions = "Shout."\n'
    )
    (tmp_path / "all.toml").write_text(
        f'model = "{model}"\nexpander = "{server.url}"\nexpand = "yes"\nexpand_template = "mine.toml"\n'
    )
    words = ["--config", "all.toml", "--until", "encode_text", "--quiet", "--save-state"]
    said = call("run", PROMPT, *words, "a.safetensors")
    assert said.code == 0, said.err
    said = call("run", "--from", "a.safetensors", *words, "b.safetensors")
    assert said.code == 0, said.err
    assert State.load(tmp_path / "a.safetensors").equal(State.load(tmp_path / "b.safetensors"))
    assert len(server.asked) == 1


def test_of_several_clips_each_replays_with_its_own(call, model, server, tmp_path):
    said = make(call, model, server, "--expand", "yes", "--seed", 4, "--quiet")
    assert said.code == 0, said.err
    assert len(server.asked) == 2
    assert replay.read(tmp_path / "a-1.npz").manifest["expanded"]["expanded_prompt"] == [
        f"{PROMPT}, expanded with seed 4"
    ]
    assert call("replay", "a-1.npz", "--quiet").code == 0
    assert len(server.asked) == 2


def test_a_manifest_with_something_else_in_that_place_is_refused(call, model, server, tmp_path):
    assert make(call, model, server, "--expand", "yes").code == 0
    card = json.loads((tmp_path / "a.json").read_text())
    card["manifest"]["expanded"]["seed"] = [4]
    (tmp_path / "a.json").write_text(json.dumps(card))
    said = call("replay", "a.json")
    assert said.code == 2
    assert "no usable 'expanded'" in said.err


def test_ask_without_a_terminal_is_an_error_before_anything_is_asked(call, model, server):
    said = make(call, model, server, "--expand", "ask")
    assert said.code == 2
    assert "there is no terminal to ask at" in said.err
    assert server.asked == []


class Terminal:
    """Both ends of a pseudo-terminal: stdin and stdout of the process are one, ``type`` is the keyboard."""

    def __init__(self, monkeypatch):
        import pty

        self.master, slave = pty.openpty()
        self.files = [os.fdopen(slave, "r"), os.fdopen(os.dup(slave), "w", buffering=1)]
        for name, file in zip(("stdin", "stdout"), self.files, strict=True):
            monkeypatch.setattr(sys, name, file)

    def type(self, *lines: str) -> None:
        os.write(self.master, "".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        for file in self.files:
            file.close()
        os.close(self.master)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
@pytest.mark.parametrize(
    ("typed", "text", "chosen", "count"),
    [
        ([""], f"{PROMPT}, expanded with seed 3", None, 1),
        (["what", "use"], f"{PROMPT}, expanded with seed 3", None, 1),
        (["again", "a", "u"], f"{PROMPT}, expanded with seed 5", None, 3),
        (["raw"], PROMPT, "raw", 1),
        (["edit"], "my own words", "edited", 1),
        (["quit"], None, None, 1),
    ],
)
def test_ask(call, model, server: ChatServer, tmp_path, monkeypatch, typed, text, chosen, count):
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'my own words' > \"$1\"\n")
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)
    terminal = Terminal(monkeypatch)
    try:
        terminal.type(*typed)
        said = make(call, model, server, "--expand", "ask", "--quiet")
    finally:
        terminal.close()
    assert len(server.asked) == count
    if text is None:
        assert said.code == 1
        assert not (tmp_path / "a.npz").exists()
        return
    assert said.code == 0, said.err
    expanded = replay.read(tmp_path / "a.npz").manifest["expanded"]
    assert (expanded["expanded_prompt"], expanded["expansion"][0].get("chosen")) == ([text], chosen)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
def test_a_ctrl_c_ends_the_question_wherever_it_is_handled(monkeypatch):
    """A signal that does not break the waiting itself, as one that came just before it or went to another thread."""
    terminal, over, hung = Terminal(monkeypatch), threading.Event(), []

    def press() -> None:
        shown = b""
        while b"[q]uit: " not in shown:
            shown += os.read(terminal.master, 4096)
        time.sleep(0.3)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not over.wait(20):
            hung.append(True)
            terminal.type("use")

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        with pytest.raises(typer.Abort):
            expand.choice()
    finally:
        over.set()
        pressing.join()
        terminal.close()
    assert not hung


def test_a_receipt_tells_of_the_expansion_that_ran_before_the_rest(call, model, server, tmp_path):
    said = make(call, model, server, "--expand", "yes", "--seed", 4, "--placement", "expand_prompt=process")
    assert said.code == 0, said.err
    card = json.loads((tmp_path / "a-0.json").read_text())["manifest"]
    assert {*card["stages"]} == {"expand_prompt", "encode_text", "denoise", "decode_latents"}
    assert card["places"]["expand_prompt"] == ["process"]
    assert [trip["stage"] for trip in card["travelled"]] == ["expand_prompt"]
    assert card["skipped"] == {}
    assert "skipped" not in said.out.split("changes")[-1]
    assert said.out.count("time   ") == said.out.count("expand_prompt at process") == 1
    said = call("run", PROMPT, "--model", model, "--expander", server.url, "--expand", "yes", "--run", "r",
                "--cache", "cache", "--seed", 3, "--json", "--no-sheet", "--out", "b.npz")  # fmt: skip
    told = json.loads(said.out)
    assert told["cached"]["expand_prompt"].startswith("miss")
    assert told["stages"]["expand_prompt"] > 0
    said = make(call, model, server, "--expand", "yes", "--cache", "cache")
    assert "expand_prompt: hit" in said.out
    assert "skipped" not in said.out


def test_an_expansion_that_fails_leaves_no_fork_behind(call, model, server, tmp_path):
    asked = "--expander", server.url, "--retries", 0, "--no-sheet"
    said = call("run", PROMPT, "--model", model, *asked, "--run", "a")
    assert said.code == 0, said.err
    server.replies[:] = [failing(500)]
    said = call("fork", "a", "--expand", "yes", *asked)
    assert said.code == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    said = call("fork", "a", "--expand", "yes", *asked)
    assert said.code == 0, said.err
    card = json.loads((tmp_path / "runs" / "a-1" / "clip.json").read_text())["manifest"]
    assert "expand_prompt" in card["stages"]


def test_a_kept_run_that_fails_says_how_it_goes_on(call, model):
    said = call("run", PROMPT, "--model", model, "--run", "a", "--no-sheet", "--placement",
                "decode_latents=http://127.0.0.1:9", "--retries", 0)  # fmt: skip
    assert said.code == 1
    print(said.err)
    assert "ditkit run --resume a" in said.err
