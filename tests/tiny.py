"""Tiny, random, complete models of the whole Wan family, written anew for each test session.

``write(folder)`` is the text-to-video model in the Diffusers layout; ``write(folder, task, layout)`` any of ``TASKS``
in one of ``LAYOUTS``. Both layouts of a task hold the same numbers. diffusers' pipelines load what is written.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import tiny_names as names
import torch
from safetensors.torch import load_file, save_file

from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.models import umt5
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

sys.path.append(str(Path(__file__).parents[1]))  # for a script outside of pytest
from training import folders

from ditkit.nn.dtype_policy import dtype_policy

TRANSFORMER = WanConfig(dim=64, ffn_dim=112, num_heads=2, num_layers=2, text_dim=32, freq_dim=32)
VAE = WanVAEConfig(dim=4)
TEXT = umt5.UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
VAE22 = MappingProxyType({"dim": 4, "dec_dim": 6, "z_dim": 48})
CLIP = MappingProxyType(
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1, "image_size": 56,
     "patch_size": 14, "hidden_act": "gelu"}
)  # fmt: skip
CLIP_ROWS = 17  # one for the class and 4 x 4 patches
TASKS = MappingProxyType(
    {
        "t2v": {},
        "i2v": {"in_dim": 36, "image_dim": 64},
        "flf2v": {"in_dim": 36, "image_dim": 64, "image_tokens": 2 * CLIP_ROWS},
        "vace": {"num_layers": 3, "vace_layers": (0, 2)},
        "t2v_a14b": {},
        "i2v_a14b": {"in_dim": 36},
        "ti2v": {"in_dim": 48, "out_dim": 48},
    }
)  # what each transformer has other than that of t2v
LAYOUTS = ("diffusers", "native")
BOUNDARY = MappingProxyType({"t2v_a14b": 0.875, "i2v_a14b": 0.9})
PIPELINES = MappingProxyType(
    {"i2v": "WanImageToVideoPipeline", "flf2v": "WanImageToVideoPipeline", "i2v_a14b": "WanImageToVideoPipeline",
     "vace": "WanVACEPipeline"}
)  # fmt: skip
WORDS = "a red green blue circle square triangle moving left right up down on black gray background".split()  # noqa: SIM905


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every tensor gets numbers that matter: fan-in scaled weights, gains around 1, biases that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "emb_pos" in name:
            p.copy_(0.5 * noise)
        elif p.ndim >= 2 and "gamma" not in name and "modulation" not in name:
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


def built(sizes: WanConfig, tensors: dict[str, torch.Tensor], policy: str, dtype: torch.dtype) -> WanTransformer:
    """A transformer with these weights, each held in the dtype that the policy wants."""
    chosen = dtype_policy(policy, dtype)
    model = WanTransformer(sizes, chosen).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].to(chosen.weight_dtype(name))
    return model


def text_encoder(seed: int = 3, config: umt5.UMT5Config = TEXT) -> torch.nn.Module:
    return randomise(umt5.build_umt5(config).to_empty(device="cpu"), seed)


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


def config(task: str, **changes) -> WanConfig:
    """The sizes of a task's transformer, with changes of yours."""
    return replace(TRANSFORMER, **(TASKS[task] | changes))


def experts(task: str) -> list[WanTransformer]:
    """The transformers of a task; of two, the one for high noise is the first."""
    if task == "t2v":
        return [transformer()]
    return [transformer(1 + 10 * n, config(task)) for n in range(1 + (task in BOUNDARY))]


def latent_statistics22() -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the 5B model's latents: the official constants, which have four decimals."""
    io = load_file(Path(__file__).parent / "data/golden/vae/wan22/io.safetensors")
    mean, inverse = io["norm.mean"].double(), io["norm.inv_std"].double()
    return [round(float(x), 4) for x in mean], [round(float(1 / x), 4) for x in inverse]


def vae22(seed: int = 4) -> torch.nn.Module:
    """The VAE of the 5B model as diffusers' class; ``names.renamed(..., names.VAE22)`` gives official names."""
    from diffusers import AutoencoderKLWan

    mean, std = latent_statistics22()
    return randomise(AutoencoderKLWan(
        base_dim=VAE22["dim"], decoder_base_dim=VAE22["dec_dim"], z_dim=VAE22["z_dim"], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, scale_factor_temporal=4,
        latents_mean=mean, latents_std=std,
    ), seed)  # fmt: skip


def image_encoder(seed: int = 5) -> torch.nn.Module:
    """transformers' CLIPVisionModel, of which Wan uses all blocks but the last."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return randomise(bare(CLIPVisionModel(CLIPVisionConfig(**CLIP))), seed)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """transformers 4 has inside of its vision model what is the model itself in 5."""
    return getattr(model, "vision_model", model)


def write(folder: Path, task: str = "t2v", layout: str = "diffusers") -> Path:
    """The whole model of a task; diffusers' pipelines load it in their layout."""
    (_write_diffusers if layout == "diffusers" else _write_native)(Path(folder), task)
    return folder


def _text_tensors() -> dict[str, torch.Tensor]:
    return {k: x for k, x in text_encoder().state_dict().items() if k != "encoder.embed_tokens.weight"}


# --- the layout of diffusers


def _write_diffusers(folder: Path, task: str) -> None:
    kind = "WanVACETransformer3DModel" if task == "vace" else "WanTransformer3DModel"
    theirs = vae22() if task == "ti2v" else None  # needs diffusers, so before anything is written
    classes = {}
    for name, model in zip(("transformer", "transformer_2"), experts(task), strict=False):
        tensors = names.renamed(model.state_dict(), names.TRANSFORMER)
        folders.write_component(folder / name, transformer_json(model.config, kind), tensors)
        classes[name] = ("diffusers", kind)
    if theirs is not None:
        theirs.save_pretrained(folder / "vae")
    else:
        v = vae()
        table = vae_keys(len(VAE.dim_mult), VAE.num_res_blocks).to_other
        folders.write_component(
            folder / "vae", KINDS["wan_vae"].write_config("diffusers", asdict(v.config)), rename(v.state_dict(), table)
        )
    classes["vae"] = ("diffusers", "AutoencoderKLWan")
    text = KINDS["umt5"].write_config("transformers", asdict(TEXT))
    folders.write_component(folder / "text_encoder", text, _text_tensors(), weights_name="model.safetensors")
    classes["text_encoder"] = ("transformers", "UMT5EncoderModel")
    write_tokenizer(folder / "tokenizer")
    classes["tokenizer"] = ("transformers", "T5TokenizerFast")
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    scheduler |= {"use_flow_sigmas": True, "flow_shift": 5.0, "num_train_timesteps": 1000}
    folders.write_component(folder / "scheduler", scheduler, config_name="scheduler_config.json")
    classes["scheduler"] = ("diffusers", "UniPCMultistepScheduler")
    if "image_dim" in TASKS[task]:
        _write_clip(folder)
        classes["image_encoder"] = ("transformers", "CLIPVisionModel")
        classes["image_processor"] = ("transformers", "CLIPImageProcessor")
    values = {"boundary_ratio": BOUNDARY[task]} if task in BOUNDARY else {}
    values |= {"expand_timesteps": True} if task == "ti2v" else {}
    folders.write_index(folder, classes, PIPELINES.get(task, "WanPipeline"), values)


def transformer_json(sizes: WanConfig, kind: str) -> dict:
    """As diffusers' own ``save_pretrained`` writes it, a VACE config without the usual one's defaults included."""
    config = KINDS["wan"].write_config(
        "diffusers", asdict(replace(sizes, image_dim=None, image_tokens=None, vace_layers=()))
    )
    branch = {"image_dim": sizes.image_dim, "pos_embed_seq_len": sizes.image_tokens}
    branch["added_kv_proj_dim"] = None if sizes.image_dim is None else sizes.dim
    if sizes.vace_layers:
        branch |= {"vace_layers": list(sizes.vace_layers), "vace_in_channels": sizes.vace_in_dim}
    return config | branch | {"_class_name": kind}


def _write_clip(folder: Path) -> None:
    """The encoder with the prefix that published files have, though transformers 5 writes them without it."""
    tensors = {f"vision_model.{name}": tensor for name, tensor in image_encoder().state_dict().items()}
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "num_channels": 3}
    config |= {"layer_norm_eps": 1e-5, "attention_dropout": 0.0, "projection_dim": 24, "initializer_factor": 1.0}
    folders.write_component(folder / "image_encoder", config | CLIP, tensors, weights_name="model.safetensors")
    size = CLIP["image_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    folders.write_component(folder / "image_processor", processor, config_name="preprocessor_config.json")


# --- the official layout


def _write_native(folder: Path, task: str) -> None:
    models = experts(task)
    places = [folder / "high_noise_model", folder / "low_noise_model"] if len(models) == 2 else [folder]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for place, model in zip(places, models, strict=True):
        place.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), place / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(_native_json(model.config, task), indent=2) + "\n")
    torch.save(names.renamed(_text_tensors(), names.UMT5), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if task == "ti2v":
        torch.save(names.renamed(vae22().state_dict(), names.VAE22), folder / "Wan2.2_VAE.pth")
    else:
        torch.save(dict(vae().state_dict()), folder / "Wan2.1_VAE.pth")
    if "image_dim" in TASKS[task]:
        tensors = names.official_clip(image_encoder().state_dict())
        g = torch.Generator().manual_seed(6)
        tensors["visual.head"] = torch.randn(CLIP["hidden_size"], 24, generator=g)
        tensors["textual.token_embedding.weight"] = torch.randn(
            60, 32, generator=g
        )  # the text tower, which Wan ignores
        tensors["log_scale"] = torch.tensor(2.6592)
        torch.save(tensors, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")


def _native_json(sizes: WanConfig, task: str) -> dict:
    """The keys of the official files and ``text_dim``, which those leave at its default of 4096."""
    config = {
        "_class_name": "VaceWanModel" if sizes.vace_layers else "WanModel", "_diffusers_version": "0.33.0",
        "model_type": task.removesuffix("_a14b"), "dim": sizes.dim, "eps": sizes.eps, "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim, "in_dim": sizes.in_dim, "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers, "out_dim": sizes.out_dim, "text_len": sizes.text_len,
        "text_dim": sizes.text_dim,
    }  # fmt: skip
    if sizes.vace_layers:
        config |= {"vace_layers": list(sizes.vace_layers), "vace_in_dim": sizes.vace_in_dim}
    return config
