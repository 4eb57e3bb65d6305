"""Each part of the embedded model against diffusers and transformers on the same trained files.

Trained weights have large and small numbers where random ones are even. Whole runs: ``test_wanpipeline.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

import ditkit
from ditkit.assembly import MODELS
from ditkit.shapes.draw import draw, sample_scene

FOLDER = MODELS["shapes"]
PROMPT = "a red circle moving left on a black background"


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.fixture(scope="module")
def parts():
    return ditkit.load("shapes").components


@pytest.fixture(scope="module")
def rows(parts):
    ids, _ = parts["tokenizer"]([PROMPT], 512)
    return parts["text_encoder"](ids[0])


def test_text_encoder(parts, rows):
    theirs = UMT5EncoderModel.from_pretrained(FOLDER / "text_encoder", attn_implementation="eager").eval()
    ids, _ = parts["tokenizer"]([PROMPT], 512)
    padded = torch.tensor([ids[0] + [0] * (512 - len(ids[0]))])
    with torch.inference_mode():
        expected = theirs(padded, attention_mask=(padded != 0).long()).last_hidden_state[0, : len(ids[0])]
    assert rel(rows, expected) <= 1e-5


@pytest.mark.parametrize("timestep", [999, 500, 40])
def test_transformer(parts, rows, timestep):
    ours = parts["transformer"]
    theirs = WanTransformer3DModel.from_pretrained(FOLDER / "transformer").eval()
    x, t = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([timestep])
    text = torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows)))[None]
    with torch.inference_mode():
        expected = theirs(x, t, text, return_dict=False)[0]
        assert rel(ours(x, t, ours.prepare_text([rows])), expected) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 13, 17])
def test_vae(parts, frames):
    ours, theirs = parts["vae"], AutoencoderKLWan.from_pretrained(FOLDER / "vae").eval()
    clip = draw(sample_scene(np.random.default_rng(frames)), frames)
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    with torch.inference_mode():
        latents = ours.encode(video)
        assert rel(latents, (theirs.encode(video).latent_dist.mode() - mean) / std) <= 1e-5
        expected = theirs.decode(latents * std + mean, return_dict=False)[0]
        assert rel(torch.cat(list(ours.decode(latents)), 2), expected) <= 1e-5
