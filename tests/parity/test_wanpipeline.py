"""End to end against diffusers' own WanPipeline, which loads the same folder: the same noise must give the same clip.

With ``convention="diffusers"`` both make their own sigmas; with the official convention ours are handed to diffusers.
"""

import math

import numpy as np
import pytest
import torch
from reference import rel

import ditkit
from ditkit import assembly
from ditkit.schedulers.noise import initial_noise

SEED = 11
CASES = {
    "guidance, not square": {
        "prompt": "A  red circle &amp; a blue\\nsquare",
        "negative_prompt": "gray",
        "width": 48,
        "steps": 6,
    },
    "no guidance": {"prompt": "blue", "guidance_scale": 1.0, "steps": 4},
    "one frame": {"prompt": "a green triangle moving up", "frames": 1, "steps": 5, "guidance_scale": 2.5},
    "longer": {"prompt": "a red circle moving left on black background", "frames": 13, "height": 16, "steps": 3},
}


@pytest.fixture(scope="module")
def theirs(tiny_model):
    return wan_pipeline(tiny_model)


@pytest.fixture(scope="module")
def ours(tiny_model):
    return ditkit.load(tiny_model, dtype_policy="diffusers")


def wan_pipeline(folder):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedulers():
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return {
        "unipc": lambda shift: UniPCMultistepScheduler(**flow, flow_shift=shift),
        "dpm++": lambda shift: DPMSolverMultistepScheduler(**flow, flow_shift=shift),
        "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    }


@torch.inference_mode()
def run(pipeline, request, latents: torch.Tensor):
    """diffusers' clip for this request from this noise: the latents after every step, and uint8 frames."""
    states = []

    def keep(pipeline, index, timestep, values):
        states.append(values["latents"].clone())
        return {}

    frames = pipeline(
        request.prompt, request.negative_prompt, height=request.height, width=request.width, num_frames=request.frames,
        num_inference_steps=request.steps, guidance_scale=request.guidance_scale, latents=latents.clone(),
        output_type="np", callback_on_step_end=keep,
    ).frames[0]  # fmt: skip
    return states, np.round(frames * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(pipe, pipeline, request, tolerance: float, decibels: float) -> None:
    states = []
    listener = lambda e: states.append(e["x"].clone()) if e.name == "prediction" else None  # noqa: E731
    result = pipe.run(pipe.begin(request), listeners=[listener])
    final = result.state["latents"]
    noise = initial_noise(SEED, final.shape[1:])[None]
    assert torch.equal(states[0], noise)
    expected, frames = run(pipeline, request, noise)
    assert len(expected) == request.steps
    errors = [rel(a, b) for a, b in zip([*states[1:], final], expected, strict=True)]
    assert errors[-1] <= tolerance, errors
    assert psnr(result.video, frames) >= decibels
    assert frames.std() > 5  # there is something to compare


def asked(pipe, case: str, **more):
    return pipe.model.request({"seed": SEED, "rounding": "diffusers", **CASES[case], **more})


@pytest.mark.parametrize("case", CASES)
def test_the_same_clip(ours, theirs, case):
    compare(ours, theirs, asked(ours, case, convention="diffusers"), 1e-5, 60)


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "unipc"])
def test_the_same_clip_with_other_solvers_and_shifts(ours, theirs, scheduler):
    before = theirs.scheduler
    theirs.scheduler = schedulers()[scheduler](3.0)
    try:
        request = asked(ours, "guidance, not square", convention="diffusers", scheduler=scheduler, shift=3.0)
        compare(ours, theirs, request, 1e-5, 60)
    finally:
        theirs.scheduler = before


def handed(scheduler, steps):
    """diffusers' scheduler on our sigmas and timesteps."""

    class Handed(type(scheduler)):
        def set_timesteps(self, *positional, **named):
            super().set_timesteps(*positional, **named)
            assert len(self.sigmas) == len(steps) + 1
            self.sigmas = torch.tensor([*(s.sigma for s in steps), 0.0], dtype=torch.float32)
            self.timesteps = torch.tensor([s.timestep for s in steps], dtype=self.timesteps.dtype)

    return Handed.from_config(scheduler.config)


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_the_official_schedule_in_diffusers(ours, theirs, scheduler):
    request = asked(ours, "guidance, not square", scheduler=scheduler, steps=8)
    assert request.convention == "wan"
    before = theirs.scheduler
    theirs.scheduler = handed(schedulers()[scheduler](5.0), ours.steps(request))
    try:
        compare(ours, theirs, request, 1e-5, 60)
    finally:
        theirs.scheduler = before


def test_the_schedules_differ_so_that_the_tests_above_mean_something(ours):
    official, diffusers = (
        ours.run(ours.begin(asked(ours, "longer", convention=s)), until="denoise").state["latents"]
        for s in ("wan", "diffusers")
    )
    assert rel(official, diffusers) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_prompt_embeddings(ours, theirs, case):
    request = asked(ours, case, guidance_scale=4.0)
    state = ours.run(ours.begin(request), until="encode_text").state
    with torch.inference_mode():
        pairs = theirs.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=512)
    for name, expected in zip(("prompt_embeds", "negative_prompt_embeds"), pairs, strict=True):
        rows = state[name]
        assert expected.shape == (1, 512, rows.shape[1])
        assert rel(rows, expected[0, : len(rows)]) <= 1e-5
        assert not expected[0, len(rows) :].any()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_clip_on_the_embedded_model(seed, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SEED", seed)
    pipe = ditkit.load("shapes", dtype_policy="diffusers")
    pipeline = wan_pipeline(assembly.MODELS["shapes"])
    prompt = ["a red circle moving left on a black background", "a blue square moving down on a gray background"][
        seed - 1
    ]
    request = pipe.model.request(
        {"prompt": prompt, "seed": seed, "convention": "diffusers", "rounding": "diffusers", "steps": 12}
    )
    before = pipeline.scheduler
    pipeline.scheduler = type(before).from_config(before.config, flow_shift=request.shift)
    compare(pipe, pipeline, request, 1e-3, 45)
