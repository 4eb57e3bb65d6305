"""A Self-Forcing checkpoint as it is published, a nested .pt of a plain 1.3B network, through the real loading code.

Its first block of frames has nothing behind it, so the plain transformer with a timestep for each frame computes what
the causal one computes. Rolling on from there is another feature.
"""

from pathlib import Path

import pytest
import torch
from reference import rel
from safetensors.torch import load_file

from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.model.open_part import open_part
from ditkit.models.wan import WanConfig, WanTransformer

FOLDER = Path(__file__).parents[1] / "data/golden/causal"
IO = load_file(FOLDER / "io.safetensors")


def load(file: str, entry: str | None = None) -> WanTransformer:
    part = open_part(FOLDER / file, "transformer", entry=entry)
    model = WanTransformer(WanConfig(**part.config)).eval().requires_grad_(False)
    load_into(model, part.source)
    return model


@pytest.mark.parametrize(
    ("file", "entry", "expected"),
    [
        ("self_forcing_dmd.pt", None, "generator_ema"),  # the rule that the official inference follows, and it is told
        ("self_forcing_dmd.pt", "generator_ema", "generator_ema"),
        ("self_forcing_dmd.pt", "generator", "generator"),
        ("model_prefix.safetensors", None, "generator_ema"),
    ],
)
@torch.inference_mode()
def test_one_forward_of_each_set_of_weights(file, entry, expected):
    model = load(file, entry)
    text = model.prepare_text([IO["context"]])
    velocity = model(IO["single.latents"], IO["single.timestep"], text)
    assert rel(velocity, IO[f"single.output.{expected}"]) <= 1e-5


def test_which_weights_were_taken_is_said():
    part = open_part(FOLDER / "self_forcing_dmd.pt")
    assert any("generator_ema" in note for note in part.notes), part.notes
    assert open_part(FOLDER / "self_forcing_dmd.pt", entry="generator").source.fingerprint != part.source.fingerprint


@torch.inference_mode()
def test_the_first_block_of_a_run_step_by_step():
    """Few steps, as the predecessor takes them: x0 from the velocity, then new noise."""
    model = load("self_forcing_dmd.pt")
    text = model.prepare_text([IO["context"]])
    table = load_file(FOLDER.parent / "schedulers/few_step.safetensors")
    times, sigmas = table["shift5.warped.1000-750-500-250"], table["shift5.warped_sigma.1000-750-500-250"].double()
    x = IO["global.noise"].double()[:, :, :3]
    for i, (timestep, sigma) in enumerate(zip(times, sigmas, strict=True)):
        velocity = model(x.float(), timestep.expand(1, 3), text)
        assert rel(velocity, IO[f"global.block0.step{i}.velocity"]) <= 1e-5
        x0 = x - sigma * velocity.double()
        assert rel(x0, IO[f"global.block0.step{i}.x0"]) <= 1e-5
        if i + 1 < len(times):
            noise = IO[f"global.block0.step{i}.renoise"].double()
            x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise
    assert rel(x0, IO["global.output"][:, :, :3]) <= 1e-5


def test_its_steps_are_explicit_sigmas_of_a_request():
    """What a plain run of it asks for: the four warped levels, no guidance."""
    from ditkit.models.wan import TIMESTEP_SCALE
    from ditkit.request import Request
    from ditkit.schedulers import make
    from ditkit.schedulers.table import request_steps

    table = load_file(FOLDER.parent / "schedulers/few_step.safetensors")["shift5.warped_sigma.1000-750-500-250"]
    request = Request(sigmas=[*table.tolist(), 0.0], guidance_scale=1.0, scheduler="euler")
    steps = request_steps(make("euler"), request, TIMESTEP_SCALE)
    assert [round(s.timestep, 3) for s in steps] == [1000.0, 937.5, 833.333, 625.0]
    assert steps[-1].sigma_next == 0
