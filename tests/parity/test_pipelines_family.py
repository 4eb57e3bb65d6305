"""Whole runs of the official image-to-video, two-expert and 5B pipelines, followed state by state through our loop.

The conditioning is the official one here; tests/parity/test_conditioning.py makes it from the picture.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from reference import rel
from safetensors import safe_open
from safetensors.torch import load_file

from ditkit.events import Events
from ditkit.execution.stage_list import StageList
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.request import Request
from ditkit.stages.denoise import CONDITIONS as CONDITIONING
from ditkit.stages.denoise import Denoise
from ditkit.state import State

GOLDEN = Path(__file__).parents[1] / "data/golden"
with safe_open(GOLDEN / "pipelines/io.safetensors", "pt") as f:
    RUNS = {name: run for name, run in json.loads(f.metadata()["runs"]).items() if not name.startswith("wan21_t2v")}
    IO = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
TEXT = ("prompt_embeds", "prompt_lengths", "negative_prompt_embeds", "negative_prompt_lengths")
BOUNDARY = {"wan22_t2v_a14b": 0.875, "wan22_i2v_a14b": 0.9}
STRIDES = {"wan22_ti2v_5b": (4, 16, 16)}


def network(run: str) -> str:
    """The folder of the networks that made ``run``."""
    kinds = sorted((p.name for p in (GOLDEN / "transformer").iterdir()), key=len, reverse=True)
    wanted = "wan22_ti2v_5b" if "ti2v" in run else run.rpartition("_")[0]
    assert wanted in kinds
    return wanted


def transformer(folder: Path) -> WanTransformer:
    raw, tensors = json.loads((folder / "config.json").read_text()), load_file(next(folder.glob("diff*.safetensors")))
    known = {f.name: raw[f.name] for f in fields(WanConfig) if f.name in raw}
    image = tensors.get("img_emb.proj.0.weight")
    model = WanTransformer(WanConfig(**known, image_dim=None if image is None else len(image)))
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def load(kind: str) -> dict[str, WanTransformer]:
    folder = GOLDEN / "transformer" / kind
    if kind in BOUNDARY:
        pairs = ("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")
        return {name: transformer(folder / part) for name, part in pairs}
    return {"transformer": transformer(folder)}


def begin(run: str, kind: str) -> State:
    asked = RUNS[run]
    io = {name.removeprefix(f"{run}."): x for name, x in IO.items() if name.startswith(f"{run}.")}
    scale = asked["guide_scale"]
    low, high = scale if isinstance(scale, list) else (None, scale)  # the official order is (low noise, high noise)
    t, h, w = STRIDES.get(kind, (4, 8, 8))
    f, y, x = io["noise"].shape[1:]
    request = Request(
        width=x * w, height=y * h, frames=(f - 1) * t + 1, steps=asked["sampling_steps"], shift=asked["shift"],
        guidance_scale=high, guidance_scale_2=low, boundary=BOUNDARY.get(kind), scheduler=asked["sample_solver"],
    )  # fmt: skip
    given = {}
    if "y" in io:
        given["condition"] = io["y"][None]
    if "clip_fea" in io:
        given["image_embeds"] = io["clip_fea"]
    if "image" in run and "ti2v" in run:
        given["clean_latents"] = io["states"][0][None, :, :1]
    return State({
        "prompt": [""], "negative_prompt": [""], "seed": [0], "request": request.model_dump(),
        "prompt_embeds": io["context"], "prompt_lengths": [len(io["context"])],
        "negative_prompt_embeds": io["context_null"], "negative_prompt_lengths": [len(io["context_null"])],
        "latents": io["states"][0][None], "step": 0, "history": {}, **given,
    })  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_the_official_run_state_by_state(run):
    kind = network(run)
    components = load(kind)
    experts = tuple(components)
    stage = Denoise(STRIDES.get(kind, (4, 8, 8)), experts=experts)
    given = ("prompt", "negative_prompt", "seed", "request", *TEXT, *CONDITIONING)
    entered, told, who = [], [], []

    def listen(event):
        if event.name == "prediction":
            entered.append(event["x"].clone())
            told.append(event["step"].timestep)
            who.append((event["step"].expert, event["step"].guidance_scale))

    final = StageList([stage], given).run(begin(run, kind), components, events=Events(listen), debug=True)
    assert told == IO[f"{run}.timesteps"].tolist()
    expected = IO[f"{run}.states"]
    states = [*entered, final["latents"]]
    assert len(states) == len(expected) == RUNS[run]["sampling_steps"] + 1
    errors = [rel(ours[0], theirs) for ours, theirs in zip(states, expected, strict=True)]
    assert errors[0] == 0
    assert max(errors) <= 1e-5, errors
    if kind in BOUNDARY:
        low, high = RUNS[run]["guide_scale"]
        names = [{"transformer": "high", "transformer_2": "low"}[expert] for expert, _ in who]
        official = [name.removesuffix("_noise_model") for name in RUNS[run]["expert_per_step"]]
        assert names == official
        assert len(set(names)) == 2
        assert all(scale == (high if name == "high" else low) for name, (_, scale) in zip(names, who, strict=True))
