"""Pipeline: a model that is ready to make clips. ``ditkit.load(...)`` gives one; calling it gives a Result.

A Pipeline holds no state of any run; threads may share it. Leaves out: finding and filling components (``build``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit import media, pictures, samples
from ditkit.assembly import Components, Model, calls_of, pipeline_of, placed
from ditkit.assembly.resume_checks import Stamping, check_begun, model_field, stamped
from ditkit.assembly.seams import check_scheduler, plugged, stages_of, told
from ditkit.checking import check_state
from ditkit.contracts import Seams, Step
from ditkit.errors import DitkitError, RequestError, SetupError
from ditkit.events import Events, Listener
from ditkit.execution.place import Checkpointer, ResultCache
from ditkit.execution.records import replugged
from ditkit.execution.stage import with_own_defaults, with_stage_settings
from ditkit.execution.stage_list import Interrupted, StageList
from ditkit.placement import Places
from ditkit.placement import plugs as travelling
from ditkit.placement.remote_parts import address, check_agree, check_here, facts_of, model_at, scope_at, scope_of
from ditkit.prompting import templates
from ditkit.receipt import Recorder, manifest
from ditkit.request import Request
from ditkit.setup import Setup
from ditkit.shared import Switch
from ditkit.shared import switch as exchange
from ditkit.stages.expand_prompt import ExpandPrompt, check_asked
from ditkit.state import State, digest
from ditkit.store.cache import open_cache

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
    """``pipe(prompt, seed=7, ...)``: all fields of Request as keywords. ``pipeline`` and ``components`` are open:
    change the first with insert, replace and remove; the second is any mapping of parts that fit the contracts."""

    def __init__(
        self,
        model: Model,
        setup: Setup,
        components: Mapping[str, Any],
        stages: StageList,
        seams: Seams | None = None,
        listeners: Iterable[Listener] = (),
        results: ResultCache | None = None,
        places: Places | None = None,
    ):
        self.model, self.setup, self.components, self.stages = model, setup, components, stages
        self.seams, self.listeners, self.results = seams or Seams(), tuple(listeners), results
        self.places = places or Places(setup)

    def __call__(self, prompt: str | list[str] = "", *, listeners: Iterable[Listener] = (), **request: Any) -> Result:
        """Pictures (``image``, ``last_image``, ...) may be paths, PIL images, arrays or tensors."""
        values, pixels = pictures.take({"prompt": prompt, **request})
        return self.run(self.begin(self.request(values), pixels), listeners=listeners)

    def request(self, values: Mapping[str, Any]) -> Request:
        """A Request with the model's defaults; settings of a stage may stand under its name. Raises RequestError."""
        return self.model.request(with_stage_settings(self.stages.stages, values))

    @staticmethod
    def check(request: Request) -> list[tuple[str, str, int]]:
        """Prompt, negative prompt and seed of every clip. Raises RequestError for a prompt that says nothing."""
        samples = request.samples()
        if not all(prompt.strip() for prompt, _, _ in samples):
            raise RequestError(
                "a run with an empty prompt", "there is nothing to make", "Say what the clip should show"
            )
        return samples

    def begin(self, request: Request, pixels: Mapping[str, Any] | None = None) -> State:
        """The State that a run starts from. Its request has everything filled in, the size that follows from an image
        too. ``pixels``: pictures that the request names by their hash (``pictures.take``); files are read here."""
        self.model.check(request)
        check_scheduler(self.seams, request)
        request = with_own_defaults(self.stages.stages, request)
        request = templates.placed(pictures.placed(request))
        found = pictures.read(request, pixels or {})
        request = self.model.fit(request, found)
        prompts, negatives, seeds = zip(*self.check(request), strict=True)
        fields = {"prompt": list(prompts), "negative_prompt": list(negatives), "seed": list(seeds)}
        model = model_field(self.setup.model, self.model)
        seen = pictures.tensors(found, len(prompts), request)
        return State({**fields, **seen, "request": request.model_dump(), "model": model})

    def steps(self, request: Request) -> list[Step]:
        """The step table of a run, before it runs; no weights are loaded."""
        from ditkit.models.wan import TIMESTEP_SCALE
        from ditkit.schedulers import make
        from ditkit.schedulers.table import request_steps

        scheduler = self.seams.scheduler or make(request.scheduler, **request.scheduler_options)
        return request_steps(scheduler, request, TIMESTEP_SCALE, len(self.model.experts))

    def look(self) -> Callable[[Tensor], np.ndarray] | None:
        """What turns clean normalised latents [1, C, 1, h, w] into a picture uint8 [y, x, 3]: the tiny decoder, where
        the model has one (``components={"preview_decoder": ...}``), else a matrix of colours; None if neither is
        known."""
        from ditkit.models.latent_rgb import preview_frames, rgb_frames

        rgb, parts = self.model.latents_rgb, self.components
        if "preview_decoder" in parts:
            return lambda latents: next(preview_frames(parts["preview_decoder"], latents))[0, -1]
        return None if rgb is None else lambda latents: rgb_frames(latents, rgb)[0, 0]

    def run(
        self,
        state: State,
        *,
        start: str | None = None,
        until: str | None = None,
        stop_at_step: int | None = None,
        listeners: Iterable[Listener] = (),
        keep: Checkpointer | None = None,
        begun: Mapping[int, State] | None = None,
        recorder: Recorder | None = None,
    ) -> Result:
        """Run ``state`` through the pipeline or a slice of it. ``keep`` is given the State as it grows. ``begun``: of
        clips that are made one after the other, the States of those that an earlier run began or finished, by number.
        ``recorder``: that of the part of this run that came before; the receipt tells of both.
        Raises Interrupted, with the State so far, on Ctrl-C."""
        asked = check_state(state, self.stages.table)
        asked.check_size(self.model.strides[1] * self.model.patch[1], self.model.strides[0])
        asked = with_own_defaults(self.stages.stages, asked)
        if {*state["request"]} != {*Request.model_fields} or state["request"]["stage_settings"] != asked.stage_settings:
            # an older State knows fewer settings, and so does one of a pipeline with fewer stages
            state = state.with_fields({"request": asked.model_dump()})
        planned = self.stages.planned(state, start, until)
        check_begun(state, self.setup.model, self.model, self.stages, planned)
        check_asked(self.stages, state, start, until)
        recorder = recorder or Recorder()
        events = Events(*self.listeners, *listeners, recorder)
        if isinstance(self.components, Components):
            components: Mapping[str, Any] = self.components.listening(events)
        else:
            components = self.components
        request = state["request"]
        where = self.places.of_run(self.stages, components, self.seams, lambda: self.steps(asked))
        common: dict[str, Any] = {"places": where, "results": self.results, "events": events, "seams": self.seams}
        options = {**common, "stop_at_step": stop_at_step, "debug": self.setup.debug}
        options["keep"] = keep and Stamping(keep, state, self.model, self.stages)
        check_agree(self.model, self.places, planned, where)
        travelling.check(planned, where, self.seams, request)
        for stage in planned:
            if others := replugged(stage, state, self.seams.describe()):
                events.emit("plugs.changed", stage=stage.name, text=others)
        together = request["batched"] or samples.count(state) == 1
        if stop_at_step is None:
            fresh = [state] if together or len(begun or {}) < samples.count(state) else []
            for each in (*fresh, *(begun or {}).values()):
                self.stages.prepare(each, components, start=start, until=until, **common)

        try:
            if together:
                final = self.stages.run(state, components, start=start, until=until, **options)
            else:
                final = self._one_after_the_other(state, components, start, until, options, begun or {})
        except Interrupted as e:
            e.state, e.finished = self._stamped(state, e.state), [self._stamped(state, one) for one in e.finished]
            raise
        final = self._stamped(state, final)
        facts = self.components.describe() if isinstance(self.components, Components) else {}
        weights = final.get("weights", {})
        receipt = {
            **recorder.receipt({**facts_of(self.places, recorder.places, weights), **facts}),
            "weights": weights,
            "hosts": {
                name: {key: told for key, told in said.items() if key not in ("model", "parts", "stages")}
                for name, said in self.places.describe().items()
            },  # what their parts are stands under components and weights
            "seams": self.seams.describe(),
            "plugs": told(self.setup.plugs),
            "pipeline": self.stages.names,
        }
        return Result(final, receipt, tuple(self._manifests(final, receipt)) if "video" in final else ())

    def _stamped(self, before: State, after: State) -> State:
        return stamped(before, after, self.model, self.stages)

    def _one_after_the_other(
        self,
        state: State,
        components: Mapping[str, Any],
        start: str | None,
        until: str | None,
        options: dict[str, Any],
        begun: Mapping[int, State],
    ) -> State:
        """Prompts are expanded and encoded first, together, so that equal ones are encoded once; then each clip."""
        finished: list[State] = []
        names = self.stages.names
        shared = names[: 2 if names[0] == ExpandPrompt.name else 1]
        if start in (None, *shared):
            last = until if until in shared else shared[-1]
            state = self.stages.run(state, components, start=start, until=last, **options)
            if until in shared:
                return state
            start = None if start is None else names[len(shared)]
        keep: Checkpointer | None = options["keep"]
        parts = samples.split(state, self.stages.table)
        try:
            for i, part in enumerate(parts):
                options["events"].emit("clip", index=i, count=samples.count(state))
                own = {**options, "keep": keep and keep.of_clip(i)}
                finished.append(self.stages.run(begun.get(i, part), components, start=start, until=until, **own))
            return samples.join(finished, self.stages.table)
        except Interrupted as e:
            e.finished, e.clip = finished, len(finished)
            raise
        except KeyboardInterrupt:  # between two of them
            at = min(len(finished), len(parts) - 1)
            stopped = Interrupted(names[len(shared) :][0], [*finished, begun.get(at, parts[at])][at])
            stopped.finished, stopped.clip = finished[:at], at
            raise stopped from None

    def _manifests(self, state: State, receipt: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        columns = zip(state["prompt"], state["negative_prompt"], state["seed"], state["video"].numpy(), strict=True)
        together = state["request"]["batched"] and samples.count(state) > 1
        pictured = [name for name in pictures.FIELDS if name in state]
        for i, (prompt, negative, seed, video) in enumerate(columns):
            # A batch rounds otherwise than a clip alone: to be made again bit for bit, all of it has to be.
            sample = {} if together else {"prompt": prompt, "negative_prompt": negative, "seed": seed, "batched": False}
            seen = {n: digest(state[n] if together else state[n][i : i + 1]) for n in pictured}
            expanded = {n: state[n] if together else state[n][i : i + 1] for n in ExpandPrompt.writes if n in state}
            yield manifest(
                self.setup.model,
                self.setup.model_dump(),
                state["request"],
                sample,
                state.get("sigmas", []),
                receipt,
                media.frames_sha256(video),
                i if together else 0,
                seen,
                expanded,
            )


def load(
    model: str | os.PathLike[str] = "shapes",
    *,
    seams: Seams | None = None,
    listeners: Iterable[Listener] = (),
    share_with: Pipeline | None = None,
    **setup: Any,
) -> Pipeline:
    """A model by name, folder, file, manifest or repository, ready to run: ``ditkit.load("shapes", dtype="float32")``.

    Keywords are the fields of Setup. Weights are loaded when they are first needed. Parts that are the same as those of
    the pipe ``share_with`` (files, sizes, dtype, device, swaps) are the same objects. Raises LoadError, SetupError."""
    chosen = placed(Setup.of({**setup, "model": os.fspath(model)}))
    if chosen.threads is not None:
        import torch

        torch.set_num_threads(chosen.threads)
    chosen, opened, places = open_model(chosen)
    seams, heard = plugged(chosen, seams or Seams())
    pipeline = pipeline_of(opened, chosen)
    chosen = chosen.model_copy(update={"devices": places.devices(pipeline)})
    check_here(opened, places, pipeline)
    theirs = share_with.components if share_with else None
    shared = theirs.holder.shared if isinstance(theirs, Components) else None
    components = Components(opened, chosen, seams.swaps, shared)
    return Pipeline(opened, chosen, components, pipeline, seams, (*heard, *listeners), open_cache(chosen), places)


def open_model(setup: Setup) -> tuple[Setup, Model, Places]:
    """The model that ``setup`` names, and its places; hosts are asked for the parts that are not here.

    ``setup`` as it was given, but where the model is a host's: then every stage is placed there for which nothing else
    is said. Raises LoadError, SetupError, and PlaceError or Lost where a host is asked."""
    own_stages = {plug.row.name for plug in stages_of(setup)}  # from now on all rows are known
    host = address(setup.model)
    if host is None:
        places = Places(setup)
        return setup, Model.open(setup.model, setup, scope=scope_of(places, setup.components)), places
    first = Places(setup)
    opened = Model.at(setup.model, model_at(first, host), setup, scope_at(first, host, setup.components))
    own = [name for name in setup.components if name in opened.parts]
    stages = pipeline_of(opened, setup).stages
    here = {ExpandPrompt.name, *(name for name in own_stages if not calls_of(name))}
    there = {s.name: host.text for s in stages if s.name not in here and not {*s.components} & {*own}}
    setup = setup.model_copy(update={"placement": {**there, **setup.placement}})
    return setup, opened, Places(setup)


def switch(old: Pipeline, new: Pipeline) -> Switch:
    """Let go of the parts that only ``old`` needs and load what ``new`` lacks; what it did, in bytes. ``new`` was made
    with ``share_with=old``. ``old`` can be used again: it loads what it lost. Raises SetupError."""
    one, other = old.components, new.components
    if not (isinstance(one, Components) and isinstance(other, Components) and one.holder.shared is other.holder.shared):
        raise SetupError("switching models", "the two share nothing", "Load the second with share_with=the first")
    return exchange(one.holder, other.holder)
