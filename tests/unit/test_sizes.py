"""Sizes from names and shapes: those of every published model, and what a config may not contradict."""

from dataclasses import asdict

import pytest
import torch

from ditkit.checkpoints.kinds.clip import clip_sizes
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import umt5_sizes
from ditkit.checkpoints.kinds.wan import task_of, transformer_sizes
from ditkit.checkpoints.kinds.wan_vae import taehv_sizes, vae_sizes
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import Facts, View
from ditkit.errors import LoadError
from ditkit.models import clip, umt5
from ditkit.models.published import OFFICIAL
from ditkit.models.taehv import TAEHV, TAEHVConfig
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAE22, WanVAE22Config, WanVAEConfig

SMALL = WanConfig(dim=96, ffn_dim=8, num_heads=3, num_layers=1, text_dim=8, freq_dim=8)
SAID = {
    "_class_name": "WanModel", "dim": 96, "ffn_dim": 8, "num_heads": 3, "num_layers": 1, "text_dim": 8, "freq_dim": 8,
}  # fmt: skip
VACE = {"_class_name": "VaceWanModel", "model_type": "vace", "vace_layers": [0]}
TWO_LEVELS = WanVAEConfig(dim=8, dim_mult=(1, 3), num_res_blocks=1, temporal_downsample=(True,))


class Shapes(View):
    """The facts of a module without memory."""

    path = "x"
    notes = ()

    def __init__(self, module):
        self.tensors = {name: Facts("F32", tuple(t.shape)) for name, t in module.state_dict().items()}


def on_meta(cls, config):
    with torch.device("meta"):
        return Shapes(cls(config))


def without(fields, *names):
    return {key: value for key, value in fields.items() if key not in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_every_published_transformer(name, layout):
    config = asdict(OFFICIAL[name].config)
    source = on_meta(WanTransformer, OFFICIAL[name].config)
    if layout == "diffusers":
        source = Mapped(source, KINDS["wan"].keys(config), "other")
    found = KINDS["wan"].read_config(layout, None, source.tensors)
    if not config["vace_layers"]:
        config = without(config, "vace_in_dim")
    assert {**found, "vace_layers": found.get("vace_layers", ())} == without(config, "text_len", "eps")
    assert task_of(found) == name.split("-")[1]


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("config", [WanVAEConfig(), TWO_LEVELS])
def test_vaes_of_2_1(layout, config):
    source = on_meta(WanVAE, config)
    if layout == "diffusers":
        source = Mapped(source, KINDS["wan_vae"].keys(asdict(config)), "other")
    assert KINDS["wan_vae"].read_config(layout, None, source.tensors) == without(
        asdict(config), "latents_mean", "latents_std"
    )


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("config", [WanVAE22Config(), WanVAE22Config(dim=8, dec_dim=12)])
def test_vaes_of_2_2(layout, config):
    source = on_meta(WanVAE22, config)
    if layout == "diffusers":
        source = Mapped(source, KINDS["wan_vae22"].keys(asdict(config)), "other")
    found = KINDS["wan_vae22"].read_config(layout, None, source.tensors)
    assert found == without(asdict(config), "latents_mean", "latents_std")


@pytest.mark.parametrize("layout", ["native", "transformers"])
def test_umt5_xxl(layout):
    config = umt5.UMT5Config()
    source = Shapes(umt5.build_umt5(config))
    if layout == "native":
        source.tensors = without(source.tensors, "encoder.embed_tokens.weight")
        source = Mapped(source, KINDS["umt5"].keys(asdict(config)), "native")
    found = KINDS["umt5"].read_config(layout, None, source.tensors)
    assert umt5.UMT5Config(**found) == config


def test_the_official_image_encoder_and_its_smaller_relatives():
    config = clip.CLIPConfig()
    source = Shapes(clip.build_clip(config))
    assert clip.CLIPConfig(**KINDS["clip"].read_config("transformers", None, source.tensors)) == config
    native = Mapped(source, KINDS["clip"].keys(asdict(config)), "native")
    assert clip.CLIPConfig(**KINDS["clip"].read_config("native", None, native.tensors)) == config
    large = clip.CLIPConfig(1024, 4096, 24, 16, 224, 14, "quick_gelu")
    sizes = clip_sizes(Shapes(clip.build_clip(large)).tensors)
    assert sizes.fields | sizes.assumed == without(asdict(large), "hidden_act", "layer_norm_eps")
    with pytest.raises(LoadError, match="shapes do not tell hidden_act, and there is no config"):
        KINDS["clip"].read_config("transformers", None, Shapes(clip.build_clip(large)).tensors)


@pytest.mark.parametrize("config", [
    TAEHVConfig(), TAEHVConfig(z_dim=48, patch_size=2),
    TAEHVConfig(z_dim=48, patch_size=2, variant="super", decoder_widths=(512, 256, 128, 64)),
])  # fmt: skip
def test_tiny_vaes(config):
    found = KINDS["taehv"].read_config("native", None, on_meta(TAEHV, config).tensors)
    assert TAEHVConfig(**found) == config
    assert set(taehv_sizes(on_meta(TAEHV, config).tensors).fields) == asdict(config).keys() - {"temporal_upsample"}


def test_heads_are_128_wide_or_said_by_a_config():
    tensors = on_meta(WanTransformer, SMALL).tensors
    with pytest.raises(LoadError, match=r"shapes do not tell num_heads, and there is no config. Put the model's"):
        KINDS["wan"].read_config("native", None, tensors)
    assert KINDS["wan"].read_config("native", SAID, tensors)["num_heads"] == 3
    wide = WanConfig(dim=256, ffn_dim=8, num_heads=2, num_layers=1, text_dim=8, freq_dim=8)
    assert KINDS["wan"].read_config("native", None, on_meta(WanTransformer, wide).tensors)["num_heads"] == 2


@pytest.mark.parametrize(("change", "found"), [
    ({"dim": 128}, "dim is 128 in the config and 96 in patch_embedding.weight"),
    ({"num_layers": 3}, "num_layers is 3 in the config and 1 in the names of the blocks"),
    ({"text_dim": 9}, "text_dim is 9 in the config and 8 in text_embedding.0.weight"),
    ({"in_dim": 36}, "in_dim is 36 in the config and 16"),
    ({"model_type": "i2v"}, "its model_type is i2v and the tensors are those of t2v"),
    ({"model_type": "s2v"}, "its model_type is 's2v', and only t2v, i2v, flf2v, vace, ti2v are supported"),
    ({"window_size": [8, 8]}, "window_size is (8, 8), and only (-1, -1)"),
    ({"vace_layers": [0]}, "vace_layers is (0,), and only None or () is supported"),
    ({"quantization_config": {}}, "it has a quantization_config"),
    (VACE, "the length of vace_layers is 1 in the config and 0"),
    ({"_class_name": "WanVAE"}, "it is of 'WanVAE'"),
])  # fmt: skip
def test_a_native_config_may_not_contradict_the_tensors(change, found):
    with pytest.raises(LoadError) as error:
        KINDS["wan"].read_config("native", SAID | change, on_meta(WanTransformer, SMALL).tensors)
    assert found in str(error.value)


def test_hints_that_are_not_evenly_spread_need_a_config():
    odd = WanConfig(dim=128, ffn_dim=8, num_heads=1, num_layers=5, text_dim=8, freq_dim=8, vace_layers=(0, 1, 4))
    tensors = on_meta(WanTransformer, odd).tensors
    assert transformer_sizes(tensors).lengths == {"vace_layers": 3}
    with pytest.raises(LoadError, match="shapes do not tell vace_layers"):
        KINDS["wan"].read_config("native", None, tensors)


@pytest.mark.parametrize(("read", "tensors", "found"), [
    (transformer_sizes, {"patch_embedding.weight": (8, 16, 2, 2)}, "has the shape [8, 16, 2, 2], not 5 axes"),
    (transformer_sizes, {}, "the weights have no patch_embedding.weight"),
    (vae_sizes, {"encoder.conv1.weight": (4, 3, 3, 3, 3)}, "the weights have no conv2.weight"),
    (umt5_sizes, {"shared.weight": (9, 4)}, "have no encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    (clip_sizes, {"embeddings.patch_embedding.weight": (8, 3, 2, 2), "embeddings.position_embedding.weight": (6, 8)},
     "has 6 rows, not one more than a square"),
])  # fmt: skip
def test_tensors_that_cannot_be_read(read, tensors, found):
    with pytest.raises(LoadError) as error:
        read({name: Facts("F32", shape) for name, shape in tensors.items()})
    assert found in str(error.value)
