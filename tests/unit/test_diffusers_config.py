"""Configs of the diffusers layout -> our fields: what is read, what is refused, and what contradicts the tensors."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training.folders import write_component, write_index

from ditkit.checkpoints.files.stored import TensorInfo
from ditkit.checkpoints.kinds.clip import clip_keys
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.kinds.wan import IMAGE_CLAIM, transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae22_keys, vae_keys
from ditkit.checkpoints.model.find import locate
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.errors import LoadError, OutputError
from ditkit.models.umt5 import UMT5Config, build_umt5
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

transformer_config = partial(KINDS["wan"].read_config, "diffusers")
transformer_config_out = partial(KINDS["wan"].write_config, "diffusers")
vae_config, vae_config_out = (
    partial(f, "diffusers") for f in (KINDS["wan_vae"].read_config, KINDS["wan_vae"].write_config)
)
vae22_config, vae22_config_out = (
    partial(f, "diffusers") for f in (KINDS["wan_vae22"].read_config, KINDS["wan_vae22"].write_config)
)
text_encoder_config = partial(KINDS["umt5"].read_config, "transformers")
text_encoder_config_out = partial(KINDS["umt5"].write_config, "transformers")
clip_config = partial(KINDS["clip"].read_config, "transformers")
clip_config_out = partial(KINDS["clip"].write_config, "transformers")
WAN = {
    "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "in_dim": 5, "out_dim": 7, "text_dim": 9, "freq_dim": 8,
    "eps": 1e-5, "patch_size": (1, 2, 2), "text_len": 512, "image_dim": None, "image_tokens": None, "vace_layers": (),
}  # fmt: skip
I2V = WAN | {"image_dim": 6, "image_tokens": 10}
VACE = WAN | {"num_layers": 4, "vace_layers": (0, 3), "vace_in_dim": 11}
VAE22 = {
    "dim": 4, "z_dim": 3, "dim_mult": (1, 2, 2), "num_res_blocks": 2, "temporal_downsample": (True, False),
    "latents_mean": (0.5, -1.0, 0.0), "latents_std": (2.0, 3.0, 1.0), "dec_dim": 6, "patch_size": 2,
}  # fmt: skip
CLIP = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12,
    "patch_size": 4, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
VAE = {
    "dim": 4, "z_dim": 2, "dim_mult": (1, 2, 3), "num_res_blocks": 1, "temporal_downsample": (True, False),
    "latents_mean": (0.5, -1.0), "latents_std": (2.0, 3.0),
}  # fmt: skip
UMT5 = {
    "vocab_size": 50, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 16, "relative_attention_max_distance": 64, "layer_norm_epsilon": 1e-6,
}  # fmt: skip


def facts(shapes: dict[str, torch.Size | tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", tuple(shape), Path("x"), 0, 0) for name, shape in shapes.items()}


def transformer_facts(fields: dict = WAN) -> dict[str, TensorInfo]:
    import diffusers

    config = transformer_config_out(fields)
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return facts({name: tensor.shape for name, tensor in model.state_dict().items()})


def vae_facts() -> dict[str, TensorInfo]:
    with torch.device("meta"):
        model = WanVAE(WanVAEConfig(**VAE))
    names = vae_keys(3, 1).to_other
    return facts({names[name]: tensor.shape for name, tensor in model.state_dict().items()})


def vae22_facts() -> dict[str, TensorInfo]:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(vae22_config_out(VAE22))
    return facts({name: tensor.shape for name, tensor in model.state_dict().items()})


def clip_facts() -> dict[str, TensorInfo]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = tiny.bare(CLIPVisionModel(CLIPVisionConfig(**CLIP)))
    return facts({name: tensor.shape for name, tensor in model.state_dict().items()})


def umt5_facts() -> dict[str, TensorInfo]:
    names = build_umt5(UMT5Config(**UMT5)).state_dict()
    return facts({name: tensor.shape for name, tensor in names.items() if name not in UMT5_ALIASES})


KINDS = {
    "transformer": (transformer_config, transformer_config_out(WAN), WAN, transformer_facts),
    "i2v": (transformer_config, transformer_config_out(I2V), I2V, lambda: transformer_facts(I2V)),
    "vace": (transformer_config, transformer_config_out(VACE), VACE, lambda: transformer_facts(VACE)),
    "vae": (vae_config, vae_config_out(VAE), VAE, vae_facts),
    "vae22": (vae22_config, vae22_config_out(VAE22), VAE22, vae22_facts),
    "clip": (clip_config, clip_config_out(CLIP), CLIP, clip_facts),
    "text_encoder": (text_encoder_config, text_encoder_config_out(UMT5), UMT5, umt5_facts),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    read, config, fields, tensors = KINDS[kind]
    config = json.loads(json.dumps(config))
    assert read(config) == fields
    assert read(config, tensors()) == fields


def test_fields_are_those_of_our_classes():
    assert WanVAEConfig(**vae_config(vae_config_out(VAE))) == WanVAEConfig(**VAE)
    assert UMT5Config(**text_encoder_config(text_encoder_config_out(UMT5))) == UMT5Config(**UMT5)


@pytest.mark.slow
def test_absent_keys_have_the_defaults_of_diffusers_and_transformers():
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config as TheirConfig

    with torch.device("meta"):
        transformer, vae = dict(WanTransformer3DModel().config), dict(AutoencoderKLWan().config)
    assert transformer_config({}) == transformer_config(json.loads(json.dumps(transformer)))
    assert WanVAEConfig(**vae_config({})) == WanVAEConfig(**vae_config(json.loads(json.dumps(vae)))) == WanVAEConfig()
    theirs = TheirConfig()
    assert all(getattr(theirs, key) == value for key, value in text_encoder_config({}).items())
    assert text_encoder_config({}) == text_encoder_config(json.loads(theirs.to_json_string()))


def test_the_published_text_encoder_config():
    """The keys of the official folders (transformers 4 wrote them)."""
    config = {
        "architectures": ["UMT5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
        "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
        "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "umt5", "num_decoder_layers": 24,
        "num_heads": 64, "num_layers": 24, "output_past": True, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "scalable_attention": True,
        "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0", "use_cache": True, "vocab_size": 256384,
    }  # fmt: skip
    assert UMT5Config(**text_encoder_config(config)) == UMT5Config()


@pytest.mark.parametrize(("kind", "change", "parts"), [
    ("transformer", {"_class_name": "WanAnimateTransformer3DModel"}, ("it is of 'WanAnimateTransformer3DModel'",)),
    ("transformer", {"qk_norm": "rms_norm"}, ("qk_norm is 'rms_norm'", "only 'rms_norm_across_heads'")),
    ("transformer", {"qk_norm": None}, ("qk_norm is None",)),
    ("transformer", {"patch_size": [1, 4, 4]}, ("patch_size is (1, 4, 4)", "only (1, 2, 2)")),
    ("transformer", {"cross_attn_norm": False}, ("cross_attn_norm is False",)),
    ("transformer", {"cross_attn_norm": 1}, ("cross_attn_norm is 1,",)),
    ("transformer", {"image_dim": 1280}, ("image_dim is 1280 and added_kv_proj_dim is None",)),
    ("transformer", {"added_kv_proj_dim": 24}, ("image_dim is None and added_kv_proj_dim is 24",)),
    ("transformer", {"pos_embed_seq_len": 514}, ("pos_embed_seq_len is 514 and image_dim is null",)),
    ("transformer", {"vace_layers": [0]}, ("vace_layers is (0,), and only None or ()",)),
    ("i2v", {"added_kv_proj_dim": 12}, ("added_kv_proj_dim is 12, and only the width 24",)),
    ("i2v", {"image_dim": "6"}, ("image_dim is '6', neither null nor a whole number",)),
    ("vace", {"vace_layers": [0, "3"]}, ("vace_layers is [0, '3'], not a list of whole numbers",)),
    ("transformer", {"num_layers": "3"}, ("num_layers is '3', not a whole number",)),
    ("transformer", {"num_layers": 0}, ("num_layers is 0",)),
    ("transformer", {"num_layers": True}, ("num_layers is True",)),
    ("transformer", {"out_channels": "7"}, ("out_channels is '7'",)),
    ("transformer", {"eps": None}, ("eps is None, not a finite number",)),
    ("transformer", {"eps": float("nan")}, ("eps is nan",)),
    ("transformer", {"quantization_config": {"quant_method": "x"}}, ("it has a quantization_config",)),
    ("vae", {"_class_name": "AutoencoderKL"}, ("it is of 'AutoencoderKL'",)),
    ("vae", {"is_residual": True}, ("is_residual is True, and only False",)),
    ("vae", {"patch_size": 2}, ("patch_size is 2, and only None or 1",)),
    ("vae", {"attn_scales": [0.5]}, ("attn_scales is (0.5,), and only ()",)),
    ("vae", {"in_channels": 12}, ("in_channels is 12",)),
    ("vae", {"decoder_base_dim": 6}, ("decoder_base_dim is 6, and only None or 4",)),
    ("vae", {"dim_mult": [1, 2]}, ("temperal_downsample has 2 values where dim_mult has 2",)),
    ("vae", {"dim_mult": [1, 2.0, 3]}, ("dim_mult is [1, 2.0, 3], not a list of whole numbers",)),
    ("vae", {"temperal_downsample": [0, 1]}, ("temperal_downsample is [0, 1], not a list of true and false",)),
    ("vae", {"latents_mean": [0.0]}, ("latents_mean has 1 values where z_dim is 2",)),
    ("vae", {"latents_std": [1.0, 0.0]}, ("latents_std has the value 0.0",)),
    ("vae", {"scale_factor_spatial": 8}, ("scale_factor_spatial is 8, and only 4",)),
    ("vae22", {"is_residual": False}, ("is_residual is False, and only True",)),
    ("vae22", {"in_channels": 3}, ("in_channels is 3, and only 12",)),
    ("vae22", {"scale_factor_spatial": 4}, ("scale_factor_spatial is 4, and only 8",)),
    ("vae22", {"latents_mean": [0.0]}, ("latents_mean has 1 values where z_dim is 3",)),
    ("clip", {"model_type": "siglip"}, ("it is of 'siglip'",)),
    ("clip", {"model_type": "clip"}, ("has no vision_config",)),
    ("clip", {"hidden_act": "relu"}, ("hidden_act is 'relu', and only 'quick_gelu' or 'gelu'",)),
    ("clip", {"num_channels": 1}, ("num_channels is 1",)),
    ("text_encoder", {"model_type": "t5"}, ("it is of 't5'",)),
    ("text_encoder", {"feed_forward_proj": "relu"}, ("feed_forward_proj is 'relu'",)),
    ("text_encoder", {"d_model": 12.0}, ("d_model is 12.0",)),
    ("text_encoder", {"quantization_config": {}}, ("it has a quantization_config",)),
])  # fmt: skip
def test_what_we_cannot_compute_is_refused(kind, change, parts):
    read, config, _, _ = KINDS[kind]
    with pytest.raises(LoadError) as error:
        read(config | change)
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_keys_without_effect_are_ignored():
    assert (
        transformer_config(transformer_config_out(WAN) | {"_name_or_path": "x", "rope_max_seq_len": 7, "x": None})
        == WAN
    )
    assert vae_config(vae_config_out(VAE) | {"dropout": 0.1, "decoder_base_dim": 4, "patch_size": 1}) == VAE
    assert transformer_config(transformer_config_out(WAN) | {"out_channels": None})["out_dim"] == WAN["in_dim"]


@pytest.mark.parametrize(("kind", "change", "parts"), [
    ("transformer", {"num_attention_heads": 3}, ("num_attention_heads 3 x attention_head_dim 12 is 36", "24 in patch")),
    ("transformer", {"attention_head_dim": 6}, ("is 12 in the config and 24 in patch_embedding.weight",)),
    ("transformer", {"in_channels": 16}, ("in_channels is 16 in the config and 5 in patch_embedding.weight",)),
    ("transformer", {"out_channels": 5}, ("out_channels is 5 in the config and 7 in proj_out.weight",)),
    ("transformer", {"text_dim": 4096}, ("text_dim is 4096 in the config and 9",)),
    ("transformer", {"freq_dim": 256}, ("freq_dim is 256 in the config and 8",)),
    ("transformer", {"ffn_dim": 41}, ("ffn_dim is 41 in the config and 40",)),
    ("transformer", {"num_layers": 4}, ("num_layers is 4 in the config and 3",)),
    ("transformer", {"num_layers": 2}, ("num_layers is 2 in the config and 3",)),
    ("i2v", {"image_dim": 8}, ("image_dim is 8 in the config and 6 in condition_embedder.image_embedder.norm1",)),
    ("i2v", {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None},
     ("image_dim is absent in the config and 6",)),
    ("i2v", {"pos_embed_seq_len": None}, ("pos_embed_seq_len is absent in the config and 10",)),
    ("vace", {"vace_layers": [0, 1, 2]}, ("the length of vace_layers is 3 in the config and 2",)),
    ("vace", {"vace_in_channels": 96}, ("vace_in_channels is 96 in the config and 11 in vace_patch_embedding",)),
    ("vace", {"vace_layers": []}, ("the length of vace_layers is 0 in the config and 2",)),
    ("vae", {"base_dim": 6}, ("base_dim is 6 in the config and 4",)),
    ("vae", {"z_dim": 1, "latents_mean": [0], "latents_std": [1]}, ("z_dim is 1 in the config and 2",)),
    ("vae", {"dim_mult": [1, 2, 4]}, ("dim_mult is [1, 2, 4] in the config and [1, 2, 3]",)),
    ("vae", {"num_res_blocks": 2}, ("num_res_blocks is 2 in the config and 1",)),
    ("vae", {"dim_mult": [1, 3], "temperal_downsample": [True], "scale_factor_spatial": 2},
     ("dim_mult is [1, 3] in the config and [1, 2, 3]",)),
    ("vae", {"temperal_downsample": [False, True]}, 
     ("temperal_downsample is [False, True] in the config and [True, False]",)),
    ("vae22", {"decoder_base_dim": 8}, ("decoder_base_dim is 8 in the config and 6 in decoder.conv_in.weight",)),
    ("vae22", {"temperal_downsample": [False, True]}, ("temperal_downsample is [False, True] in the config",)),
    ("vae22", {"num_res_blocks": 1}, ("num_res_blocks is 1 in the config and 2",)),
    ("clip", {"hidden_size": 16}, ("hidden_size is 16 in the config and 12 in embeddings.patch_embedding.weight",)),
    ("clip", {"image_size": 16}, ("image_size is 16 in the config and 12",)),
    ("clip", {"num_hidden_layers": 3}, ("num_hidden_layers is 3 in the config and 2",)),
    ("text_encoder", {"vocab_size": 51}, ("vocab_size is 51 in the config and 50",)),
    ("text_encoder", {"d_model": 16}, ("d_model is 16 in the config and 12",)),
    ("text_encoder", {"num_heads": 5, "d_kv": 3}, ("num_heads is 5 in the config and 3",)),
    ("text_encoder", {"d_kv": 4}, ("d_kv is 4 in the config and 5 in",)),
    ("text_encoder", {"d_ff": 16}, ("d_ff is 16 in the config and 20",)),
    ("text_encoder", {"num_layers": 24}, ("num_layers is 24 in the config and 2",)),
    ("text_encoder", {"relative_attention_num_buckets": 32}, ("num_buckets is 32 in the config and 16",)),
])  # fmt: skip
def test_a_config_that_contradicts_the_tensors_is_refused_with_both_numbers(kind, change, parts):
    read, config, _, tensors = KINDS[kind]
    with pytest.raises(LoadError) as error:
        read(config | change, tensors())
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_a_claimed_image_branch_is_a_contradiction_unless_a_rule_allows_it():
    """A published 5B config claims one that the weights do not have."""
    claims = transformer_config_out(WAN) | {"image_dim": 1280, "added_kv_proj_dim": 24}
    tensors = transformer_facts()
    with pytest.raises(LoadError) as error:
        transformer_config(claims, tensors)
    assert "image_dim is 1280 in the config and absent" in str(error.value)
    assert "set image_dim and added_kv_proj_dim to null in it, or allow image_claim" in str(error.value)
    assert transformer_config(claims, tensors, rules=(IMAGE_CLAIM,)) == WAN
    extra = facts({"blocks.0.attn2.add_k_proj.weight": (24, 24)})
    with pytest.raises(LoadError, match=r"no condition_embedder.image_embedder.norm1.weight"):
        transformer_config(claims, tensors | extra, rules=(IMAGE_CLAIM,))
    with pytest.raises(LoadError, match="image_dim is 1280 in the config and 6"):
        transformer_config(claims | {"pos_embed_seq_len": 10}, transformer_facts(I2V), rules=(IMAGE_CLAIM,))


def test_a_whole_clip_model_has_its_vision_config_inside():
    inner = clip_config_out(CLIP) | {"num_beams": 1, "torchscript": False, "top_k": 50, "bad_words_ids": None}
    whole = {"model_type": "clip", "projection_dim": 8, "text_config": {"hidden_size": 5}, "vision_config": inner}
    assert clip_config(whole) == clip_config(whole, clip_facts()) == CLIP
    with pytest.raises(LoadError, match=r"'num_beamss' of config\.json is unknown"):
        clip_config(whole | {"vision_config": inner | {"num_beamss": 1}}, rules=("strict_config",))


def test_absent_keys_of_clip_and_vace_have_their_defaults():
    from diffusers import WanVACETransformer3DModel
    from transformers import CLIPVisionConfig

    with torch.device("meta"):
        vace = dict(WanVACETransformer3DModel(num_layers=36, ffn_dim=8, num_attention_heads=1, text_dim=8).config)
    kind = {"_class_name": "WanVACETransformer3DModel"}
    read = transformer_config(json.loads(json.dumps(vace)) | kind)
    missing = transformer_config(kind | {"num_layers": 36, "ffn_dim": 8, "num_attention_heads": 1, "text_dim": 8})
    assert read == missing
    assert read["vace_layers"] == (0, 5, 10, 15, 20, 25, 30, 35)
    assert clip_config({}) == clip_config(json.loads(CLIPVisionConfig().to_json_string()))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_layout_are_refused(kind):
    read, config, _, _ = KINDS[kind]
    tables = {
        "transformer": transformer_keys(3), "i2v": transformer_keys(3, image=True), "vace": transformer_keys(4, vace=2),
        "vae": vae_keys(3, 1), "vae22": vae22_keys(3, 2), "text_encoder": umt5_keys(2), "clip": clip_keys(2),
    }  # fmt: skip
    native = [name for rule in tables[kind].rules for name in rule.native]
    with pytest.raises(LoadError):
        read(config, facts(dict.fromkeys(native, (1, 1))))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(LoadError) as error:
        locate(folder).check()
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_the_index_and_its_errors(tmp_path):
    refused(tmp_path / "no", "there is no such file or folder")
    file = tmp_path / "model_index.json"
    file.write_text("{")
    refused(tmp_path, "not valid JSON")
    file.write_text('{"vae": ["diffusers"]}')
    refused(tmp_path, "gives vae as ['diffusers']")
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False,
    }  # fmt: skip
    file.write_text(json.dumps(index))
    assert any(
        f"it needs a Wan VAE, and there is none in {tmp_path / 'vae'}" in str(p) for p in locate(tmp_path).problems
    )
    (tmp_path / "vae").mkdir()
    found = Manifest.open(tmp_path)
    assert {name: place.resolve() for name, place in found.components.items()} == {"vae": tmp_path / "vae"}
    assert found.values == {"expand_timesteps": False}
    refused(tmp_path, "it holds no .safetensors file")


def test_writing_is_all_or_nothing(tmp_path):
    good = {"x": torch.ones(2, 3)}
    write_component(tmp_path / "m/vae", {"a": 1}, good)
    assert sorted(p.name for p in (tmp_path / "m/vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(OutputError, match="it exists already"):
        write_component(tmp_path / "m/vae", {"a": 2}, {})
    assert json.loads((tmp_path / "m/vae/config.json").read_text()) == {"a": 1}
    assert torch.equal(load_file(tmp_path / "m/vae/diffusion_pytorch_model.safetensors")["x"], good["x"])
    with pytest.raises(ValueError, match="JSON"):
        write_component(tmp_path / "m/other", {"a": float("nan")}, good)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["vae"], "a failed write left something behind"
    with pytest.raises(OutputError, match="there is no transformer"):
        write_index(tmp_path / "m", {"vae": ("diffusers", "A"), "transformer": ("diffusers", "B")})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"not a directory|file exists"):
        write_component(tmp_path / "file/vae", {}, good)


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path):
    value = torch.arange(6.0).reshape(2, 3).T
    write_component(tmp_path / "x", None, {"x": value})
    assert torch.equal(load_file(tmp_path / "x/diffusion_pytorch_model.safetensors")["x"], value)
