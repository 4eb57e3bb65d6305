"""A tiny, random, complete Wan 2.1 text-to-video model in the Diffusers layout, written anew for each test session."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ditkit.checkpoints import diffusers_folder as folders
from ditkit.checkpoints.keys import rename, transformer_keys, vae_keys
from ditkit.models import umt5
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

TRANSFORMER = WanConfig(dim=64, ffn_dim=112, num_heads=2, num_layers=2, text_dim=32, freq_dim=32)
VAE = WanVAEConfig(dim=4)
TEXT = umt5.UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
WORDS = "a red green blue circle square triangle moving left right up down on black gray background".split()  # noqa: SIM905


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every tensor gets numbers that matter: fan-in scaled weights, gains around 1, biases that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim >= 2 and "gamma" not in name and "modulation" not in name:
            p.copy_(noise / p[0].numel() ** 0.5)
        elif "bias" in name:
            p.copy_(0.2 * noise)
        elif "modulation" in name:
            p.copy_(0.3 * noise)
        else:
            p.copy_(1 + 0.2 * noise)
    return module.eval().requires_grad_(False)


def transformer(seed: int = 1, config: WanConfig = TRANSFORMER) -> WanTransformer:
    return randomise(WanTransformer(config), seed)


def vae(seed: int = 2, config: WanVAEConfig = VAE) -> WanVAE:
    return randomise(WanVAE(config), seed)


def text_encoder(seed: int = 3, config: umt5.UMT5Config = TEXT) -> torch.nn.Module:
    return randomise(umt5.build(config).to_empty(device="cpu"), seed)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{w}", -2.0) for w in WORDS] + [(chr(c), -8.0) for c in range(33, 127)] + [("▁", -8.0)]
    tokenizer = Tokenizer(models.Unigram(pieces[:128], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([p for p, _ in pieces[:4]])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip


def write(folder: Path) -> Path:
    """The whole model; diffusers' WanPipeline.from_pretrained loads it too."""
    t, v, e = transformer(), vae(), text_encoder()
    table = transformer_keys(TRANSFORMER.num_layers).to_other
    folders.write_component(
        folder / "transformer", folders.transformer_config_out(asdict(t.config)), rename(t.state_dict(), table)
    )
    table = vae_keys(len(VAE.dim_mult), VAE.num_res_blocks).to_other
    folders.write_component(folder / "vae", folders.vae_config_out(asdict(v.config)), rename(v.state_dict(), table))
    tensors = {k: x for k, x in e.state_dict().items() if k != "encoder.embed_tokens.weight"}
    config = folders.text_encoder_config_out(asdict(TEXT))
    folders.write_component(folder / "text_encoder", config, tensors, weights_name="model.safetensors")
    write_tokenizer(folder / "tokenizer")
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    scheduler |= {"use_flow_sigmas": True, "flow_shift": 5.0, "num_train_timesteps": 1000}
    folders.write_component(folder / "scheduler", scheduler, config_name="scheduler_config.json")
    folders.write_index(folder, {
        "transformer": ("diffusers", "WanTransformer3DModel"), "vae": ("diffusers", "AutoencoderKLWan"),
        "text_encoder": ("transformers", "UMT5EncoderModel"), "tokenizer": ("transformers", "T5TokenizerFast"),
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    })  # fmt: skip
    return folder
