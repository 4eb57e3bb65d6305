"""Pipeline: a model that is ready to make clips. ``ditkit.load(...)`` gives one; calling it gives a Result.
It holds no state of any run; threads may share it. Leaves out: going through the stages (``execution``), finding and
filling components (``assembly``)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit import media, pictures, shared
from ditkit.assembly import Components, Model, calls_of, pipeline_of, placed
from ditkit.assembly.model import check_begun, model_field
from ditkit.assembly.plugs import check_scheduler, plug_facts, plugged, stages_of
from ditkit.cancel import Cancel
from ditkit.checking import check_state
from ditkit.contracts import Seams, Step
from ditkit.errors import DitkitError, RequestError, SetupError
from ditkit.events import Events, Listener
from ditkit.execution.clips import Clips
from ditkit.execution.execution import Execution
from ditkit.execution.place import Checkpointer
from ditkit.execution.stage import with_own_defaults, with_stage_settings
from ditkit.execution.stage_list import StageList
from ditkit.placement import Places
from ditkit.placement.remote_parts import address, check_agree, check_here, facts_of, model_at, scope_of
from ditkit.prompting import templates
from ditkit.receipt import Recorder, manifests
from ditkit.request import Request, check_text
from ditkit.schedulers import make
from ditkit.schedulers.table import request_steps
from ditkit.setup import Setup
from ditkit.stages.expand_prompt import ExpandPrompt, check_asked
from ditkit.state import State
from ditkit.store.cache import Cache, open_cache

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Result:
    """What a run gave. ``receipt`` tells what really ran; ``manifests`` has one entry for each clip."""

    state: State
    receipt: Mapping[str, Any]
    manifests: tuple[Mapping[str, Any], ...]

    @functools.cached_property
    def videos(self) -> np.ndarray:
        """uint8 [clips, frames, height, width, 3], RGB; a copy, to draw on as you like."""
        return self._frames().copy()

    def _frames(self) -> np.ndarray:
        if "video" not in self.state:
            raise DitkitError("the video of a run", "it stopped before decode_latents", "Go on from its State")
        return self.state["video"].numpy()

    @property
    def video(self) -> np.ndarray:
        """uint8 [frames, height, width, 3] of a run that made one clip."""
        if len(self.videos) != 1:
            raise DitkitError("the video of a run", f"it made {len(self.videos)}", "Use .videos")
        return self.videos[0]

    def save(self, path: str | os.PathLike[str], crf: int = 16) -> list[Path]:
        """Write mp4, gif, png frames or npz by suffix, with the manifest inside and beside it.

        Several clips become NAME-0, NAME-1, ... Raises OutputError."""
        path, frames = Path(path), self._frames()
        targets = [path] if len(frames) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(frames))]
        fps = self.state["request"]["fps"]
        return [media.write_video(t, v, fps, m, crf) for t, v, m in zip(targets, frames, self.manifests, strict=True)]


class Pipeline:
    """``pipe(prompt, seed=7, ...)``: all fields of Request as keywords. ``stages`` and ``components`` are open:
    change the first with insert, replace and remove; the second is any mapping of parts that fit the contracts."""

    def __init__(
        self, model: Model, setup: Setup, components: Mapping[str, Any], stages: StageList, seams: Seams | None = None,
        listeners: Iterable[Listener] = (), results: Cache | None = None, places: Places | None = None,
    ):  # fmt: skip
        self.model, self.setup, self.components, self.stages = model, setup, components, stages
        self.seams, self.listeners, self.results = seams or Seams(), tuple(listeners), results
        self.places = places or Places(setup)

    def __call__(
        self, prompt: str | list[str] = "", *, listeners: Iterable[Listener] = (), cancel: Cancel | None = None,
        **request: Any,
    ) -> Result:  # fmt: skip
        """Pictures (``image``, ``last_image``, ...) may be paths, PIL images, arrays or tensors. Raises Interrupted."""
        values, pixels = pictures.take({"prompt": prompt, **request})
        return self.run(self.begin(self.request(values), pixels), listeners=listeners, cancel=cancel)

    def request(self, values: Mapping[str, Any]) -> Request:
        """A Request with the model's defaults; settings of a stage may stand under its name. Raises RequestError."""
        return self.model.request(with_stage_settings(self.stages.stages, values))

    @staticmethod
    def check(request: Request) -> list[tuple[str, str, int]]:
        """Prompt, negative prompt and seed of every clip. Raises RequestError for a prompt that says nothing."""
        samples = request.samples()
        if not all(prompt.strip() for prompt, _, _ in samples):
            found = "there is nothing to make"
            raise RequestError("a run with an empty prompt", found, "Say what the clip should show")
        return samples

    def begin(self, request: Request, pixels: Mapping[str, Any] | None = None) -> State:
        """The State that a run starts from. Its request has everything filled in, the size that follows from an image
        too. ``pixels``: pictures that the request names by their hash (``pictures.take``); files are read here."""
        self.model.check(request)
        check_scheduler(self.seams, request)
        request = with_own_defaults(self.stages.stages, request)
        request = templates.placed(pictures.placed(request))
        remarks: dict[str, str] = {}
        found = pictures.read(request, pixels or {}, remarks)
        request = self.model.fit(request, found)
        prompts, negatives, seeds = zip(*self.check(request), strict=True)
        fields: dict[str, Any] = {"prompt": list(prompts), "negative_prompt": list(negatives), "seed": list(seeds)}
        fields |= {"remarks": remarks} if remarks else {}
        model = model_field(self.setup.model, self.model)
        seen = pictures.tensors(found, len(prompts), request)
        return State({**fields, **seen, "request": request.model_dump(), "model": model})

    def steps(self, request: Request) -> list[Step]:
        """The step table of a run, before it runs; no weights are loaded."""
        scheduler = self.seams.scheduler or make(request.scheduler, **request.scheduler_options)
        return request_steps(scheduler, request, self.model.network.timestep_scale, len(self.model.experts))

    def look(self) -> Callable[[Tensor], np.ndarray] | None:
        """What turns clean normalised latents [1, C, 1, h, w] into a picture uint8 [y, x, 3]: the tiny decoder, where
        there is one (``components={"preview_decoder": ...}``), else a matrix of colours; None if neither is known."""
        from ditkit.models.latent_rgb import preview_frames, rgb_frames

        rgb, parts = self.model.latents_rgb, self.components
        if "preview_decoder" in parts:
            return lambda latents: next(preview_frames(parts["preview_decoder"], latents))[0, -1]
        return None if rgb is None else lambda latents: rgb_frames(latents, rgb)[0, 0]

    def run(
        self, state: State, *, start: str | None = None, until: str | None = None, stop_at_step: int | None = None,
        listeners: Iterable[Listener] = (), keep: Checkpointer | None = None,
        begun: Mapping[int, State] | None = None, recorder: Recorder | None = None, cancel: Cancel | None = None,
    ) -> Result:  # fmt: skip
        """Run ``state`` through the pipeline or a slice of it. ``keep`` is given the State as it grows. ``begun``: of
        clips that are made one after the other, the States of those that an earlier run began or finished, by number.
        ``recorder``: that of the part of this run that came before; the receipt tells of both.
        Raises Interrupted, with the State so far, on Ctrl-C and Cancel; whatever else ends it is raised as it is and
        carries an Interrupted with the State so far as its attribute ``so_far``."""
        asked = check_state(state, self.stages.table)
        self.model.check_size(asked)
        asked = with_own_defaults(self.stages.stages, asked)
        if {*state["request"]} != {*Request.model_fields} or state["request"]["stage_settings"] != asked.stage_settings:
            # an older State knows fewer settings, and so does one of a pipeline with fewer stages
            state = state.with_fields({"request": asked.model_dump()})
        planned = self.stages.planned(state, start, until)
        check_begun(state, self.setup.model, self.model, self.stages, planned)
        check_asked(self.stages, state, start, until)
        recorder = recorder or Recorder()
        events, parts = Events(*self.listeners, *listeners, recorder), self.components
        for name, text in state.get("remarks", {}).items():
            events.emit("picture.note", field=name, text=text)
        components = parts.listening(events) if isinstance(parts, Components) else parts
        places = self.places.of_run(self.stages, components, self.seams, lambda: self.steps(asked))
        check_agree(self.model, self.places, planned, places, self.seams, state["request"])
        if self.results is not None and (fault := self.results.told):
            events.emit("cache.fault", text=fault)
        run = Execution(
            self.stages.stages, state, components, self.stages.slice(start, until), start is not None, stop_at_step,
            events=events, seams=self.seams, debug=self.setup.debug, places=places, keep=keep, results=self.results,
            cancel=cancel or Cancel(), identities=self.model.identities,
        )  # fmt: skip
        clips = Clips(run, begun or {})
        if stop_at_step is None:
            clips.prepare()
        with clips:
            for part in clips:
                part.run()
        return self._result(clips.state, recorder)

    def _result(self, final: State, recorder: Recorder) -> Result:
        weights = final.get("weights", {})
        facts = facts_of(self.places, recorder.places, weights)
        facts |= self.components.describe() if isinstance(self.components, Components) else {}
        receipt = recorder.receipt(facts, weights, self.places.describe(), self.seams.describe(), self.stages.names)
        receipt["plugged"] = plug_facts(self.setup.plugs)
        return Result(final, receipt, tuple(manifests(self.setup, final, receipt)) if "video" in final else ())


def load(
    model: str | os.PathLike[str] = "shapes", *, seams: Seams | None = None, listeners: Iterable[Listener] = (),
    share_with: Pipeline | None = None, **setup: Any,
) -> Pipeline:  # fmt: skip
    """A model by name, folder, file, manifest or repository, ready to run: ``ditkit.load("shapes", dtype="float32")``.

    Keywords are the fields of Setup. Weights are loaded when they are first needed. Parts that are the same as those of
    the pipe ``share_with`` (files, sizes, dtype, device, swaps) are the same objects. Raises LoadError, SetupError."""
    return assembled(open_model(Setup.of({**setup, "model": os.fspath(model)})), seams, listeners, share_with)


@dataclass(frozen=True)
class Opened:
    """A model that was found and understood, the settings to run it with, and its places. No weights are read."""

    setup: Setup
    model: Model
    places: Places


def open_model(setup: Setup) -> Opened:
    """The model that ``setup`` names, and its places; hosts are asked for the parts that are not here.

    ``setup`` with whole paths; and where the model is a host's, every stage is placed there for which nothing else
    is said. Raises LoadError, SetupError, and PlaceError or Lost where a host is asked."""
    setup = placed(setup)
    check_text(setup.model_dump(), "with whole paths", SetupError)
    plugged_in = [plug.row.name for plug in stages_of(setup)]  # from now on all rows are known
    places, host = Places(setup), address(setup.model)
    if host is None:
        return Opened(setup, Model.open(setup.model, setup, scope=scope_of(places, setup.components)), places)
    model = Model.at(setup.model, model_at(places, host), setup, scope_of(places, setup.components, host))
    own = [name for name in setup.components if name in model.parts]
    stages = pipeline_of(model, setup).stages
    here = {ExpandPrompt.name, *(name for name in plugged_in if not calls_of(name))}
    there = {s.name: host.text for s in stages if s.name not in here and not {*s.components} & {*own}}
    setup = setup.model_copy(update={"placement": {**there, **setup.placement}})
    return Opened(setup, model, places.also(setup))


def assembled(
    opened: Opened, seams: Seams | None = None, listeners: Iterable[Listener] = (), share_with: Pipeline | None = None
) -> Pipeline:
    """The Pipeline of a model that was opened; for the rest see ``load``. Raises SetupError."""
    setup, model, places = opened.setup, opened.model, opened.places
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    (seams, heard), stages = plugged(setup, seams or Seams()), pipeline_of(model, setup)
    setup = setup.model_copy(update={"devices": places.devices(stages)})
    check_here(model, places, stages)
    theirs = share_with.components if share_with else None
    alive = theirs.holder.shared if isinstance(theirs, Components) else None
    components = Components(model, setup, seams.swaps, alive)
    return Pipeline(model, setup, components, stages, seams, (*heard, *listeners), open_cache(setup), places)


def switch(old: Pipeline, new: Pipeline) -> shared.Switch:
    """Let go of the parts that only ``old`` needs and load what ``new`` lacks; what it did, in bytes. ``new`` was made
    with ``share_with=old``. ``old`` can be used again: it loads what it lost. Raises SetupError."""
    one, other = old.components, new.components
    if not (isinstance(one, Components) and isinstance(other, Components) and one.holder.shared is other.holder.shared):
        raise SetupError("switching models", "the two share nothing", "Load the second with share_with=the first")
    return shared.switch(one.holder, other.holder)
