"""Complete random models in the Diffusers layout, which both sides load from disk as their users do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from training import folders

from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.models import umt5
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

PROMPT = "a red circle moving left on a black background"

# name: (transformer, base width of the VAE, latents [F, h, w] of its forward pass)
SIZES = {
    "shapes": (WanConfig(dim=192, num_heads=6, num_layers=6, ffn_dim=768, text_dim=128), 12, (4, 8, 8)),
    "middle": (WanConfig(dim=512, num_heads=8, num_layers=6, ffn_dim=2048, text_dim=256), 12, (5, 24, 32)),
    "wide": (WanConfig(dim=1536, num_heads=12, num_layers=2, ffn_dim=8960, text_dim=1024), 12, (3, 30, 52)),
}


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Matrices scaled so that activations stay near 1; gains near 1; small biases."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        gain = p.ndim < 2 or "gamma" in name
        p.normal_(0, 0.1 if gain or "modulation" in name else p[0].numel() ** -0.5, generator=g)
        if gain and "bias" not in name:
            p.add_(1)
    return module.eval().requires_grad_(False)


def write(folder: Path, name: str) -> Path:
    """The model called ``name`` in ``folder``; diffusers' WanPipeline.from_pretrained loads it too."""
    config, vae_dim, _ = SIZES[name]
    vae_config = WanVAEConfig(dim=vae_dim)
    text = umt5.UMT5Config(
        vocab_size=128, d_model=config.text_dim, d_kv=8, d_ff=2 * config.text_dim, num_layers=2, num_heads=4
    )
    write_part(
        folder / "transformer",
        KINDS["wan"].write_config("diffusers", asdict(config)),
        randomise(WanTransformer(config), 1),
        transformer_keys(config.num_layers).to_other,
    )
    write_vae(folder / "vae", vae_config)
    encoder = randomise(umt5.build_umt5(text).to_empty(device="cpu"), 3).state_dict()
    encoder.pop("encoder.embed_tokens.weight")
    folders.write_component(
        folder / "text_encoder",
        KINDS["umt5"].write_config("transformers", asdict(text)),
        encoder,
        weights_name="model.safetensors",
    )
    write_tokenizer(folder / "tokenizer")
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
        "num_train_timesteps": 1000,
    }
    folders.write_component(folder / "scheduler", scheduler, config_name="scheduler_config.json")
    parts = {
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "T5TokenizerFast"),
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    }
    folders.write_index(folder, parts)
    return folder


def write_vae(folder: Path, config: WanVAEConfig) -> None:
    table = vae_keys(len(config.dim_mult), config.num_res_blocks).to_other
    write_part(folder, KINDS["wan_vae"].write_config("diffusers", asdict(config)), randomise(WanVAE(config), 2), table)


def write_part(folder: Path, config: dict, module: torch.nn.Module, table: dict[str, str]) -> None:
    folders.write_component(folder, config, rename(module.state_dict(), table))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in sorted(set(PROMPT.split()))] + [(chr(c), -8.0) for c in range(97, 123)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([piece for piece, _ in pieces[:4]])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
