"""A prompt's expansion on the terminal: what changed in it, and the question whether to take it.

Shared by ``ditkit expand`` and by runs with ``--expand``. Leaves out: expanding (``stages/expand_prompt.py``).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ditkit.cli import asking
from ditkit.errors import RequestError
from ditkit.events import Event

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ditkit.cli.run_options import RunOptions
    from ditkit.pipeline import Pipeline
    from ditkit.receipt import Recorder
    from ditkit.state import State

STAGE = "expand_prompt"
CHOICES = {"u": "use", "e": "edit", "r": "raw", "a": "again", "q": "quit"}
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|[^\w\s]|_+")


def before_run(pipe: Pipeline, state: State, goal: RunOptions, out: Console) -> tuple[State, RunOptions]:
    """``state`` with its prompts expanded and shown, and taken by the person if they want to be asked; and what is left
    to do. Without expansion, or where it is done already, both as they are. Raises RequestError where nobody is there
    to be asked."""
    from ditkit.receipt import Recorder

    asks = state["request"].get("expand", "no") == "ask"
    if not any(stage.name == STAGE for stage in pipe.stages.planned(state, goal.start, goal.until)):
        return state, goal
    if asks and not (sys.stdin.isatty() and out.file.isatty()):
        raise RequestError("--expand ask", "there is no terminal to ask at", "Use --expand yes, or `ditkit expand`")
    recorder = Recorder()
    state = pipe.run(state, start=goal.start, until=STAGE, listeners=[warn_of_fallback], recorder=recorder).state
    for clip in range(len(state["prompt"])):
        if asks or not goal.quiet:
            show(out, state["prompt"][clip], state["expanded_prompt"][clip], state["expansion"][clip])
        if asks:
            state = taken(pipe, state, clip, out, recorder)
    following = pipe.stages.names[pipe.stages.index(STAGE) + 1]
    start = following if goal.start == STAGE and goal.until != STAGE else None
    return state, replace(goal, start=start, recorder=recorder)


def warn_of_fallback(event: Event) -> None:
    if event.name == "prompt.fallback":
        print(f"note: {event['reason']} The raw prompt is used.", file=sys.stderr)


def taken(pipe: Pipeline, state: State, clip: int, out: Console, recorder: Recorder) -> State:
    """Ask what shall become of one clip's prompt, until that is settled. Raises typer.Exit for quit."""
    attempt = state["request"]["expand_attempt"]
    while True:
        match choice():
            case "use":
                return state
            case "raw":
                return _with(state, clip, state["prompt"][clip], {"chosen": "raw"})
            case "edit":
                text = edited(state["expanded_prompt"][clip])
                if text:
                    return _with(state, clip, text, {"chosen": "edited"})
                typer.echo("An empty prompt cannot be used, nor one without an editor (set EDITOR).", err=True)
            case "again":
                attempt += 1
                state = again(pipe, state, clip, attempt, recorder)
                show(out, state["prompt"][clip], state["expanded_prompt"][clip], state["expansion"][clip])
            case "quit":
                raise typer.Exit(1)


def again(pipe: Pipeline, state: State, clip: int, attempt: int, recorder: Recorder) -> State:
    """Another expansion for one clip: another seed, the same all else."""
    from ditkit import samples

    part = samples.split(state, pipe.stages.table)[clip]
    part = part.with_fields({"request": {**state["request"], "expand_attempt": attempt}})
    new = pipe.run(part, start=STAGE, until=STAGE, listeners=[warn_of_fallback], recorder=recorder).state
    return _with(state, clip, new["expanded_prompt"][0], new["expansion"][0])


def choice() -> str:
    question = ", ".join(f"[{key}]{word[1:]}" for key, word in CHOICES.items())
    while True:
        given = asking.line(question).strip().lower() or "u"
        if given[:1] in CHOICES and CHOICES[given[:1]].startswith(given):
            return CHOICES[given[:1]]


def edited(text: str) -> str:
    """``text`` as the person's editor leaves it; empty where there is none or it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt.txt"
        file.write_text(f"{text}\n", encoding="utf-8")
        try:
            code = subprocess.run([*shlex.split(editor), str(file)], check=False).returncode
        except OSError:
            return ""
        return file.read_text(encoding="utf-8").strip() if code == 0 else ""


def _with(state: State, clip: int, text: str, about: Mapping[str, Any]) -> State:
    texts, told = state["expanded_prompt"], state["expansion"]
    texts[clip] = text
    told[clip] = dict(about) if "expander" in about else {**told[clip], **about}
    return state.with_fields({"expanded_prompt": texts, "expansion": told})


def show(out: Console, prompt: str, expanded: str, about: Mapping[str, Any]) -> None:
    from rich.text import Text

    facts = [about["template"], about.get("told_model") or about.get("model") or about["expander"]]
    facts += [f"{about['tokens']} tokens"] if about.get("tokens") is not None else []
    facts += ["failed: raw prompt"] if "failure" in about else []
    out.print(Text.assemble(("prompt   ", "bold"), printable(prompt)))
    out.print(Text.assemble(("expanded ", "bold"), printable(expanded), (f"  ({', '.join(facts)})", "dim")))
    marks = not out.is_terminal or out.no_color
    out.print(Text.assemble(("changes  ", "bold"), difference(printable(prompt), printable(expanded), marks)))


def difference(old: str, new: str, marks: bool) -> Text:
    """Word by word (a Chinese character is one): what went is red, what came is green; with ``marks`` also
    ``[-so-]`` and ``{+so+}``, for where there are no colours."""
    from rich.text import Text

    before, after = _WORD.findall(old), _WORD.findall(new)
    found = Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        gone, come = "".join(before[a:b]), "".join(after[c:d])
        if kind == "equal":
            found.append(gone)
            continue
        found.append(f"[-{gone}-]" if marks and gone else gone, "red strike")
        found.append(f"{{+{come}+}}" if marks and come else come, "green")
    return found


def printable(text: str) -> str:
    """Without what a terminal would take for an order: the text comes from a language model."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
