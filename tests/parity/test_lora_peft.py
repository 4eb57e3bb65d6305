"""LoRAs against peft's own layers and diffusers' own loader, on one small transformer in both implementations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import tiny_names
import torch
from safetensors.torch import save_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.lora.merge import Merged
from ditkit.checkpoints.lora.read import read_lora
from ditkit.nn.lora import lora_swaps, twin

peft = pytest.importorskip("peft")

CONFIG = replace(tiny.TRANSFORMER, image_dim=48)
PARTS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "add_k_proj", "add_v_proj", "proj_out",
         "condition_embedder.time_proj", "text_embedder.linear_1", "time_embedder.linear_2"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(11, CONFIG)


def theirs(model):
    from diffusers import WanTransformer3DModel

    c = model.config
    other = WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim, out_channels=c.out_dim,
        text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers, eps=c.eps,
        image_dim=c.image_dim, added_kv_proj_dim=c.dim,
    )  # fmt: skip
    other.load_state_dict(tiny_names.renamed(model.state_dict(), tiny_names.TRANSFORMER))
    return other.eval().requires_grad_(False)


def inputs():
    g = torch.Generator().manual_seed(5)
    latents, image = torch.randn(1, CONFIG.in_dim, 2, 4, 4, generator=g), torch.randn(1, 3, 48, generator=g)
    rows = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    rows[:, :5] = torch.randn(5, CONFIG.text_dim, generator=g)
    return latents, torch.tensor([700.0]), rows, image


@torch.no_grad()
def run_theirs(other):
    latents, timestep, rows, image = inputs()
    return other(latents, timestep, rows, encoder_hidden_states_image=image, return_dict=False)[0]


def run_ours(model):
    latents, timestep, rows, image = inputs()
    return model(latents, timestep, model.prepare_text(list(rows), image=image))


@torch.no_grad()
def fill(other, seed=1):
    """peft begins with a change of zero; make it one that matters."""
    g = torch.Generator().manual_seed(seed)
    for name, p in other.named_parameters():
        if "lora_magnitude" in name:
            p.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
        elif any(part in name for part in ("lora_", "hada_", "lokr_")):
            p.copy_(0.25 * torch.randn(p.shape, generator=g))


def check(model, source, wanted, tmp_path, strength=1.0, **options):
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    adapter = read_lora(source, shapes, **options)
    side = twin(model)
    for swap in lora_swaps([(adapter, strength)]):
        setattr(side, swap.name.split()[1], swap.make(getattr(side, swap.name.split()[1])))
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    merged = dict(Merged(TensorFiles(tmp_path / "base.safetensors"), [(adapter, strength)]))
    fused = tiny.built(CONFIG, merged, "wan", torch.float32)
    plain = run_ours(model)
    assert (plain - wanted).norm() / wanted.norm() > 1e-2
    for changed in (side, fused):
        assert (run_ours(changed) - wanted).norm() / wanted.norm() < 3e-5  # the timestep's angles are 3e-6 apart


KINDS = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rs-LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "patterns": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"blocks.1.attn2.to_v": 3}},
    ),
    "convolution": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["patch_embedding", "to_q"]}),
    "DoRA of a convolution": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["patch_embedding", "to_q"]},
    ),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 5}),
    "LoKr, both factored": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 8}),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # it takes a bias for a shard of DeepSpeed
@pytest.mark.parametrize("kind", KINDS)
def test_peft(kind, model, tmp_path):
    """A folder as peft saves it: tensors in its own spelling, settings beside them."""
    name, options = KINDS[kind]
    config = getattr(peft, name)(**{"target_modules": PARTS, **options})
    wrapped = peft.get_peft_model(theirs(model), config)
    fill(wrapped)
    wanted = run_theirs(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    check(model, TensorFiles(tmp_path / "adapter" / "adapter_model.safetensors"), wanted, tmp_path)


@pytest.fixture
def pipe(model):
    from diffusers import WanPipeline

    return WanPipeline(None, None, None, None, transformer=theirs(model))


def test_saved_by_diffusers(model, pipe, tmp_path):
    """With the settings in the file's own notes."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=7, target_modules=PARTS, use_rslora=True))
    fill(pipe.transformer)
    wanted = run_theirs(pipe.transformer)
    layers = get_peft_model_state_dict(pipe.transformer)
    notes = _collate_lora_metadata({"transformer": pipe.transformer})
    pipe.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers, **notes)
    source = TensorFiles(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert json.loads(source.metadata["lora_adapter_metadata"])["transformer.use_rslora"]
    check(model, source, wanted, tmp_path)


NATIVE = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
          "cross_attn.o", "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2")  # fmt: skip


def layers(model, modules, name_of, down, up, alpha=None):
    g, tensors = torch.Generator().manual_seed(2), {}
    for name in modules:
        o, i = model.get_submodule(name).weight.shape
        tensors[f"{name_of(name)}.{down}"] = torch.randn(4, i, generator=g) / i**0.5
        tensors[f"{name_of(name)}.{up}"] = 0.3 * torch.randn(o, 4, generator=g)
        if alpha is not None:
            tensors[f"{name_of(name)}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("family", ["comfy", "lightx2v", "musubi"])
def test_loaded_by_diffusers(family, model, pipe, tmp_path):
    """The layouts that diffusers converts itself."""
    modules = [f"blocks.{n}.{part}" for n in range(CONFIG.num_layers) for part in NATIVE]
    if family == "musubi":

        def flat(name):
            return f"lora_unet_{name.replace('.', '_')}"

        tensors = layers(model, modules, flat, "lora_down.weight", "lora_up.weight", 2.0)
    else:
        modules += ["time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
                    "head.head"] if family == "lightx2v" else []  # fmt: skip
        names = ("lora_A.weight", "lora_B.weight") if family == "comfy" else ("lora_down.weight", "lora_up.weight")
        tensors = layers(model, modules, lambda n: f"diffusion_model.{n}", *names)
    if family == "lightx2v":
        g = torch.Generator().manual_seed(7)
        for name in modules:
            size = model.get_submodule(name).bias.shape
            tensors[f"diffusion_model.{name}.diff_b"] = 0.2 * torch.randn(size, generator=g)
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="one")
    pipe.set_adapters(["one"], [0.7])
    wanted = run_theirs(pipe.transformer)
    check(model, TensorFiles(tmp_path / "lora.safetensors"), wanted, tmp_path, 0.7)


def test_what_diffusers_drops_is_kept_here(model, pipe, tmp_path):
    """Differences of norms and of modulation: its loader passes over them, so the result differs from ours."""
    modules = [f"blocks.{n}.{part}" for n in range(CONFIG.num_layers) for part in NATIVE]
    tensors = layers(model, modules, lambda n: f"diffusion_model.{n}", "lora_down.weight", "lora_up.weight")
    save_file(tensors, tmp_path / "plain.safetensors")
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.full((CONFIG.dim,), 0.5)
    tensors["diffusion_model.blocks.0.diff_m"] = torch.full((1, 6, CONFIG.dim), 0.5)
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    dropped = run_theirs(pipe.transformer)
    check(model, TensorFiles(tmp_path / "plain.safetensors"), dropped, tmp_path)
    changed = {k: v.clone() for k, v in model.state_dict().items()}
    changed["blocks.0.norm3.weight"] += 0.5
    changed["blocks.0.modulation"] += 0.5
    pipe.transformer.load_state_dict(
        {  # the base below diffusers' own LoRA layers
            name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            if name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            in pipe.transformer.state_dict()
            else name: value
            for name, value in tiny_names.renamed(changed, tiny_names.TRANSFORMER).items()
        },
        strict=False,
    )
    check(model, TensorFiles(tmp_path / "lora.safetensors"), run_theirs(pipe.transformer), tmp_path)
