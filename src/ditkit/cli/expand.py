"""``ditkit expand PROMPT``: what a language model makes of a prompt. No video model is opened."""

from __future__ import annotations

import json

import typer

from ditkit import config
from ditkit.cli import expansion, show
from ditkit.cli.flags import Prompt, RawSettings, with_settings
from ditkit.cli.run_options import Json, Quiet
from ditkit.errors import RequestError, SetupError

KEYS = (
    "prompt", "image", "last_image", "seed", "expander", "expander_model", "expand_template", "expand_temperature",
    "expand_max_tokens", "expand_attempt", "expand_fallback", "retries", "timeout", "device", "dtype", "debug",
)  # fmt: skip
"""The settings that an expansion reads."""


def add_to(app: typer.Typer) -> None:
    app.command("expand")(with_settings(expand, KEYS))


def expand(given: RawSettings, prompt: Prompt = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Let a language model expand a prompt, and show what changed."""
    from ditkit import pictures
    from ditkit.events import Events
    from ditkit.execution.stage_list import SOURCES, StageList
    from ditkit.prompting import open_expander, templates
    from ditkit.stages.expand_prompt import ExpandPrompt
    from ditkit.state import State

    settled = config.settle(*given.layers())
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
    state = pipeline.run(state, {"prompt_expander": expander}, events=Events(expansion.warn_of_fallback))
    if as_json:
        print(json.dumps({name: state[name] for name in ("prompt", "expanded_prompt", "expansion")}))
        return
    out = show.console()
    for before, after, about in zip(prompts, state["expanded_prompt"], state["expansion"], strict=True):
        if quiet:
            out.print(expansion.printable(after))
        else:
            expansion.show(out, before, after, about)
