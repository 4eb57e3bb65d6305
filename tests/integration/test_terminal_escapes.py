"""What strangers wrote steers no terminal: prompts, names, hosts' words and tensors come out as plain text."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_secrets import answering, say

from ditkit.cli import show, terminal

EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\u202ee\u2066f\r\nerror: made up\x7f"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SHORT = ("--stop-at-step", 1, "--no-sheet")


def plain(said) -> None:
    for text in (said.out, said.err):
        assert not STEERS.findall(text), repr(text)
        assert "\nerror: made up" not in text


def changed(file: Path, **values) -> None:
    about = json.loads(file.read_text())
    for key, value in values.items():
        table, _, inner = key.partition("__")
        if inner:
            about[table][inner] = value
        else:
            about[table] = value
    file.write_text(json.dumps(about))


@pytest.mark.slow
def test_runs_and_forks(call, model, tmp_path):
    said = call("run", EVIL, "--model", model, "--run", "a", *SHORT)
    assert said.code == 0, said.err
    plain(said)
    plain(call("fork", "a", "--run", "b", "--prompt", EVIL * 2, "--set", "seed=3"))
    (tmp_path / "runs/a").rename(tmp_path / "runs" / EVIL.replace("/", "").replace("\r\n", "\n"))
    changed(tmp_path / "runs/b/run.json", created=EVIL, model={"name": EVIL}, parent__changed={EVIL: [EVIL, EVIL]})
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text(json.dumps({"run": EVIL}))
    listed = call("runs")
    assert (listed.code, listed.out.count("\n")) == (0, 5)
    plain(listed)
    as_json = call("runs", "--json")
    plain(as_json)
    assert EVIL in [each["request"]["prompt"] for each in json.loads(as_json.out) if "request" in each]
    plain(call("run", "--resume", "b"))


def test_mistakes(call, model):
    for words in (["generate", EVIL, "--set", f"{EVIL}=1"], ["generate", "--model", EVIL, "x"], [EVIL], ["runs", EVIL],
                  ["run", "--resume", EVIL], ["generate", "x", f"--{EVIL}"], ["plan", EVIL, "--model", model],
                  ["config", "explain", "prompt", "--model", model, "--set", f"prompt={EVIL}"], ["inspect", EVIL],
                  ["generate", "x", "--model", model, "--out", f"{EVIL}.mp5", "--debug"]):  # fmt: skip
        plain(call(*words))


def test_inspect_and_stages(call, tmp_path):
    save_file({f"{EVIL}.weight": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "a.safetensors", {EVIL: EVIL})
    plain(call("inspect", "a.safetensors"))
    plain(call("inspect", "a.safetensors", "--json"))
    folder = tiny.write(tmp_path / "m")
    for text in (f"[{json.dumps(EVIL)}]\n", f"[components]\n{json.dumps(EVIL)} = {json.dumps(EVIL)}\n", f"{EVIL} = ="):
        (folder / "ditkit.toml").write_text(text)
        plain(call("inspect", "m"))
        plain(call("lock", "m"))
        plain(call("plan", "x", "--model", "m"))


def test_replay(call, model):
    assert call("generate", "x", "--model", model, "--out", "a.npz", "--no-sheet", "--steps", 1).code == 0

    def other(**versions):
        card = json.loads(Path("a.json").read_text())
        card["manifest"]["machine"] |= {"versions": {"torch": EVIL}, "processor": EVIL, "gpu": EVIL, "threads": 1}
        Path("a.json").write_text(json.dumps(card))

    other()
    said = call("replay", "a.json")
    assert "note: torch is " in said.err
    plain(said)


def test_doctor_and_a_host_with_odd_words(call, model):
    def respond(handler):
        handler.send_response_only(500, "Odd \x1b[2Jreason")
        handler.send_header("Content-Type", "text/\x1b]0;x\x07")
        handler.send_header("content-length", "0")
        handler.end_headers()

    told = {"ditkit": EVIL, "torch": EVIL}
    words = json.dumps({"wire": 2, "schema": 1, "versions": told, "stages": {EVIL: {}}, "machine": {"threads": EVIL}})
    for answer in (
        respond,
        lambda handler: say(handler, 200, words.encode()),
        lambda handler: say(handler, 200, b"\x1b"),
    ):
        with answering(answer) as (url, _):
            for command in (["doctor"], ["plan", "x", "--model", model]):
                plain(call(*command, "--placement", f"denoise={url}", "--retries", 0))


def test_whatever_a_console_prints(monkeypatch):
    from rich.text import Text

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    out = show.console()
    out.print(EVIL)
    out.print(Text(EVIL.replace("\r\n", ""), "bold"))
    out.print(show.table((EVIL, "b"), [(EVIL, EVIL)]))
    assert not STEERS.findall(stream.getvalue())
    assert stream.getvalue().count("\n") == 4


def test_colours_and_bars_stay(monkeypatch):
    from rich.text import Text

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    show.console().print(Text("a\x1b[2Jb", "bold"))
    assert stream.getvalue() == "\x1b[1ma\ufffd[2Jb\x1b[0m\n"


def test_the_log_of_a_host(capsys):
    with terminal.plain_log():
        print(f"Traceback: {EVIL}", file=sys.stderr)
        sys.stderr.writelines(["two\n", EVIL])
        assert sys.stderr.isatty() is False
    said = capsys.readouterr().err
    assert said.startswith("Traceback: a\ufffd]0;owned\ufffdb")
    assert not STEERS.findall(said)
    assert not isinstance(sys.stderr, terminal._PlainLog)
