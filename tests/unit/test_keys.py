"""Key tables against the names of the real files (golden) and of the real classes (diffusers, transformers)."""

import json
from pathlib import Path

import pytest
import torch

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.views.key_table import KeyTable, rename
from ditkit.errors import LoadError
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

GOLDEN = Path(__file__).parents[1] / "data/golden"


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_disk(path: str) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in TensorFiles(GOLDEN / path).tensors.items()}


def back(table: KeyTable) -> dict[str, str]:
    return {other: native for native, other in table.to_other.items()}


TABLES = [transformer_keys(0), transformer_keys(13), vae_keys(1, 1), vae_keys(4, 2), vae_keys(3, 3), umt5_keys(24)]


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_bijections(table):
    assert len(set(table.to_other.values())) == len(table.to_other)
    assert rename(rename(table.to_other, table.to_other), back(table)) == dict(table.to_other)


def test_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        transformer_keys(1).to_other["x"] = "y"


def test_an_unknown_name_is_reported_never_passed_through():
    names = {"head.head.weight": 1, "blocks.2.ffn.0.bias": 2, "blocks.0.self_attn.q.weight.x": 3, "lora": 4}
    with pytest.raises(LoadError) as error:
        rename(names, transformer_keys(2).to_other)
    assert "3 names are unknown (blocks.0.self_attn.q.weight.x, blocks.2.ffn.0.bias, lora)" in str(error.value)


def test_transformer_names_of_both_worlds():
    from diffusers import WanTransformer3DModel

    config = json.loads((GOLDEN / "transformer/wan21_t2v/config.json").read_text())
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["dim"] // config["num_heads"],
            in_channels=config["in_dim"],
            out_channels=config["out_dim"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
        )
    native = on_disk("transformer/wan21_t2v/diffusion_pytorch_model.safetensors")
    table = transformer_keys(config["num_layers"])
    assert rename(native, table.to_other) == shapes(model)
    assert rename(shapes(model), back(table)) == native
    assert native.keys() == table.to_other.keys(), "the table has names that no transformer has"


def test_vae_names_of_both_worlds():
    from diffusers import AutoencoderKLWan

    config = json.loads((GOLDEN / "vae/wan21/config.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=config["dim"], z_dim=config["z_dim"])
    native = on_disk("vae/wan21/Wan2.1_VAE.safetensors")
    table = vae_keys(len(config["dim_mult"]), config["num_res_blocks"])
    assert rename(native, table.to_other) == shapes(model)
    assert rename(shapes(model), back(table)) == native


@pytest.mark.parametrize(("mult", "temporal", "blocks"), [
    ((1, 2, 4, 4), (False, True, True), 2), ((1, 1, 1, 1), (True, True, False), 1), ((1, 2), (True,), 3),
])  # fmt: skip
def test_vae_names_for_other_depths(mult, temporal, blocks):
    """The grouping of the decoder's layers depends on the number of residual blocks."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        ours = WanVAE(WanVAEConfig(4, 2, mult, blocks, temporal, (0.0,) * 2, (1.0,) * 2))
        theirs = AutoencoderKLWan(
            4, None, 2, list(mult), blocks, [], list(temporal), 0.0, [0.0] * 2, [1.0] * 2,
            scale_factor_temporal=2 ** sum(temporal), scale_factor_spatial=2 ** (len(mult) - 1),
        )  # fmt: skip
    table = vae_keys(len(mult), blocks)
    assert rename(shapes(ours), table.to_other) == shapes(theirs)
    assert rename(shapes(theirs), back(table)) == shapes(ours)


def test_umt5_names_of_both_worlds():
    from transformers import UMT5Config, UMT5EncoderModel

    config = json.loads((GOLDEN / "umt5/config.json").read_text())
    theirs = UMT5Config(
        vocab_size=config["vocab_size"],
        d_model=config["dim"],
        d_kv=config["dim_attn"] // config["num_heads"],
        d_ff=config["dim_ffn"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(theirs)
    native = on_disk("umt5/models_t5_umt5-xxl-enc.safetensors")
    table = umt5_keys(config["num_layers"])
    expected = {name: shape for name, shape in shapes(model).items() if name not in UMT5_ALIASES}
    assert shapes(model).keys() - expected.keys() == UMT5_ALIASES.keys()
    assert rename(native, table.to_other) == expected
    assert native.keys() == table.to_other.keys()


def test_the_vae_survives_the_way_there_and_back(tmp_path):
    """Golden VAE: native names -> diffusers' names in a file -> native names, bit for bit."""
    from safetensors.torch import save_file

    table = vae_keys(4, 2)
    native = dict(TensorFiles(GOLDEN / "vae/wan21/Wan2.1_VAE.safetensors"))
    save_file(rename(native, table.to_other), tmp_path / "x.safetensors")
    again = rename(dict(TensorFiles(tmp_path)), back(table))
    assert again.keys() == native.keys()
    assert all(torch.equal(again[name], native[name]) for name in native)
