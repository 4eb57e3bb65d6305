"""From typed settings to an open model: all layers settled, the model opened once; its Pipeline, State or Run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit import config
from ditkit.checking import check_state
from ditkit.cli import show
from ditkit.cli.flags import RawSettings, kebab, to_path
from ditkit.config import Layer, Settled
from ditkit.errors import LoadError, RequestError, SetupError, StateError
from ditkit.filenames import fault_of_path, shortened
from ditkit.prompting import templates
from ditkit.request import Request, drawn
from ditkit.trust import check_allowed, check_places

if TYPE_CHECKING:
    from ditkit.pipeline import Opened, Pipeline
    from ditkit.runs import Run
    from ditkit.state import State

DRAWN = ", drawn"
"""Ends the origin of a seed that chance gave."""


def model_name(text: str) -> str:
    """A model's folder by its whole path, so that States and clips find it from every folder; any other name as is.
    Raises LoadError for what can be no path."""
    from ditkit.assembly import MODELS

    if fault := fault_of_path(text):
        raise LoadError(f"model {shortened(text)!r}", fault, "Check the path")
    folder = to_path(text)
    return str(folder.resolve()) if text and text not in MODELS and os.path.exists(folder) else text


def packaged(path: Path) -> Path:
    """The folder of a packaged model, when ``path`` is its name and there is nothing else of that name; for commands
    that only look at files. Raises LoadError for a repository, which none of them downloads."""
    from ditkit.checkpoints.model.find import MODELS
    from ditkit.checkpoints.model.hub import HubName

    if os.path.exists(path):
        return path
    if (name := HubName.parse(str(path))) is not None:
        do = f"Download it first (hf download {name.repo}) and give its folder, or load it with --model {path}"
        raise LoadError(f"looking into {path}", "this command looks at files on this machine only", do)
    return MODELS.get(str(path), path)


def settle(given: RawSettings, below: Layer | None = None) -> tuple[Settled, Opened]:
    """All layers; the model that they name is opened (its weights are not read), for its defaults are one of them.

    ``below`` is a layer between the model's defaults and the config file. Raises UserError for whatever is wrong."""
    from ditkit.assembly import pipeline_of
    from ditkit.assembly.plugs import check_trusted
    from ditkit.checkpoints.model.manifest import check_fetches
    from ditkit.execution.stage import with_own_defaults
    from ditkit.pipeline import open_model

    upper = [drawn_in(_located(layer)) for layer in (*([] if below is None else [below]), *given.layers())]
    asked = config.settle(*upper)
    setup = asked.setup()
    if below is None and given.allowed:
        found = "no file is opened that says where anything goes"
        raise SetupError(f"--allow-from-file {given.allowed[0]}", found, "Leave it out")
    if below is not None:
        if asked.values.get("plugs") is below.values.get("plugs"):
            check_trusted(setup.plugs, below.origins.get("plugs", ""))
        origin = next(iter(below.origins.values()), "the file")
        own = config.settle(*upper[1:]).values
        allowed, doing = check_allowed(given.allowed), f"going on with {origin}"
        check_places(asked.values, own, allowed, doing)
        check_fetches(setup.model, own, allowed, doing)
    opened = open_model(setup)
    model = opened.model
    asked.request()  # what follows from the values is worked out with sound ones
    family = Layer.of(model.family_defaults_for(asked.values), f"model family (official, {model.task})")
    settled = config.settle(family, drawn_in(Layer.of(model.own_defaults, f"model {opened.setup.model}")), *upper)
    request = settled.request()  # a fault in a value is told with where the value comes from
    if request.stage_settings:
        with_own_defaults(pipeline_of(model, opened.setup).stages, request)
    check_contradiction(settled, upper)
    return settled, opened


def _located(layer: Layer) -> Layer:
    model = layer.values.get("model")
    return replace(layer, values={**layer.values, "model": model_name(model)}) if isinstance(model, str) else layer


def drawn_in(layer: Layer) -> Layer:
    """``layer`` with a number for a seed that it leaves to chance, so that all that is made of it has the same."""
    values = drawn(layer.values)
    if values.get("seed") is layer.values.get("seed"):
        return layer
    return Layer(values, {**layer.origins, "seed": layer.origins["seed"] + DRAWN})


def say_what_was_drawn(settled: Settled) -> None:
    if settled.origins.get("seed", "").endswith(DRAWN):
        show.say(f"seed {settled.values['seed']} was drawn")


def check_contradiction(settled: Settled, layers: Sequence[Layer]) -> None:
    """A list of noise levels takes the place of steps and shift, so neither may stand beside or above it."""
    if settled.values.get("sigmas") is None:
        return
    above = max((i for i, layer in enumerate(layers) if "sigmas" in layer.values), default=0)
    for key in ("steps", "shift"):
        if any(key in layer.values for layer in layers[above:]):
            both = f"{settled.origins[key]} with {settled.origins['sigmas']}"
            raise SetupError(both, f"a list of sigmas replaces {key}", f"Leave out {key}, or leave out sigmas")


def load(opened: Opened) -> Pipeline:
    """Its Pipeline. Raises SetupError for a device that is not there, now rather than half-way."""
    from ditkit.pipeline import assembled

    pipe = assembled(opened)
    for component in pipe.model.parts:  # of those that lie at a host the host knows
        pipe.setup.device_of(component)
    return pipe


def open_pipe(given: RawSettings) -> tuple[Pipeline, Request, Settled]:
    """Everything settled and checked; no weights are loaded."""
    settled, opened = settle(given)
    request = opened.model.request(settled.of(Request))
    pipe = load(opened)
    say_what_was_drawn(settled)
    return pipe, request, settled


def open_state(source: Path, given: RawSettings) -> tuple[Pipeline, State, Settled]:
    """The State and its model. What to make stands in the State; how to make it may be set anew."""
    from ditkit.state import State

    _nothing_to_make(given, f"--from {source}", "a State")
    state = State.load(source)
    for name in ("request", "model", "prompt", "seed"):
        if name not in state:
            do = "Save one with `ditkit run --save-state`"
            raise StateError(f"going on from {source}", f"it holds no {name}", do)
    check_state(state, source=str(source))
    below = Layer.of({"model": state["model"]["name"]}, f"State {source}")
    settled, opened = _goes_on(given, below, state["request"], f"--from {source}", "the State")
    return load(opened), state, settled


def open_run(name: str, given: RawSettings) -> tuple[Run, Settled]:
    """A kept run, with its model. What to make stands in its folder; how to make it may be set anew."""
    from ditkit.runs import Run

    _nothing_to_make(given, f"--resume {name}", "a run")
    run = Run.open(name)
    below = Layer.of(run.description.setup, f"run {run.path}")
    settled, opened = _goes_on(given, below, run.description.request, f"--resume {name}", "the run")
    return Run(run.path, run.description, load(opened)), settled


def _nothing_to_make(given: RawSettings, flag: str, what: str) -> None:
    """Raise RequestError when the command line itself says what to make."""
    if typed := [key for key in given.named() if key in Request.model_fields]:
        name = "PROMPT" if typed[0] == "prompt" else f"--{kebab(typed[0])}"
        found = f"{what} goes on with the request that it was begun with"
        raise RequestError(f"{name} with {flag}", found, "Leave it out, or begin a new run")


def _goes_on(
    given: RawSettings, below: Layer, request: Mapping[str, Any], flag: str, what: str
) -> tuple[Settled, Opened]:
    """The settings of compute, over those that lie ``below``. Raises RequestError where a config file or the
    environment asks for something else than ``request``."""
    settled, opened = settle(given, below)
    asked = templates.placed(settled.request())
    for key, value in request.items():
        said = settled.given.get(key, ())
        if (
            said
            and not said[-1][0].endswith(DRAWN)
            and not said[-1][0].startswith("model ")
            and getattr(asked, key) != value
        ):
            asked_for = f"{key}={getattr(asked, key)!r} ({settled.origins[key]}) with {flag}"
            raise RequestError(asked_for, f"{what} was begun with {value!r}", "Take that away, or begin a new run")
    return settled, opened
