"""Write the trained parts as a Diffusers-layout folder, whole or not at all, with ditkit's own notes beside them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import folders
from ditkit.checkpoints.kinds.configs import DIFFUSERS_VERSION
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.shapes.draw import FRAMES, HEIGHT, WIDTH, draw
from vae import to_pixels

DEFAULTS = {
    "width": WIDTH,
    "height": HEIGHT,
    "frames": FRAMES,
    "fps": 8,
    "steps": 20,
    "guidance_scale": 2.0,
    "shift": 3.0,
}


def preview_factors(scenes: list, normalised: Tensor) -> tuple[list[list[float]], list[float]]:
    """The linear map from normalised latents to RGB in [-1, 1] that fits best: [16][3] and a bias."""
    video = to_pixels(np.stack([draw(s)[::4] for s in scenes]))  # one pixel frame for each latent frame
    small = torch.nn.functional.avg_pool3d(video, (1, 8, 8)).movedim(1, -1).reshape(-1, 3)
    x = normalised.movedim(1, -1).reshape(-1, normalised.shape[1])
    x = torch.cat((x, torch.ones(len(x), 1)), 1)
    solution = torch.linalg.lstsq(x, small).solution
    rows = [[round(float(v), 4) for v in row] for row in solution]
    return rows[:-1], rows[-1]


def write(out: Path, vae, model, work: Path, scenes: list, latents: Tensor) -> None:
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config = vae.config
    names = vae_keys(len(config.dim_mult), config.num_res_blocks).to_other
    folders.write_component(
        new / "vae", KINDS["wan_vae"].write_config("diffusers", asdict(config)), rename(vae.state_dict(), names)
    )

    transformer = model.transformer
    names = transformer_keys(transformer.config.num_layers).to_other
    fields = KINDS["wan"].write_config("diffusers", asdict(transformer.config))
    folders.write_component(new / "transformer", fields, rename(transformer.state_dict(), names))

    theirs = model.text_encoder.config
    fields = {key: getattr(theirs, key) for key in (
        "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
        "relative_attention_max_distance", "layer_norm_epsilon",
    )}  # fmt: skip
    tensors = {k: v for k, v in model.text_encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    config_out = KINDS["umt5"].write_config("transformers", fields)
    folders.write_component(new / "text_encoder", config_out, tensors, weights_name="model.safetensors")

    folders.write_component(new / "tokenizer", None, files=sorted((work / "tokenizer").iterdir()))
    scheduler = {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION,
                 "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": DEFAULTS["shift"],
                 "num_train_timesteps": 1000}  # fmt: skip
    folders.write_component(new / "scheduler", scheduler, config_name="scheduler_config.json")
    folders.write_index(new, {
        "transformer": ("diffusers", "WanTransformer3DModel"), "vae": ("diffusers", "AutoencoderKLWan"),
        "text_encoder": ("transformers", "UMT5EncoderModel"), "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    })  # fmt: skip

    shape = (1, -1, 1, 1, 1)
    normalised = (latents - torch.tensor(config.latents_mean).view(shape)) / torch.tensor(config.latents_std).view(
        shape
    )
    factors, bias = preview_factors(scenes, normalised)
    lines = [
        "[defaults]",
        *(f"{k} = {v}" for k, v in DEFAULTS.items()),
        "",
        "[preview]",
        f"factors = {factors}",
        f"bias = {bias}",
    ]
    (new / "ditkit.toml").write_text("\n".join(lines) + "\n")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", new)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
