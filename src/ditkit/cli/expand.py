"""``ditkit expand PROMPT``: what a language model makes of a prompt; and the question of a run whether to take it."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from ditkit import config
from ditkit.cli import show, terminal
from ditkit.cli.flags import Json, Prompt, Quiet, RawSettings, RunOptions, with_settings
from ditkit.cli.opening import drawn_in, say_what_was_drawn
from ditkit.errors import RequestError, SetupError
from ditkit.events import Event, Events
from ditkit.hiding import printable
from ditkit.writing import Scratch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ditkit.pipeline import Pipeline
    from ditkit.receipt import Recorder
    from ditkit.state import State

KEYS = (  # the settings that an expansion reads
    "prompt", "image", "last_image", "seed", "expander", "expander_model", "expand_template", "expand_temperature",
    "expand_max_tokens", "expand_attempt", "expand_fallback", "retries", "timeout", "device", "dtype", "debug",
)  # fmt: skip
STAGE = "expand_prompt"
CHOICES = {"u": "use", "e": "edit", "r": "raw", "a": "again", "q": "quit"}
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|[^\w\s]|_+")


@partial(with_settings, keys=KEYS)
def expand(given: RawSettings, prompt: Prompt = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Let a language model expand a prompt, and show what changed."""
    from ditkit import pictures
    from ditkit.execution.stage_list import SOURCES, StageList
    from ditkit.prompting import open_expander, templates
    from ditkit.stages.expand_prompt import ExpandPrompt
    from ditkit.state import State

    settled = config.settle(*map(drawn_in, given.layers()))
    say_what_was_drawn(settled)
    setup, request = settled.setup(), pictures.placed(templates.placed(settled.request()))
    if setup.expander is None:
        raise SetupError("expanding a prompt", "no language model is named", "Add --expander URL")
    prompts, _, seeds = zip(*request.samples(), strict=True)
    if not all(text.strip() for text in prompts):
        raise RequestError("expanding an empty prompt", "there is nothing to expand", "Say what the clip should show")
    shown = request.model_copy(update=dict.fromkeys(("control_video", "control_mask")) | {"reference_images": []})
    seen = pictures.tensors(pictures.read(shown, {}), len(prompts), request)
    asked = {**request.model_dump(), "expand": "yes"}
    state = State({"prompt": list(prompts), "seed": list(seeds), "request": asked, **seen})
    pipeline = StageList([ExpandPrompt()], (*SOURCES, *templates.PICTURES))
    expander = open_expander(setup)
    expander.load()
    state = pipeline.run(state, {"prompt_expander": expander}, events=Events(warn_of_fallback))
    if as_json:
        print(json.dumps({name: state[name] for name in ("prompt", "expanded_prompt", "expansion")}))
        return
    out = show.console()
    for clip in range(len(prompts)):
        if quiet:
            out.print(printable(state["expanded_prompt"][clip]))
        else:
            show_clip(out, state, clip)


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
            show_clip(out, state, clip)
        if asks:
            state = taken(pipe, state, clip, out, recorder)
    following = pipe.stages.names[pipe.stages.index(STAGE) + 1]
    start = following if goal.start == STAGE and goal.until != STAGE else None
    return state, replace(goal, start=start, recorder=recorder)


def warn_of_fallback(event: Event) -> None:
    if event.name == "prompt.fallback":
        show.say(f"{event['reason']} The raw prompt is used.")


def taken(pipe: Pipeline, state: State, clip: int, out: Console, recorder: Recorder) -> State:
    """Ask what shall become of one clip's prompt, until that is settled. Raises typer.Exit for quit."""
    from ditkit import samples

    attempt = state["request"]["expand_attempt"]
    while True:
        about = state["expansion"][clip]
        match choice():
            case "use":
                return state
            case "raw":
                return _with(state, clip, state["prompt"][clip], {**about, "chosen": "raw"})
            case "edit":
                if text := edited(state["expanded_prompt"][clip]):
                    return _with(state, clip, text, {**about, "chosen": "edited"})
                typer.echo("An empty prompt cannot be used, nor one without an editor (set EDITOR).", err=True)
            case "again":
                attempt += 1  # which is another seed, and the same all else
                part = samples.split(state, pipe.stages.table)[clip]
                part = part.with_fields({"request": {**state["request"], "expand_attempt": attempt}})
                new = pipe.run(part, start=STAGE, until=STAGE, listeners=[warn_of_fallback], recorder=recorder).state
                state = _with(state, clip, new["expanded_prompt"][0], new["expansion"][0])
                show_clip(out, state, clip)
            case "quit":
                raise typer.Exit(1)


def choice() -> str:
    question = ", ".join(f"[{key}]{word[1:]}" for key, word in CHOICES.items())
    while True:
        given = terminal.line(question).strip().lower() or "u"
        if given[:1] in CHOICES and CHOICES[given[:1]].startswith(given):
            return CHOICES[given[:1]]


def edited(text: str) -> str:
    """``text`` as the person's editor leaves it; empty where there is none or it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        return ""
    with contextlib.closing(Scratch()) as folder:
        file = folder.path / "prompt.txt"
        file.write_text(f"{text}\n", encoding="utf-8")
        try:
            subprocess.run([*shlex.split(editor), str(file)], check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return file.read_text(encoding="utf-8").strip()


def _with(state: State, clip: int, text: str, about: Mapping[str, Any]) -> State:
    texts, told = state["expanded_prompt"], state["expansion"]
    texts[clip], told[clip] = text, about
    return state.with_fields({"expanded_prompt": texts, "expansion": told})


def show_clip(out: Console, state: State, clip: int) -> None:
    from rich.text import Text

    prompt, expanded = printable(state["prompt"][clip]), printable(state["expanded_prompt"][clip])
    about, marks = state["expansion"][clip], not out.is_terminal or out.no_color
    facts = [about["template"], about.get("told_model") or about.get("model") or about["expander"]]
    facts += [f"{about['tokens']} tokens"] if about.get("tokens") is not None else []
    facts += ["failed: raw prompt"] if "failure" in about else []
    out.print(Text.assemble(("prompt   ", "bold"), prompt))
    out.print(Text.assemble(("expanded ", "bold"), expanded, (f"  ({', '.join(facts)})", "dim")))
    out.print(Text.assemble(("changes  ", "bold"), difference(prompt, expanded, marks)))


def difference(old: str, new: str, marks: bool) -> Text:
    """Word by word (a Chinese character is one): what went is red, what came is green; with ``marks`` also
    ``[-so-]`` and ``{+so+}``, for where there are no colours."""
    from rich.text import Text

    before, after, found = _WORD.findall(old), _WORD.findall(new), Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        gone, come = "".join(before[a:b]), "".join(after[c:d])
        if kind == "equal":
            found.append(gone)
            continue
        found.append(f"[-{gone}-]" if marks and gone else gone, "red strike")
        found.append(f"{{+{come}+}}" if marks and come else come, "green")
    return found
