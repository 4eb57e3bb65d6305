"""Opening a model: what is damaged or does not fit together is said before anything is computed."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.errors import LoadError

WEIGHTS = {
    "transformer": ("diffusion_pytorch_model.safetensors", "blocks.1.ffn.net.2.bias"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    "text_encoder": ("model.safetensors", "encoder.final_layer_norm.weight"),
}


@pytest.fixture
def copied(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, part: str, value: float) -> None:
    """One number of one tensor gets another value; everything else stays."""
    file, name = WEIGHTS[part]
    tensors = load_file(folder / part / file)
    tensors[name][1] = value
    save_file(tensors, folder / part / file)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copied, part, value):
    change(copied, part, value)
    with pytest.raises(LoadError, match=f"{WEIGHTS[part][1]} holds infinite or undefined numbers"):
        ditkit.load(copied).components[part]


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("text_encoder", "d_model", 48, "text_dim of the transformer is 32 and d_model of the text encoder is 48"),
        ("transformer", "in_channels", 36, "in_channels of the transformer is 36 and z_dim of the VAE is 16"),
        ("transformer", "out_channels", 32, "in_channels of the transformer is 16 and its out_channels is 32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_at_once(copied, part, key, value, said):
    file = copied / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(LoadError, match=said):
        ditkit.load(copied)
