"""Key tables against the real classes: all names and shapes of every official model, and the official outputs of golden
weights that went through a table into the classes of diffusers and transformers."""

import json
from math import prod
from pathlib import Path

import pytest
import tiny
import torch
from held import Held, shapes
from reference import rel
from safetensors.torch import load_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.kinds.clip import clip_keys
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae22_keys, vae_keys
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.models.wan import WanConfig, WanTransformer

GOLDEN = Path(__file__).parents[1] / "data/golden"
BIG = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
IMAGE = {"in_dim": 36, "image_dim": 1280}
# sizes, parameters, tensors of the published models
OFFICIAL = {
    "t2v 1.3B": (SMALL, 1_418_996_800, 825),
    "t2v 14B": (BIG, 14_288_491_584, 1095),
    "i2v 14B": (BIG | IMAGE, 16_394_878_784, 1303),
    "flf2v 14B": (BIG | IMAGE | {"image_tokens": 514}, 16_395_536_704, 1304),
    "vace 1.3B": (SMALL | {"vace_layers": tuple(range(0, 30, 2))}, 2_153_972_032, 1264),
    "vace 14B": (BIG | {"vace_layers": tuple(range(0, 40, 5))}, 17_337_592_896, 1331),
    "2.2 i2v A14B": (BIG | {"in_dim": 36}, 14_288_901_184, 1095),
    "2.2 ti2v 5B": (
        {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48},
        4_999_787_712, 825,
    ),
}  # fmt: skip


def diffusers_transformer(config: WanConfig):
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    given = {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.head_dim, "in_channels": config.in_dim,
        "out_channels": config.out_dim, "text_dim": config.text_dim, "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim, "num_layers": config.num_layers, "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "pos_embed_seq_len": config.image_tokens,
    }  # fmt: skip
    if config.vace_layers:
        given |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.vace_in_dim}
        return WanVACETransformer3DModel(**given)
    return WanTransformer3DModel(**given)


def both_ways(native, other, table):
    """Names and shapes of the two are each other's image, and the table has no name that neither has."""
    assert shapes(Mapped(native, table, "other").require_known()) == shapes(other)
    assert shapes(Mapped(other, table, "native").require_known()) == shapes(native)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_transformer(name):
    sizes, parameters, tensors = OFFICIAL[name]
    config = WanConfig(**sizes)
    with torch.device("meta"):
        native, other = Held(WanTransformer(config).state_dict()), Held(diffusers_transformer(config).state_dict())
    assert len(native.tensors) == tensors
    assert sum(map(prod, shapes(native).values())) == parameters
    table = KINDS["wan"].keys(vars(config))
    both_ways(native, other, table)
    assert len(table.rules) == tensors, "the table has names that this transformer has not"


def diffusers_vae(kind: str, dim: int, dec_dim: int | None, z_dim: int):
    from diffusers import AutoencoderKLWan

    if kind == "wan21":
        return AutoencoderKLWan(base_dim=dim, z_dim=z_dim)
    return AutoencoderKLWan(
        base_dim=dim, decoder_base_dim=dec_dim, z_dim=z_dim, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "sizes", "parameters", "tensors"), [
    ("wan21", (96, None, 16), 126_892_531, 194), ("wan22", (160, 256, 48), 704_688_668, 196),
])  # fmt: skip
def test_both_official_vaes(kind, sizes, parameters, tensors):
    """Their names are those of the small golden files: the depth is the same."""
    with torch.device("meta"):
        other = Held(diffusers_vae(kind, *sizes).state_dict())
    native = Mapped(other, VAES[kind][1], "native").require_known()
    assert (len(native.tensors), sum(map(prod, shapes(native).values()))) == (tensors, parameters)
    assert native.tensors.keys() == TensorFiles(GOLDEN / VAES[kind][0]).tensors.keys()
    assert shapes(Mapped(native, VAES[kind][1], "other")) == shapes(other)


VAES = {
    "wan21": ("vae/wan21/Wan2.1_VAE.safetensors", vae_keys(4, 2)),
    "wan22": ("vae/wan22/Wan2.2_VAE.safetensors", vae22_keys(4, 2)),
}


def test_the_official_text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        held = UMT5EncoderModel(sizes).state_dict()
    native = Mapped(Held(held), umt5_keys(24), "native").require_known()
    assert (len(native.tensors), sum(map(prod, shapes(native).values()))) == (242, 5_680_910_336)
    assert shapes(native)["blocks.23.pos_embedding.embedding.weight"] == (32, 64)
    other = {name: tuple(t.shape) for name, t in held.items() if name not in UMT5_ALIASES}
    assert shapes(Mapped(native, umt5_keys(24), "other")) == other


def vision_model(width: int, layers: int, heads: int, image: int, patch: int, projected: int | None = None, **more):
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=image, patch_size=patch, hidden_act="gelu", projection_dim=projected or 512, **more,
    )  # fmt: skip
    return tiny.bare(CLIPVisionModel(config)) if projected is None else CLIPVisionModelWithProjection(config)


def test_the_official_image_encoder():
    with torch.device("meta"):
        without = Held(vision_model(1280, 32, 16, 224, 14).state_dict())
        whole = Held(vision_model(1280, 32, 16, 224, 14, 1024).state_dict())
    native = Mapped(whole, clip_keys(32), "native").require_known()
    assert native.ignored == ("visual_projection.weight",)
    assert (len(native.tensors), sum(map(prod, shapes(native).values()))) == (391, 632_076_800 - 1280 * 1024)
    told = shapes(native)
    assert told["visual.cls_embedding"] == (1, 1, 1280)
    assert told["visual.pos_embedding"] == (1, 257, 1280)
    assert told["visual.transformer.31.attn.to_qkv.weight"] == (3840, 1280)
    again = shapes(Mapped(native, clip_keys(32, prefixed=True), "other"))
    assert again | {"visual_projection.weight": (1024, 1280)} == shapes(whole)
    mapped = Mapped(native, clip_keys(32), "other").require_known()
    assert shapes(mapped) == shapes(without)
    assert shapes(Mapped(whole, clip_keys(32), "other", of="other")) == shapes(without)


# --- golden weights: through the table into the real classes, and back

TRANSFORMERS = (
    "wan21_t2v", "wan21_t2v_head128", "wan21_i2v", "wan21_flf2v", "wan21_vace", "wan22_ti2v_5b",
    "wan22_t2v_a14b/high_noise_model", "wan22_t2v_a14b/low_noise_model", "wan22_i2v_a14b/high_noise_model",
)  # fmt: skip


def golden_transformer(folder: str) -> tuple[WanConfig, TensorFiles]:
    place = GOLDEN / "transformer" / folder
    raw = json.loads((place / "config.json").read_text())
    files = TensorFiles(place / "diffusion_pytorch_model.safetensors")
    told = {key: files.tensors[name].shape[1] for key, name in (
        ("image_dim", "img_emb.proj.1.weight"), ("image_tokens", "img_emb.emb_pos"),
    ) if name in files.tensors}  # fmt: skip
    names = WanConfig.__dataclass_fields__.keys() & raw.keys()
    return WanConfig(**({name: raw[name] for name in names} | told)), files


def filled(module: torch.nn.Module, tensors) -> torch.nn.Module:
    """Strictly, by torch's own loading."""
    module.load_state_dict({name: tensor.float() for name, tensor in tensors})
    return module.eval()


@pytest.mark.parametrize("folder", TRANSFORMERS)
@torch.inference_mode()
def test_golden_transformers_in_the_class_of_diffusers(folder):
    config, files = golden_transformer(folder)
    model = filled(diffusers_transformer(config), Mapped(files, KINDS["wan"].keys(vars(config)), "other"))
    name, _, expert = folder.partition("/")
    path = GOLDEN / "transformer" / name / "io.safetensors"
    io = {key.removeprefix("case0."): tensor for key, tensor in load_file(path).items() if key.startswith("case0.")}
    latents = torch.cat([io["latents"], io["y"]], 1) if "y" in io else io["latents"]
    text = torch.nn.functional.pad(io["context.0"], (0, 0, 0, 512 - len(io["context.0"])))[None]
    given = {"hidden_states": latents, "timestep": io["timestep"], "encoder_hidden_states": text, "return_dict": False}
    if "clip_fea" in io:
        given["encoder_hidden_states_image"] = io["clip_fea"]
    if "vace_context" in io:
        scale = json.loads(_metadata(path)["scalars"])["case0"]["vace_scale"]
        given |= {"control_hidden_states": io["vace_context"]}
        given |= {"control_hidden_states_scale": torch.full((len(config.vace_layers),), scale)}
    expected = io[f"{expert.removesuffix('_noise_model')}.output"] if expert else io["output"]
    assert rel(model(**given)[0], expected) <= 1e-5


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", VAES)
@torch.inference_mode()
def test_golden_vaes_in_the_class_of_diffusers(kind):
    config = json.loads((GOLDEN / f"vae/{kind}/config.json").read_text())
    file, table = VAES[kind]
    vae = diffusers_vae(kind, config["dim"], config.get("dec_dim"), config["z_dim"])
    vae = filled(vae, Mapped(TensorFiles(GOLDEN / file), table, "other"))
    io = load_file(GOLDEN / f"vae/{kind}/io.safetensors")
    mean = vae.encode(io["encode_T5.video"]).latent_dist.mean
    assert rel(mean, io["encode_T5.mean_raw"]) <= 1e-5
    raw = io["decode_F2.latents"] / io["norm.inv_std"].view(1, -1, 1, 1, 1) + io["norm.mean"].view(1, -1, 1, 1, 1)
    assert rel(vae.decode(raw).sample, io["decode_F2.video"].clamp(-1, 1)) <= 1e-5


@torch.inference_mode()
def test_the_golden_text_encoder_in_the_class_of_transformers():
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, tie_word_embeddings=False
    ))  # fmt: skip
    tensors = dict(Mapped(TensorFiles(GOLDEN / "umt5/models_t5_umt5-xxl-enc.safetensors"), umt5_keys(3), "other"))
    tensors |= {second: tensors[first] for second, first in UMT5_ALIASES.items()}
    model = filled(model, tensors.items())
    io = load_file(GOLDEN / "umt5/io.safetensors")
    out = model(input_ids=io["ids"], attention_mask=io["mask"]).last_hidden_state
    for i, length in enumerate(io["mask"].sum(1).tolist()):
        assert rel(out[i, :length], io[f"output.{i}"]) <= 1e-5


CLIP_FILE = "clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"


@torch.inference_mode()
def test_the_golden_image_encoder_in_the_class_of_transformers():
    mapped = Mapped(TensorFiles(GOLDEN / CLIP_FILE), clip_keys(3), "other").require_known()
    assert {name.split(".")[0] for name in mapped.ignored} == {"textual", "log_scale", "visual"}
    assert sum(name.startswith("visual.") for name in mapped.ignored) == 1
    model = filled(vision_model(64, 3, 4, 56, 14), mapped)
    io = load_file(GOLDEN / "clip/io.safetensors")
    states = []
    for layer in model.encoder.layers:  # releases differ in how they give hidden states
        layer.register_forward_hook(lambda _, __, out: states.append(out if isinstance(out, torch.Tensor) else out[0]))
    model(io["random.pixel_values"])
    assert rel(states[-2], io["random.output"]) <= 1e-5
    assert rel(states[-1], io["random.output_all_blocks"]) <= 1e-5


@pytest.mark.parametrize(("file", "table", "lost"), [
    *((f"transformer/{f}/diffusion_pytorch_model.safetensors", None, 0) for f in TRANSFORMERS),
    *((file, table, 0) for file, table in VAES.values()),
    ("umt5/models_t5_umt5-xxl-enc.safetensors", umt5_keys(3), 0),
    (CLIP_FILE, clip_keys(3), 25),
])  # fmt: skip
def test_native_to_other_to_native_is_bit_equal(file, table, lost, tmp_path):
    from safetensors.torch import save_file

    files = TensorFiles(GOLDEN / file)
    if table is None:
        table = KINDS["wan"].keys(vars(golden_transformer(file.split("/", 1)[1].rsplit("/", 1)[0])[0]))
    there = Mapped(files, table, "other").require_known()
    assert len(there.ignored) == lost
    save_file(dict(there), tmp_path / "model.safetensors")
    back = dict(Mapped(TensorFiles(tmp_path / "model.safetensors"), table, "native").require_known())
    assert back.keys() == files.tensors.keys() - set(there.ignored)
    assert all(torch.equal(back[name], files[name]) and back[name].dtype == files[name].dtype for name in back)


def test_the_module_has_the_names_of_the_golden_files():
    for folder in TRANSFORMERS:
        config, files = golden_transformer(folder)
        with torch.device("meta"):
            assert shapes(Held(WanTransformer(config).state_dict())) == shapes(files)
    assert transformer_keys(2).to_other.keys() == golden_transformer("wan21_t2v")[1].tensors.keys()
