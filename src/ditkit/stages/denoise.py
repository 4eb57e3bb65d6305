"""The denoising loop: noise and text in, clean latents out. One screen of plain math.

It can stop after any step and go on from the State, bit for bit: the sample, the step count and the solver's history
are all that it remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditkit.contracts import Predict, Scheduler, Step, wrap
from ditkit.errors import StateError
from ditkit.guidance.cfg import classifier_free_guidance
from ditkit.nn.attention import ATTENTION
from ditkit.pipeline import BaseStage, Context, Stopped
from ditkit.schedulers import make
from ditkit.schedulers.noise import initial_noise, step_noise
from ditkit.schedulers.table import step_table
from ditkit.state import State


@dataclass(frozen=True)
class Denoise(BaseStage):
    """``strides``: pixels to latents, as (frames, height, width); frames as (T - 1) / stride + 1."""

    strides: tuple[int, int, int] = (4, 8, 8)
    attention: str = "sdpa"
    remember_text: bool = field(default=True, compare=False)

    name = "denoise"
    reads = ("prompt_embeds", "prompt_lengths", "seed", "request")
    optional = ("negative_prompt_embeds", "negative_prompt_lengths", "latents")
    writes = ("latents", "sigmas", "step", "history")
    components = ("transformer",)
    loop = ("latents", "sigmas", "step", "history")

    def done(self, state: State) -> bool:
        return "sigmas" in state and "step" in state and state["step"] == len(state["sigmas"]) - 1

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        solver = ctx.seams.scheduler or make(ctx.settings.solver, **ctx.settings.solver_options)
        steps = self.steps(solver, ctx)
        sigmas = [*(s.sigma for s in steps), steps[-1].sigma_next]
        if inputs.get("sigmas", sigmas) != sigmas:
            raise StateError("going on from a State", "it was begun with other noise levels than its request now gives",
                             "Keep its steps, shift, schedule and solver, or begin anew")  # fmt: skip
        x, done, history = self.begin(inputs, ctx)
        predict = self.predict(inputs, ctx, x)
        noise = self.noise(solver, inputs["seed"], x)
        last = len(steps) if ctx.stop_at_step is None else min(ctx.stop_at_step, len(steps))

        reached = x, history, done
        try:
            for step in steps[done:last]:
                with ctx.events.span("step", step=step):
                    velocity = predict(x, step)
                    ctx.events.emit("prediction", step=step, x=x, velocity=velocity)
                    # One assignment, so that Ctrl-C finds all of them before the step or all of them after it.
                    reached = (*solver.solve(x, velocity, step, history, noise(step)), step.index + 1)
                    x, history, done = reached
        except KeyboardInterrupt:
            x, history, done = reached
            raise Stopped({"latents": x.cpu(), "sigmas": sigmas, "step": done, "history": on_cpu(history)}) from None

        history = {} if done == len(steps) else on_cpu(history)
        return {"latents": x.cpu(), "sigmas": sigmas, "step": done, "history": history}

    def steps(self, solver: Scheduler, ctx: Context) -> list[Step]:
        """The step table; also what is printed before a run."""
        s = ctx.settings
        scale = ctx.components["transformer"].timestep_scale
        if s.sigmas is not None:
            return step_table(solver, None, None, s.schedule, s.guidance_scale, scale, s.sigmas)
        return step_table(solver, s.steps, s.shift, s.schedule, s.guidance_scale, scale)

    def begin(self, inputs: Mapping[str, Any], ctx: Context) -> tuple[Tensor, int, Mapping[str, Tensor]]:
        """Where a State left off; latents that nobody has worked on yet; or fresh noise, for each sample what its seed
        gives alone."""
        transformer = ctx.components["transformer"]
        s, (t, h, w) = ctx.settings, self.strides
        shape = (transformer.latent_channels, (s.frames - 1) // t + 1, s.height // h, s.width // w)
        if "latents" in inputs:
            if inputs["latents"].shape != (len(inputs["seed"]), *shape):
                has, needs = list(inputs["latents"].shape), [len(inputs["seed"]), *shape]
                found = f"its latents are {has}, its request and this model need {needs}"
                raise StateError("going on from a State", found, "Use the model that it was made with")
            history = inputs.get("history", {})
            history = {k: v.to(transformer.device) if v.dim() else v for k, v in history.items()}
            return inputs["latents"].to(transformer.device), inputs.get("step", 0), history
        x = torch.stack([initial_noise(seed, shape) for seed in inputs["seed"]])
        return x.to(transformer.device), 0, {}

    def predict(self, inputs: Mapping[str, Any], ctx: Context, x: Tensor) -> Predict:
        """The transformer behind seam A: guidance inside, whatever plugs in around it."""
        transformer = ctx.components["transformer"]
        texts = {"cond": self.text(transformer, inputs["prompt_embeds"], inputs["prompt_lengths"])}
        if ctx.settings.guidance_scale != 1:
            if "negative_prompt_embeds" not in inputs:
                raise StateError(
                    "guiding away from the negative prompt",
                    "the State has no negative_prompt_embeds",
                    "Run encode_text with this guidance scale, or set it to 1",
                )
            negative = inputs["negative_prompt_embeds"], inputs["negative_prompt_lengths"]
            texts["uncond"] = self.text(transformer, *negative)
        attend = wrap(ATTENTION[self.attention], ctx.seams.attend)
        run_blocks = wrap(transformer.run_blocks, ctx.seams.run_blocks)

        @torch.inference_mode()
        def forward(x: Tensor, step: Step) -> Tensor:
            timestep = torch.full((len(x),), step.timestep, dtype=torch.float64, device=x.device)
            velocity = transformer(x, timestep, texts[step.branch], run_blocks=run_blocks, attend=attend, step=step)
            return velocity.to(x.dtype)

        return wrap(classifier_free_guidance(forward), ctx.seams.predict)

    @torch.inference_mode()
    def text(self, transformer: Any, embeds: Tensor, lengths: list[int]) -> Any:
        try:
            return transformer.prepare_text(embeds.split(lengths), self.remember_text)
        except ValueError as e:
            raise StateError(
                "conditioning on the text of a State", str(e), "Use the text encoder of this model"
            ) from None

    def noise(self, solver: Scheduler, seeds: list[int], x: Tensor):
        def draw(step: Step) -> Tensor | None:
            if not solver.needs_noise:
                return None
            return torch.stack([step_noise(seed, step.index, x.shape[1:]) for seed in seeds]).to(x.device)

        return draw


def on_cpu(history: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in history.items()}
