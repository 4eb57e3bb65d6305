"""Folders go both ways: what diffusers saves loads here, and what is written here loads in diffusers, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from training.folders import write_component, write_index

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.checkpoints.views.key_table import rename
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.errors import LoadError
from ditkit.models.encoders import UMT5TextEncoder
from ditkit.models.text import WanTokenizer
from ditkit.models.umt5 import UMT5Config
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

WAN = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=16, freq_dim=8)
VAE = WanVAEConfig(dim=4)
UMT5 = UMT5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return module.eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def fields(config) -> dict:
    return {key: getattr(config, key) for key in config.__dataclass_fields__}


def their_models() -> dict[str, nn.Module]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    return {
        "transformer": randomize(
            WanTransformer3DModel.from_config(KINDS["wan"].write_config("diffusers", fields(WAN)))
        ),
        "vae": randomize(AutoencoderKLWan.from_config(KINDS["wan_vae"].write_config("diffusers", fields(VAE)))),
        "text_encoder": randomize(UMT5EncoderModel(TheirConfig(**fields(UMT5)))),
    }


def load_ours(folder: Path) -> dict[str, nn.Module]:
    """What build will do: config -> module on meta -> strict load under our names."""
    files = {name: TensorFiles(folder / name) for name in ("transformer", "vae", "text_encoder")}
    configs = {name: read_json(folder / name / "config.json") for name in files}
    wan = WanConfig(**KINDS["wan"].read_config("diffusers", configs["transformer"], files["transformer"].tensors))
    vae = WanVAEConfig(**KINDS["wan_vae"].read_config("diffusers", configs["vae"], files["vae"].tensors))
    umt5 = UMT5Config(
        **KINDS["umt5"].read_config("transformers", configs["text_encoder"], files["text_encoder"].tensors)
    )
    with torch.device("meta"):
        modules = {"transformer": WanTransformer(wan), "vae": WanVAE(vae)}
    load_into(modules["transformer"], Mapped(files["transformer"], transformer_keys(wan.num_layers), "native"))
    load_into(modules["vae"], Mapped(files["vae"], vae_keys(len(vae.dim_mult), vae.num_res_blocks), "native"))
    modules["text_encoder"] = UMT5TextEncoder.load(umt5, files["text_encoder"], dtype=torch.float32).model
    return modules


def in_their_names(modules: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    vae = vae_keys(len(VAE.dim_mult), VAE.num_res_blocks)
    return {
        "transformer": rename(modules["transformer"].state_dict(), transformer_keys(WAN.num_layers).to_other),
        "vae": rename(modules["vae"].state_dict(), vae.to_other),
        "text_encoder": modules["text_encoder"].state_dict(),
    }


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_what_diffusers_saves_loads_here(tmp_path, shard):
    theirs = their_models()
    for name, model in theirs.items():
        model.save_pretrained(tmp_path / name, **({"max_shard_size": shard} if shard else {}))
    shards = [len(TensorFiles(tmp_path / name).files) for name in theirs]
    assert min(shards) > 1 if shard else shards == [1, 1, 1]
    ours = in_their_names(load_ours(tmp_path))
    assert all(same(ours[name], theirs[name].state_dict()) for name in theirs)


def test_a_variant_that_diffusers_saves_loads_here(tmp_path):
    vae = their_models()["vae"].half()
    vae.save_pretrained(tmp_path, variant="fp16")
    assert same(dict(TensorFiles(tmp_path, variant="fp16")), vae.state_dict())
    with pytest.raises(LoadError, match=r"other variants \(fp16\)"):
        TensorFiles(tmp_path)
    vae.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    assert same(dict(TensorFiles(tmp_path / "shards", variant="fp16")), vae.state_dict())


def test_r3_a_shard_that_is_lost_fails_the_load(tmp_path):
    model = their_models()["transformer"]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(LoadError, match="1 of them are not there"):
        TensorFiles(tmp_path)


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words, in the manner of umt5-xxl."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -2.0), ("▁circle", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return folder


def write_folder(folder: Path) -> dict[str, nn.Module]:
    modules = {
        "transformer": randomize(WanTransformer(WAN), 2),
        "vae": randomize(WanVAE(VAE), 3),
        "text_encoder": randomize(their_models()["text_encoder"], 4),
    }
    tensors = in_their_names(modules)
    own = {name: tensor for name, tensor in tensors["text_encoder"].items() if name not in UMT5_ALIASES}
    write_component(folder / "transformer", KINDS["wan"].write_config("diffusers", fields(WAN)), tensors["transformer"])
    write_component(folder / "vae", KINDS["wan_vae"].write_config("diffusers", fields(VAE)), tensors["vae"])
    write_component(
        folder / "text_encoder",
        KINDS["umt5"].write_config("transformers", fields(UMT5)),
        own,
        weights_name="model.safetensors",
    )
    source = save_tokenizer(folder.parent / "tokenizer-source")
    write_component(folder / "tokenizer", None, files=sorted(source.iterdir()))
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 3.0, "num_train_timesteps": 1000,
    }  # fmt: skip
    write_component(folder / "scheduler", scheduler, config_name="scheduler_config.json")
    write_index(
        folder,
        {
            "transformer": ("diffusers", "WanTransformer3DModel"),
            "vae": ("diffusers", "AutoencoderKLWan"),
            "text_encoder": ("transformers", "UMT5EncoderModel"),
            "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
            "scheduler": ("diffusers", "UniPCMultistepScheduler"),
        },
        values={"boundary_ratio": None, "expand_timesteps": False},
    )
    return modules


def test_what_is_written_here_runs_in_diffusers(tmp_path):
    from diffusers import WanPipeline

    folder = tmp_path / "model"
    modules = write_folder(folder)
    pipe = WanPipeline.from_pretrained(folder)
    written = in_their_names(modules)
    for name in ("transformer", "vae", "text_encoder"):
        assert same(getattr(pipe, name).state_dict(), written[name]), name
    said = json.loads(json.dumps(dict(pipe.transformer.config)))
    assert {key: said[key] for key in KINDS["wan"].write_config("diffusers", fields(WAN))} == KINDS["wan"].write_config(
        "diffusers", fields(WAN)
    )
    said = json.loads(json.dumps(dict(pipe.vae.config)))
    assert {key: said[key] for key in KINDS["wan_vae"].write_config("diffusers", fields(VAE))} == KINDS[
        "wan_vae"
    ].write_config("diffusers", fields(VAE))
    assert WanTokenizer(folder / "tokenizer")(["a red circle"])[0][0] == pipe.tokenizer("a red circle").input_ids
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle", height=16, width=32, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 5, 3, 16, 32)
    assert torch.isfinite(video).all()


def test_what_is_written_here_loads_here(tmp_path):
    folder = tmp_path / "model"
    modules = write_folder(folder)
    index = Manifest.open(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert index.components["vae"].resolve() == folder / "vae"
    loaded = load_ours(folder)
    assert all(same(loaded[name].state_dict(), modules[name].state_dict()) for name in modules)


def test_the_loaded_vae_computes_what_theirs_computes(tmp_path):
    """With statistics of its own, which travel in the config."""
    theirs = their_models()
    theirs["vae"].register_to_config(latents_mean=[0.25] * 16, latents_std=[2.0] * 16)
    for name, model in theirs.items():
        model.save_pretrained(tmp_path / name)
    vae = load_ours(tmp_path)["vae"]
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = (theirs["vae"].encode(video).latent_dist.mode() - 0.25) / 2
        latents = vae.encode(video)
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_native_names_load_too():
    """The golden files of the official code: names and layout as published, no table needed."""
    golden = Path(__file__).parents[1] / "data/golden"
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(dim=5))
    files = TensorFiles(golden / "vae/wan21/Wan2.1_VAE.safetensors")
    load_into(vae, files)
    assert same(vae.state_dict(), dict(files))
    table = umt5_keys(3)
    files = TensorFiles(golden / "umt5/models_t5_umt5-xxl-enc.safetensors")
    encoder = UMT5TextEncoder.load(UMT5Config(320, 64, 16, 160, 3, 4), Mapped(files, table, "other"), torch.float32)
    state = {name: t for name, t in encoder.model.state_dict().items() if name not in UMT5_ALIASES}
    assert same(state, rename(dict(files), table.to_other))
