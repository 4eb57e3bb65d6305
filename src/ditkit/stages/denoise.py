"""The denoising loop: noise and text in, clean latents out. One screen of plain math.

It can stop after any step and go on from the State, bit for bit: the sample, the step count, the scheduler's history
and what plugs remember are all that it remembers. Leaves out: what the transformer makes of its conditioning
(``models/``), how plugs are put around it (``seams.py``), and making it (``assembly``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ditkit.contracts import EXPERTS, Predict, Step
from ditkit.devices import for_float64
from ditkit.errors import SetupError, StateError
from ditkit.execution.stage import BaseStage, Context, check_strides
from ditkit.guidance.cfg import classifier_free_guidance
from ditkit.nn.attention import ATTENTION
from ditkit.schedulers import make
from ditkit.schedulers.noise import initial_noise, step_noise
from ditkit.schedulers.table import request_steps
from ditkit.seams import RunPlugs
from ditkit.state import State

TEXT = ("prompt_embeds", "prompt_lengths")
NEGATIVE = ("negative_prompt_embeds", "negative_prompt_lengths")
CONDITIONS = ("image_embeds", "condition", "clean_latents", "control")


@dataclass(frozen=True)
class Denoise(BaseStage):
    """``strides``: pixels to latents, as (frames, height, width); frames as (T - 1) / stride + 1. ``experts``: the
    transformers of the run; with two, the second takes the steps below the request's boundary. ``timestep_scale`` is
    theirs; where it is not known, a part of a run counts as calling both. ``conditions``: the fields that they may be
    conditioned on besides the text. ``cfg``: whether a guidance scale other than 1 means a second pass; without it
    the step's scale is for the network."""

    strides: tuple[int, int, int] = (4, 8, 8)
    attention: str = "sdpa"
    cache_text_kv: bool = field(default=True, compare=False)
    experts: tuple[str, ...] = ("transformer",)
    timestep_scale: float | None = field(default=None, compare=False)
    conditions: tuple[str, ...] = field(default=CONDITIONS, compare=False)
    cfg: bool = True

    name = "denoise"
    reads = (*TEXT, "seed", "request")
    writes = ("latents", "sigmas", "step", "history")
    may_write = ("memory",)
    loop = ("latents", "sigmas", "step", "history", "memory")

    def __post_init__(self) -> None:
        """A job from elsewhere may bring any values. Raises SetupError for a kernel that is not there, ValueError."""
        check_strides(self.strides)
        if self.experts not in (EXPERTS[:1], EXPERTS[1:], EXPERTS):
            raise ValueError(f"its experts are {', '.join(EXPERTS)} or one of them")
        if self.timestep_scale is not None and not 0 < self.timestep_scale < math.inf:
            raise ValueError("its timestep_scale is no number above 0")
        if why := ATTENTION[self.attention].lacks():
            name = self.attention.partition("@")[0]
            raise SetupError(f"attention={name!r}", why, "Install what it needs, or choose another kernel")

    @property
    def components(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.experts

    @property
    def optional(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*NEGATIVE, *self.conditions, "latents")

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
        """The expert of each step; empty where it cannot be told: noise levels that the request does not give."""
        request = SimpleNamespace(**state["request"])
        if len(self.experts) < 2 or request.boundary is None or self.timestep_scale is None:
            return []
        steps = request_steps(make(request.scheduler, **request.scheduler_options), request, self.timestep_scale, 2)
        return [step.expert for step in steps] if state.get("sigmas") in (None, noise_levels(steps)) else []

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        scheduler = ctx.seams.scheduler or make(ctx.settings.scheduler, **ctx.settings.scheduler_options)
        first = self.needs(inputs, ctx.stop_at_step)[0]
        transformer = ctx.components[first]
        steps = request_steps(scheduler, ctx.settings, transformer.timestep_scale, len(self.experts))
        sigmas = noise_levels(steps)
        if inputs.get("sigmas", sigmas) != sigmas:
            raise StateError("going on from a State", "it was begun with other noise levels than its request now gives",
                             "Keep its steps, shift, convention and scheduler, or begin anew")  # fmt: skip
        x, done, history = self.begin(inputs, ctx, transformer)
        plugs = RunPlugs(ctx.events, ctx.settings, len(x), inputs.get("memory"), x.device)
        predict = self.predict(inputs, ctx, plugs, first)
        last = len(steps) if ctx.stop_at_step is None else min(ctx.stop_at_step, len(steps))

        drawn = inputs["seed"] if scheduler.needs_noise else []  # for each sample what its seed gives alone
        reached = x, history, plugs.remembered(), done
        try:
            for step in steps[done:last]:
                with ctx.events.span("step", step=step):
                    velocity = predict(x, step)
                    ctx.events.emit("prediction", step=step, x=x, velocity=velocity)
                    noise = [step_noise(seed, step.index, x.shape[1:]) for seed in drawn]
                    fresh = torch.stack(noise).to(x.device) if noise else None
                    x_next, history_next = scheduler.solve(x, velocity, step, history, fresh)
                    # One assignment, so that Ctrl-C finds all of them before the step or all of them after it.
                    reached = with_known(x_next, inputs), history_next, plugs.remembered(), step.index + 1
                    x, history, _, done = reached
                if done < last:
                    ctx.kept(done, partial(as_fields, sigmas, *reached))
        except KeyboardInterrupt:
            ctx.stopped = True
        except (Exception, SystemExit):
            ctx.reached = partial(as_fields, sigmas, *reached)
            raise
        return as_fields(sigmas, *reached)

    def begin(
        self, inputs: Mapping[str, Any], ctx: Context, transformer: Any
    ) -> tuple[Tensor, int, Mapping[str, Tensor]]:
        """Where a State left off; latents that nobody has worked on yet; or fresh noise, for each sample what its seed
        gives alone."""
        s, (t, h, w) = ctx.settings, self.strides
        shape = transformer.latent_channels, (s.frames - 1) // t + 1, s.height // h, s.width // w
        if "control" in inputs:  # reference pictures are frames before the video
            shape = (shape[0], inputs["control"].shape[2], *shape[2:])
        for name, sizes in (("condition", shape[1:]), ("control", shape[1:]), ("clean_latents", shape[2:])):
            if name in inputs and inputs[name].shape[-len(sizes) :] != sizes:
                found = (
                    f"its {name} is for latents of {list(inputs[name].shape[2:])}, its request needs {list(shape[1:])}"
                )
                raise StateError("denoising a State", found, "Encode its pictures once more")
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

    def predict(self, inputs: Mapping[str, Any], ctx: Context, plugs: RunPlugs, first: str) -> Predict:
        """The transformers behind seam A: guidance inside, whatever plugs in around it. Each expert has wrappers of its
        own, and is asked for at the first of its steps."""
        seams, guided = ctx.seams, self.cfg and ctx.settings.guided
        plugs.drop_strangers({"predict": seams.predict, "run_blocks": seams.run_blocks, "attend": seams.attend})
        branches = ("cond", "uncond") if guided else ("cond",)
        ready = {(first, branch): self.prepare(first, branch, inputs, ctx, plugs) for branch in branches}

        @torch.inference_mode()
        def one_pass(x: Tensor, step: Step) -> Tensor:
            """One forward pass: that expert and that branch which the step names."""
            key = step.expert, step.branch
            if key not in ready:
                ready[key] = self.prepare(*key, inputs, ctx, plugs)
            transformer, conditioning, run_blocks, attend = ready[key]
            if step.frames is not None:
                conditioning = conditioning.frames(*step.frames)
            timestep = torch.full((len(x),), step.timestep, dtype=torch.float64, device=for_float64(x.device))
            velocity = transformer(x, timestep, conditioning, run_blocks=run_blocks, attend=attend, step=step)
            return velocity.to(x.dtype)

        inner = classifier_free_guidance(one_pass) if self.cfg else one_pass
        if not seams.predict:
            return inner
        wrapped = {name: plugs.wrap(inner, "predict", seams.predict, name) for name in self.experts}
        return lambda x, step: wrapped[step.expert](x, step)

    def prepare(
        self, name: str, branch: str, inputs: Mapping[str, Any], ctx: Context, plugs: RunPlugs
    ) -> tuple[Any, Any, Any, Any]:
        """Once for each branch: a transformer, what it is conditioned on, and what is called at the seams B and D."""
        transformer, seams = ctx.components[name], ctx.seams
        with torch.inference_mode():
            conditioning = transformer.prepare(inputs, ctx.settings, branch, self.cache_text_kv)
        run_blocks = plugs.wrap(transformer.run_blocks, "run_blocks", seams.run_blocks, name, branch)
        attend = plugs.wrap(ATTENTION[self.attention], "attend", seams.attend, name, branch)
        return transformer, conditioning, run_blocks, attend


def noise_levels(steps: list[Step]) -> list[float]:
    """The sigmas of a step table, with the last one."""
    return [*(step.sigma for step in steps), steps[-1].sigma_next]


def with_known(x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The first latent frames of a TI2V run are given; they stand in ``x`` before the first step and after each."""
    if "clean_latents" not in inputs:
        return x
    known = inputs["clean_latents"].to(x)
    return torch.cat((known, x[:, :, known.shape[2] :]), 2)


def as_fields(
    sigmas: list[float], x: Tensor, history: Mapping[str, Tensor], memory: Mapping[str, Tensor], done: int
) -> dict[str, Any]:
    """How the loop stands, as the State holds it: on the CPU. One that has taken all its steps remembers nothing, also
    when Ctrl-C came right after the last one."""
    fields = {"latents": x.cpu(), "sigmas": sigmas, "step": done, "history": {}}
    if done < len(sigmas) - 1:
        fields["history"] = {name: tensor.cpu() for name, tensor in history.items()}
        if memory:
            fields["memory"] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in memory.items()}
    return fields
