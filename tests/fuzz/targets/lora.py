"""LoRA files of every family of names: put beside the weights, merged into them, inspected."""

from __future__ import annotations

import json
import struct

import torch
from safetensors.torch import save

from ditkit.assembly import Components
from ditkit.setup import Setup

from .. import bases
from ..mutate import as_json, bytes_mutated, odd, put, tree_mutated
from ..watch import command

NAMED = ("inspect",)
WIDTH, RANK = 64, 4
SETTINGS = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.rank_pattern": {"blocks.0": 2},
            "transformer.alpha_pattern": {"x": 1}, "transformer.use_rslora": True, "r": 4, "lora_alpha": 8}  # fmt: skip
NAMES = (
    "lora_unet_blocks_9_self_attn_q.lora_down.weight", "lora_unet_.lora_down.weight", "a", "x.hada_w1_a", "..",
    "blocks.0.self_attn.q.lora_A.weight", "lora_te_x.lora_up.weight", "blocks.0.self_attn.q.lora_mid.weight",
    "lora_unet_blocks_0_self_attn_q.dora_scale", "blocks.99999999999999999999.self_attn.q.lora_A.weight",
    "lora_unet_blocks_" + "0_" * 200 + "q.alpha", "\x1b[31mx.lora_A.weight", "blocks.0.diff_b", "head.head.diff",
    "transformer.single_lora_A.weight", "lora_unet_blocks_0_ffn_0.lora_down.weight", "diffusion_model.lora_A.weight",
)  # fmt: skip
REGEXES = ("((.*)*)*!", "(?:(?:.|.)*)+!", "[", "*", "(", "blocks.0|x", "a{99999}", "(?P<a>", ".*" * 30)


def _pair(name, down, up):
    return {f"{name}.{down}": torch.randn(RANK, WIDTH), f"{name}.{up}": torch.randn(WIDTH, RANK)}


def prepare(folder):
    global MODEL, PIPE, BASES, RAW
    torch.manual_seed(0)
    MODEL, PIPE = bases.model(folder, "t2v", "diffusers"), bases.pipeline(folder, "t2v")
    kohya, peft = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
    BASES = [
        {**_pair("lora_unet_blocks_0_self_attn_q", *kohya), "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(4.0),
         **_pair("lora_unet_blocks_1_cross_attn_k", *kohya)},
        {**_pair("transformer.blocks.0.attn1.to_q", *peft), **_pair("transformer.blocks.1.attn2.to_v", *peft)},
        {**_pair("diffusion_model.blocks.0.self_attn.q", *peft), 
         "diffusion_model.blocks.0.norm3.diff": torch.randn(WIDTH),
         "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(WIDTH)},
        {**_pair("base_model.model.blocks.0.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
         "blocks.0.self_attn.k.lora_magnitude_vector": torch.randn(WIDTH)},
    ]  # fmt: skip
    notes = {"ss_network_alpha": "4", "ss_network_dim": "4", "lora_adapter_metadata": json.dumps(SETTINGS)}
    RAW = [save(base, metadata=notes) for base in BASES]


def _tensors(rng, tensors):
    for _ in range(rng.choice((1, 1, 2, 4))):
        name, how = rng.choice(list(tensors)), rng.randrange(8)
        if how == 0:
            tensors[rng.choice(NAMES)] = tensors.pop(name)
        elif how == 1:
            tensors[name] = rng.choice((
                torch.zeros(0), torch.zeros(0, 4), torch.tensor(0.0), torch.full((4, 4), float("nan")),
                torch.ones(1, 1, 1, 1, 1),
                torch.ones(4, 64, 3, 3), torch.ones(4, dtype=torch.int64), torch.ones(2, dtype=torch.bool),
                torch.ones(4, 64).to(torch.float8_e4m3fn), torch.ones(4, 64, dtype=torch.complex64),
            ))  # fmt: skip
        elif how == 2 and len(tensors) > 1:
            del tensors[name]
        elif how == 3:
            tensors[rng.choice(NAMES)] = torch.randn(rng.choice((1, 4)), rng.choice((1, 4, 64)))
        elif how == 4:
            tensors[name] = tensors[name].reshape(-1)
        elif how == 5:
            alpha = rng.choice(
                (torch.tensor(float("inf")), torch.tensor(0), torch.ones(3), torch.tensor([[1.0]]), torch.tensor(True))
            )
            tensors[name.rpartition(".")[0] + rng.choice((".alpha", ".alpha.weight", ".scale"))] = alpha
        elif how == 6:
            tensors[name] = torch.randn(rng.choice((1, 5, 1000)), rng.choice((1, 64, 65)))
        else:
            tensors[name] = tensors[name].double()
    return tensors


def make(rng, folder) -> str:
    number, how = rng.randrange(len(BASES)), rng.choice(("bytes", "header", "tensors", "tensors", "notes", "notes"))
    if how == "bytes":
        data = bytes_mutated(rng, RAW[number], 16)[0]
    elif how == "header":
        (size,) = struct.unpack("<Q", RAW[number][:8])
        header = as_json(tree_mutated(rng, json.loads(RAW[number][8 : 8 + size]))[0])
        data = struct.pack("<Q", len(header)) + header + RAW[number][8 + size :]
    elif how == "tensors":
        tensors = _tensors(rng, dict(BASES[number]))
        data = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    else:
        settings = tree_mutated(rng, SETTINGS)[0]
        if rng.random() < 0.2 and isinstance(settings, dict):
            settings["transformer.rank_pattern"] = {rng.choice(REGEXES): rng.choice((4, odd(rng)))}
        text = as_json(settings).decode("utf-8", "replace")
        alpha = rng.choice(("nan", "inf", "x", "", "1e400", "-1", "0", "None", "4"))
        module = rng.choice(("networks.lora", "lycoris.kohya", ""))
        data = save(
            BASES[number],
            metadata={"lora_adapter_metadata": text, "ss_network_alpha": alpha, "ss_network_module": module},
        )
        if rng.random() < 0.3:
            put(folder / "adapter_config.json", text)
    put(folder / "weights.safetensors", data)
    strength = rng.choice(("", "", ":0.5", ":0", ":-1", ":nan", ":inf", ":1e400", ":x", ":", "#a", ":0.5:0.5"))
    return rng.choice((*[f"side{strength}"] * 8, *[f"fused{strength}"] * 8, "inspect"))


def run(folder, how):
    path = folder / "weights.safetensors"
    if how == "inspect":
        command("inspect", path, "--model", MODEL)
        return
    mode = "side" if how.startswith("side") else "fused"
    setup = Setup.of({"model": str(MODEL), "loras": [f"{path}{how.removeprefix(mode)}"], "lora_mode": mode})
    components = Components(PIPE.model, setup)
    components["transformer"]
    components.fingerprint_of("transformer")
