"""Whole runs of the official text-to-video pipeline, followed state by state through our own stages."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from reference import rel
from safetensors import safe_open
from safetensors.torch import load_file

from ditkit.contracts import Seams
from ditkit.events import Events
from ditkit.execution.stage_list import StageList
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAEConfig
from ditkit.request import Request
from ditkit.stages.decode_latents import DecodeLatents
from ditkit.stages.denoise import Denoise
from ditkit.state import State

GOLDEN = Path(__file__).parents[1] / "data/golden"
TEXT = ("prompt_embeds", "prompt_lengths", "negative_prompt_embeds", "negative_prompt_lengths")
with safe_open(GOLDEN / "pipelines/wan21_t2v.safetensors", "pt") as f:
    RUNS = json.loads(f.metadata()["runs"])
    IO = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def components():
    raw = json.loads((GOLDEN / "transformer/wan21_t2v/config.json").read_text())
    transformer = WanTransformer(WanConfig(**{f.name: raw[f.name] for f in fields(WanConfig) if f.name in raw}))
    transformer.load_state_dict(load_file(GOLDEN / "transformer/wan21_t2v/diffusion_pytorch_model.safetensors"))
    vae = WanVAE(WanVAEConfig(dim=json.loads((GOLDEN / "vae/wan21/config.json").read_text())["dim"]))
    vae.load_state_dict(load_file(GOLDEN / "vae/wan21/Wan2.1_VAE.safetensors"))
    return {"transformer": transformer.eval().requires_grad_(False), "vae": vae.eval().requires_grad_(False)}


def begin(run: str) -> State:
    """Text features and start noise from outside: a State in which no step has been taken yet."""
    asked, io = RUNS[run], {name: IO[f"{run}.{name}"] for name in ("context", "context_null", "noise")}
    width, height = asked["size"]
    request = Request(
        width=width, height=height, frames=asked["frame_num"], steps=asked["sampling_steps"], shift=asked["shift"],
        guidance_scale=asked["guide_scale"], scheduler=asked["sample_solver"],
    )  # fmt: skip
    return State({
        "prompt": [""], "negative_prompt": [""], "seed": [0], "request": request.model_dump(),
        "prompt_embeds": io["context"], "prompt_lengths": [len(io["context"])],
        "negative_prompt_embeds": io["context_null"], "negative_prompt_lengths": [len(io["context_null"])],
        "latents": io["noise"].unsqueeze(0), "step": 0, "history": {},
    })  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> StageList:
    return StageList([Denoise(), DecodeLatents()], given=("prompt", "negative_prompt", "seed", "request", *TEXT))


@pytest.mark.parametrize("run", RUNS)
def test_the_official_run_state_by_state(components, pipeline, run):
    entered, told, branches = [], [], {}

    def listen(event):
        if event.name == "prediction":
            entered.append(event["x"].clone())
            told.append(event["step"].timestep)

    def watch(predict):
        def watched(x, step):
            velocity = predict(x, step)
            branches.setdefault("guided", velocity)
            return velocity

        return watched

    def texts(run_blocks):  # guidance calls the transformer twice a step, the conditional pass first
        def watched(blocks, x, ctx):
            branches.setdefault("texts", []).append(ctx.text.rows)
            return run_blocks(blocks, x, ctx)

        return watched

    seams = Seams(predict=(watch,), run_blocks=(texts,))
    final = pipeline.run(begin(run), components, until="denoise", events=Events(listen), seams=seams, debug=True)

    assert told == IO[f"{run}.timesteps"].tolist()
    expected = IO[f"{run}.states"]
    states = [*entered, final["latents"]]
    assert len(states) == len(expected) == RUNS[run]["sampling_steps"] + 1
    errors = [rel(ours[0], theirs) for ours, theirs in zip(states, expected, strict=True)]
    assert errors[0] == 0
    assert max(errors) <= 1e-5, errors  # 3e-5 is what the official code differs by between two machines
    assert final["step"] == len(expected) - 1

    cond, uncond = IO[f"{run}.velocity_cond"], IO[f"{run}.velocity_uncond"]
    guided = uncond + RUNS[run]["guide_scale"] * (cond - uncond)
    assert rel(branches["guided"][0], guided) <= 1e-5
    assert len(branches["texts"]) == 2 * RUNS[run]["sampling_steps"]
    assert all(a is branches["texts"][0] for a in branches["texts"][::2])
    assert all(a is branches["texts"][1] for a in branches["texts"][1::2])


@pytest.mark.parametrize("run", RUNS)
def test_both_predictions_of_the_first_step(components, run):
    transformer, timestep = components["transformer"], IO[f"{run}.timesteps"][:1]
    for branch, text in (("cond", "context"), ("uncond", "context_null")):
        with torch.inference_mode():
            velocity = transformer(IO[f"{run}.noise"][None], timestep, transformer.prepare_text([IO[f"{run}.{text}"]]))
        assert rel(velocity[0], IO[f"{run}.velocity_{branch}"]) <= 5e-6


@pytest.mark.parametrize("run", [run for run in RUNS if f"{run}.video" in IO])
@pytest.mark.parametrize("frames_per_chunk", [1, 2])
def test_the_official_video(components, pipeline, run, frames_per_chunk):
    chosen = pipeline.replace("decode_latents", DecodeLatents(frames_per_chunk))
    video = chosen.run(begin(run), components, debug=True)["video"]
    expected = IO[f"{run}.video"].permute(1, 2, 3, 0)  # frames, height, width, RGB
    exact = (expected.clamp(-1, 1) + 1) * 127.5
    assert video.shape == (1, *expected.shape)
    assert video.dtype == torch.uint8
    off = (video[0].double() - exact.double()).abs()
    assert off.max() <= 1.01  # truncated, as the official writer does it; and the decoder's own rounding
    assert (video[0] != exact.to(torch.uint8)).double().mean() <= 1e-3  # and else only where a number sits on the edge
    latents = chosen.run(begin(run), components, until="denoise")["latents"]
    decoded = torch.cat(list(components["vae"].decode(latents, frames_per_chunk)), 2)
    assert rel(decoded[0], IO[f"{run}.video"]) <= 1e-4
