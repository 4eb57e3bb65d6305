"""Opening a model: what is damaged or does not fit together is said before anything is computed."""

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
