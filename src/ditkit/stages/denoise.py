"""The denoising loop: noise and text in, clean latents out. One screen of plain math.

It can stop after any step and go on from the State, bit for bit: the sample, the step count and the scheduler's history
are all that it remembers. Leaves out: what the transformer is told besides (``told.py``), and making it (``build``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditkit.contracts import Predict, Scheduler, Step, wrap
from ditkit.errors import StateError
from ditkit.execution.stage_list import BaseStage, Context, Stopped
from ditkit.guidance.cfg import classifier_free_guidance
from ditkit.guidance.experts import by_expert
from ditkit.schedulers import make
from ditkit.schedulers.noise import initial_noise, step_noise
from ditkit.schedulers.sigmas import explicit, float32, timesteps
from ditkit.schedulers.table import request_steps
from ditkit.stages.told import CONDITIONING, forward_pass
from ditkit.state import State


@dataclass(frozen=True)
class Denoise(BaseStage):
    """``strides``: pixels to latents, as (frames, height, width); frames as (T - 1) / stride + 1. ``experts``: the
    transformers of the run; with two, the second takes the steps below the request's boundary. ``timestep_scale`` is
    theirs; where it is not known, a part of a run counts as calling both."""

    strides: tuple[int, int, int] = (4, 8, 8)
    attention: str = "sdpa"
    cache_text_kv: bool = field(default=True, compare=False)
    experts: tuple[str, ...] = ("transformer",)
    timestep_scale: float | None = field(default=None, compare=False)

    name = "denoise"
    reads = ("prompt_embeds", "prompt_lengths", "seed", "request")
    optional = ("negative_prompt_embeds", "negative_prompt_lengths", *CONDITIONING, "latents")
    writes = ("latents", "sigmas", "step", "history")
    loop = ("latents", "sigmas", "step", "history")

    @property
    def components(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.experts

    def done(self, state: State) -> bool:
        return "sigmas" in state and "step" in state and state["step"] == len(state["sigmas"]) - 1

    def needs(self, state: Mapping[str, Any], stop_at_step: int | None = None) -> tuple[str, ...]:
        """The experts of the steps that a run from ``state`` still takes (to ``stop_at_step``). A run that takes none
        asks one transformer for its sizes: that of the step where it stands."""
        steps = self.planned(state)
        if not steps:
            return self.experts
        done = min(state.get("step", 0), len(steps) - 1)
        used = {*steps[done : len(steps) if stop_at_step is None else stop_at_step]} or {steps[done]}
        return tuple(name for name in self.experts if name in used)

    def planned(self, state: Mapping[str, Any]) -> list[str]:
        """The expert of each step, by the rule of the step table: its timestep, made of noise levels that are not yet
        rounded. Empty where it cannot be told: noise levels that the request does not give."""
        request = state["request"]
        if len(self.experts) < 2 or request.get("boundary") is None or self.timestep_scale is None:
            return []
        scheduler = make(request["scheduler"], **request["scheduler_options"])
        own = request.get("sigmas")
        sigmas = (
            scheduler.sigmas(request["steps"], request["shift"], request["convention"])
            if own is None
            else explicit(own)
        )
        if state.get("sigmas") not in (None, [float32(sigma) for sigma in sigmas]):
            return []
        told = timesteps(sigmas, request["convention"], scheduler.name, self.timestep_scale)
        return [self.experts[timestep < request["boundary"] * self.timestep_scale] for timestep in told]

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        scheduler = ctx.seams.scheduler or make(ctx.settings.scheduler, **ctx.settings.scheduler_options)
        transformer = ctx.components[self.needs(inputs, ctx.stop_at_step)[0]]
        steps = request_steps(scheduler, ctx.settings, transformer.timestep_scale, len(self.experts))
        sigmas = [*(s.sigma for s in steps), steps[-1].sigma_next]
        if inputs.get("sigmas", sigmas) != sigmas:
            raise StateError("going on from a State", "it was begun with other noise levels than its request now gives",
                             "Keep its steps, shift, convention and scheduler, or begin anew")  # fmt: skip
        x, done, history = self.begin(inputs, ctx, transformer)
        predict = self.predict(inputs, ctx, x)
        noise = self.noise(scheduler, inputs["seed"], x)
        last = len(steps) if ctx.stop_at_step is None else min(ctx.stop_at_step, len(steps))

        reached = x, history, done
        try:
            for step in steps[done:last]:
                with ctx.events.span("step", step=step):
                    velocity = predict(x, step)
                    ctx.events.emit("prediction", step=step, x=x, velocity=velocity)
                    x_next, history_next = scheduler.solve(x, velocity, step, history, noise(step))
                    # One assignment, so that Ctrl-C finds all of them before the step or all of them after it.
                    reached = with_known(x_next, inputs), history_next, step.index + 1
                    x, history, done = reached
                if done < last:
                    ctx.kept(done, partial(as_fields, sigmas, *reached))
        except KeyboardInterrupt:
            raise Stopped(as_fields(sigmas, *reached)) from None
        return as_fields(sigmas, x, history, done)

    def begin(
        self, inputs: Mapping[str, Any], ctx: Context, transformer: Any
    ) -> tuple[Tensor, int, Mapping[str, Tensor]]:
        """Where a State left off; latents that nobody has worked on yet; or fresh noise, for each sample what its seed
        gives alone."""
        s, (t, h, w) = ctx.settings, self.strides
        shape = transformer.latent_channels, (s.frames - 1) // t + 1, s.height // h, s.width // w
        if "control" in inputs:  # reference pictures are frames before the video
            shape = (shape[0], inputs["control"].shape[2], *shape[2:])
        if "latents" in inputs:
            if inputs["latents"].shape != (len(inputs["seed"]), *shape):
                has, needs = list(inputs["latents"].shape), [len(inputs["seed"]), *shape]
                found = f"its latents are {has}, its request and this model need {needs}"
                raise StateError("going on from a State", found, "Use the model that it was made with")
            history = inputs.get("history", {})
            history = {k: v.to(transformer.device) if v.dim() else v for k, v in history.items()}
            return with_known(inputs["latents"].to(transformer.device), inputs), inputs.get("step", 0), history
        x = torch.stack([initial_noise(seed, shape) for seed in inputs["seed"]])
        return with_known(x.to(transformer.device), inputs), 0, {}

    def predict(self, inputs: Mapping[str, Any], ctx: Context, x: Tensor) -> Predict:
        """The transformers behind seam A: guidance inside, whatever plugs in around it."""
        # Read now: fingerprints hold the settings that were read, also those of a run that stops before its first step.
        scale = ctx.settings.control_scale if "control" in inputs else 1.0
        makers = {
            name: partial(forward_pass, name, inputs, ctx, self.attention, self.cache_text_kv, scale)
            for name in self.experts
        }
        return wrap(classifier_free_guidance(by_expert(makers)), ctx.seams.predict)

    def noise(self, scheduler: Scheduler, seeds: list[int], x: Tensor):
        def draw(step: Step) -> Tensor | None:
            if not scheduler.needs_noise:
                return None
            return torch.stack([step_noise(seed, step.index, x.shape[1:]) for seed in seeds]).to(x.device)

        return draw


def with_known(x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The first latent frames of a TI2V run are given; they stand in ``x`` before the first step and after each."""
    if "clean_latents" not in inputs:
        return x
    known = inputs["clean_latents"].to(x)
    return torch.cat((known, x[:, :, known.shape[2] :]), 2)


def as_fields(sigmas: list[float], x: Tensor, history: Mapping[str, Tensor], done: int) -> dict[str, Any]:
    """How the loop stands, as the State holds it: on the CPU. One that has taken all its steps remembers nothing, also
    when Ctrl-C came right after the last one."""
    remembered = {} if done == len(sigmas) - 1 else {name: tensor.cpu() for name, tensor in history.items()}
    return {"latents": x.cpu(), "sigmas": sigmas, "step": done, "history": remembered}
