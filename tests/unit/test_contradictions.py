"""Settings about parts that lie elsewhere are heeded there or refused here."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import save_file

import ditkit
from ditkit.errors import SetupError

HOST = "http://127.0.0.1:9"
ALL = dict.fromkeys(("encode_text", "denoise", "decode_latents"), HOST)


@pytest.mark.parametrize(
    ("setup", "refused"),
    [
        ({"placement": {"encode_text": HOST}, "dtypes": {"text_encoder": "bfloat16"}}, "dtypes with text_encoder"),
        ({"placement": {"encode_text": HOST}, "backends": {"text_encoder": "torch"}}, "backends with text_encoder"),
        ({"placement": {"decode_latents": HOST}, "devices": {"vae": "cpu"}}, "devices with vae"),
        ({"placement": {"denoise": HOST}, "dtype_policy": "float32"}, "dtype_policy = 'float32'"),
        ({"placement": ALL, "dtype": "bfloat16"}, "dtype = 'bfloat16'"),
        ({"placement": ALL, "device": "cpu"}, "device = 'cpu'"),
        ({"placement": {"decode_latents": "process:cpu"}, "devices": {"vae": "cuda"}}, "devices with vae = 'cuda'"),
        ({"placement": {"decode_latents": "ray:cpu"}, "devices": {"vae": "cuda"}}, "devices with vae = 'cuda'"),
    ],
)  # fmt: skip
def test_what_nobody_would_heed_is_refused(tiny_model, setup, refused):
    with pytest.raises(SetupError, match=refused):
        ditkit.load(tiny_model, **setup)


@pytest.mark.parametrize(
    "setup",
    [
        {"placement": {"encode_text": HOST}, "dtype": "bfloat16"},  # the other parts heed it
        {"placement": {"denoise@2": HOST}, "dtype_policy": "float32"},  # the steps before
        {"placement": {"denoise": HOST}, "attention": "dense", "cache_text_kv": False},  # travel with the stage
        {"placement": {"decode_latents": HOST}, "vae_frames_per_chunk": 2},
        {"placement": {"decode_latents": "process:cpu"}, "devices": {"vae": "cpu"}},
        {"placement": {"decode_latents": "process"}, "dtypes": {"vae": "bfloat16"}},
        {"placement": dict.fromkeys(ALL, "process:cpu"), "device": "cpu", "dtype": "bfloat16"},
    ],
)
def test_what_is_heeded_somewhere_is_taken(tiny_model, setup):
    assert ditkit.load(tiny_model, **setup).setup.placement == setup["placement"]


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "lora.safetensors"
    name = "transformer.blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "transformer=", "both="])
def test_a_lora_for_a_transformer_that_is_elsewhere(tiny_model, lora, prefix):
    with pytest.raises(SetupError, match=f"loras with '{prefix}.* is at {HOST}"):
        ditkit.load(tiny_model, placement={"denoise": HOST}, loras=[prefix + lora])
    for place in ("process", "ray"):  # they read the same files
        assert ditkit.load(tiny_model, placement={"denoise": place}, loras=[prefix + lora]).setup.loras


def test_a_lora_for_one_of_two_experts(tmp_path, lora):
    folder = tiny.write(tmp_path / "two", "t2v_a14b")
    there = {"denoise.transformer_2": HOST}
    with pytest.raises(SetupError, match="loras with 'transformer_2="):
        ditkit.load(folder, placement=there, loras=[f"transformer_2={lora}"])
    assert ditkit.load(folder, placement=there, loras=[f"transformer={lora}"]).setup.loras
    assert ditkit.load(folder, placement=there, loras=[f"both={lora}"]).setup.loras, "the first one heeds it"
