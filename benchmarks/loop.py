"""Everything but the models: scheduler, guidance, events and the loop around them, for each step.

The transformer's place is taken by one multiplication whose time is subtracted, on both sides, so that latents of the
full 480p size can be used. Then a real run at 1.3B width: what share of it is spent outside the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ditkit
from benchmarks.measure import Row, compared, in_turns
from benchmarks.models import PROMPT, SIZES

# 1.3B, 81 frames of 832x480: 32,760 tokens, 30 layers of 12 heads, two passes a step.
FULL_TOKENS, FULL_LAYERS, FULL_DIM, FULL_WEIGHTS = 32_760, 30, 1536, 1.3e9
FULL_STEP_FLOPS = 2 * (2 * FULL_WEIGHTS * FULL_TOKENS + 4 * FULL_TOKENS**2 * FULL_DIM * FULL_LAYERS)
ASSUMED_GPU_FLOPS = 400e12  # what a large GPU may sustain in bfloat16


class Timed:
    """A transformer that knows how long its calls took. ``inner`` None: a multiplication instead of a network."""

    timestep_scale, latent_channels, device = 1000.0, 16, torch.device("cpu")
    reads, cfg = (), True

    def __init__(self, inner: Any = None):
        self.inner, self.seconds = inner, 0.0
        self.fingerprint = "benchmark" if inner is None else inner.fingerprint
        self.run_blocks = None if inner is None else inner.run_blocks

    def prepare(self, *given: Any) -> Any:
        begun = time.perf_counter()
        text = None if self.inner is None else self.inner.prepare(*given)
        self.seconds += time.perf_counter() - begun
        return text

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any, **seams: Any) -> torch.Tensor:
        begun = time.perf_counter()
        out = latents * 0.5 if self.inner is None else self.inner(latents, timestep, text, **seams)
        self.seconds += time.perf_counter() - begun
        return out


def pipe_with(folder: Path, timed: Timed, **request: Any) -> tuple[ditkit.Pipeline, ditkit.State]:
    """A pipe around ``timed``, and the State that is ready for its first step."""
    pipe = ditkit.load(folder, device="cpu")
    state = pipe.begin(pipe.model.request({"prompt": PROMPT, **request}))
    state = pipe.run(state, until="encode_text").state
    return ditkit.Pipeline(pipe.model, pipe.setup, {"transformer": timed}, pipe.stages), state


def beside_the_model(folder: Path, frames: int, height: int, width: int, steps: int, repeats: int) -> Iterator[Row]:
    """Seconds a step outside the transformer; pixels. Both sides: UniPC, guidance 5, one listener."""
    from diffusers import WanPipeline

    timed = Timed()
    request = {"frames": frames, "height": height, "width": width, "steps": steps, "guidance_scale": 5.0}
    pipe, state = pipe_with(folder, timed, **request)
    theirs = WanPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    spent = 0.0

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        nonlocal spent
        begun = time.perf_counter()
        out = hidden_states * 0.5
        spent += time.perf_counter() - begun
        return (out,)

    theirs.transformer.forward = forward
    embeds = torch.zeros(1, 512, theirs.text_encoder.config.d_model)
    seen: list[int] = []

    def one() -> float:
        timed.seconds, begun = 0.0, time.perf_counter()
        pipe.run(state, until="denoise", listeners=[lambda event: seen.append(0)])
        return (time.perf_counter() - begun - timed.seconds) / steps

    def other() -> float:
        nonlocal spent
        spent, begun = 0.0, time.perf_counter()
        theirs(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, values: values,
        )
        return (time.perf_counter() - begun - spent) / steps

    name = f"a step of {steps}, {frames} frames of {width}x{height}"
    ours, others = in_turns(one, other, repeats, time.perf_counter)
    row = compared("outside the models", name, "s", ours, others)
    yield row
    if width == 832:
        share = 100 * row.ours * ASSUMED_GPU_FLOPS / FULL_STEP_FLOPS
        note = f"estimate: {row.ours:.3f} s on this CPU beside 1.3B passes at an assumed {ASSUMED_GPU_FLOPS:.0e} FLOP/s"
        yield Row("outside the models", "share of a 1.3B 480p step, model on a GPU", "%", share, limit=None, note=note)


def share_of_a_run(folder: Path, steps: int = 2) -> Iterator[Row]:
    """Measured: a run with the wide transformer, guidance on, from encoded text to clean latents."""
    config, _, (f, h, w) = SIZES["wide"]
    loaded = ditkit.load(folder, device="cpu").components["transformer"]
    timed = Timed(loaded)
    request = {"frames": 4 * f - 3, "height": 8 * h, "width": 8 * w, "steps": steps, "guidance_scale": 5.0}
    pipe, state = pipe_with(folder, timed, **request)
    begun = time.perf_counter()
    pipe.run(state, until="denoise")
    total = time.perf_counter() - begun
    name = f"share of a run, width {config.dim}, {config.num_layers} layers of 30, {f * h * w // 4} tokens"
    yield Row(
        "outside the models", name, "%", 100 * (1 - timed.seconds / total), limit=2.0, note=f"{total:.1f} s in all"
    )
