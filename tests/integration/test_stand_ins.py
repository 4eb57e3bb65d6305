"""A model whose parts come from many places and formats, run as a whole: quantised weights, LoRAs on them, a tiny VAE
in the place of the real one or for previews, and what such a run tells about itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from reference import rel
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.errors import LoadError, SetupError

GOLDEN = Path(__file__).parents[1] / "data/golden"
REQUEST = {"prompt": "a red circle", "width": 32, "height": 32, "frames": 5, "steps": 3, "seed": 3}
WIDE = {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 32}  # every row a whole number of 32-blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("parts") / "t2v")


@pytest.fixture(scope="module")
def plain(model):
    return ditkit.load(model)


def weights() -> dict[str, torch.Tensor]:
    """The transformer of ``model`` under native names."""
    return {name: x.clone() for name, x in tiny.transformer().state_dict().items()}


def is_matrix(name: str, x: torch.Tensor) -> bool:
    return x.ndim == 2 and "modulation" not in name and name.startswith("blocks.")


def as_fp8(folder: Path) -> Path:
    """Scaled fp8 as ComfyUI writes it, with its prefix."""
    out, prefix = {}, "model.diffusion_model."
    for name, x in weights().items():
        if is_matrix(name, x):
            scale = x.abs().max() / 448
            out[prefix + name] = (x / scale).to(torch.float8_e4m3fn)
            out[prefix + name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            out[prefix + name] = x
    out["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(out, folder / "fp8.safetensors")
    return folder / "fp8.safetensors"


def as_gguf(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    file = folder / "q8.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    for name, x in weights().items():
        fits = is_matrix(name, x) and x.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def a_lora(folder: Path, seed: int = 5) -> Path:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, x in weights().items():
        if is_matrix(name, x) and "self_attn" in name:
            path = "diffusion_model." + name.removesuffix(".weight")
            out[f"{path}.lora_down.weight"] = torch.randn(2, x.shape[1], generator=g) * 0.2
            out[f"{path}.lora_up.weight"] = torch.randn(x.shape[0], 2, generator=g) * 0.2
            out[f"{path}.alpha"] = torch.tensor(1.0)
    save_file(out, folder / "lora.safetensors")
    return folder / "lora.safetensors"


FORMATS = {"fp8_scaled": as_fp8, "gguf Q8_0": as_gguf}


def configured(file: Path, model: Path) -> Path:
    """The head count is in no tensor: a config of its own lies beside the weights."""
    (file.parent / "config.json").write_text((model / "transformer" / "config.json").read_text())
    return file


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_quantised_transformer_in_the_place_of_the_models_own(model, plain, tmp_path, quantization):
    file = configured(FORMATS[quantization](tmp_path), model)
    pipe = ditkit.load(model, components={"transformer": str(file)})
    result, reference = pipe(**REQUEST), plain(**REQUEST)
    facts = result.receipt["components"]["transformer"]
    assert facts["quantization"] == quantization
    assert facts["files"].keys() == {file.name}
    error = rel(result.state["latents"], reference.state["latents"])
    assert 1e-4 < error < 0.2, "numbers of 8 bits, and of these weights"
    assert pipe.components["vae"].fingerprint == plain.components["vae"].fingerprint


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("mode", ["side", "fused"])
def test_a_lora_on_quantised_weights(model, tmp_path, quantization, mode):
    """It stopped working elsewhere, silently (WanVideoWrapper 859)."""
    file, lora = configured(FORMATS[quantization](tmp_path), model), a_lora(tmp_path)
    where = {"components": {"transformer": str(file)}}
    base = ditkit.load(model, **where)(**REQUEST)
    pipe = ditkit.load(model, loras=[f"{lora}:0.8"], lora_mode=mode, **where)
    adapted = pipe(**REQUEST)
    change = rel(adapted.state["latents"], base.state["latents"])
    assert change > 1e-3
    # The same delta, added by hand to the dequantised numbers.
    own = dict(ditkit.load(model, **where).components["transformer"].state_dict())
    for name in [n for n in own if is_matrix(n, own[n]) and "self_attn" in n]:
        pair = load_file(lora)
        path = "diffusion_model." + name.removesuffix(".weight")
        up, down = pair[f"{path}.lora_up.weight"].double(), pair[f"{path}.lora_down.weight"].double()
        own[name] = (own[name].double() + 0.8 * 0.5 * up @ down).float()
    by_hand = ditkit.load(model, **where)
    by_hand.components["transformer"].load_state_dict(own)
    assert rel(adapted.state["latents"], by_hand(**REQUEST).state["latents"]) <= 1e-5
    assert (
        ditkit.load(model, loras=[f"{lora}:0"], lora_mode=mode, **where)(**REQUEST)
        .state["latents"]
        .equal(base.state["latents"])
    )
    (told,) = adapted.receipt["components"]["transformer"]["loras"]
    assert (told["file"], told["strength"], told["mode"], told["tensors"]) == (lora.name, 0.8, mode, 8)


def test_a_lora_with_and_without_prints_and_copies(model, plain, tmp_path):
    lora = a_lora(tmp_path)
    adapted = ditkit.load(model, loras=[str(lora)], share_with=plain)
    before = plain(**REQUEST).state["latents"]
    changed = adapted(**REQUEST)
    assert adapted.components["transformer"] is not plain.components["transformer"]
    assert adapted.components["vae"] is plain.components["vae"]
    assert changed.state["weights"]["transformer"] != plain(**REQUEST).state["weights"]["transformer"]
    assert plain(**REQUEST).state["latents"].equal(before), "the plain pipe is untouched by the other's LoRA"


def test_which_of_two_experts_a_lora_is_for_must_be_said(tmp_path):
    folder = tiny.write(tmp_path / "a14b", "t2v_a14b")
    lora = a_lora(tmp_path)
    with pytest.raises(SetupError, match="two transformers and the file does not say which"):
        ditkit.load(folder, loras=[str(lora)])
    request = REQUEST | {"steps": 4}
    base = ditkit.load(folder)(**request).state["latents"]
    low, high, both = (
        ditkit.load(folder, loras=[f"{which}={lora}"])(**request).state["latents"]
        for which in ("transformer_2", "transformer", "both")
    )
    for one, other in ((base, low), (base, high), (low, high), (low, both), (high, both)):
        assert not one.equal(other)
    with pytest.raises(SetupError, match="has no transformer_2"):
        ditkit.load(tiny.write(tmp_path / "t2v"), loras=[f"transformer_2={lora}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("nowhere.safetensors", "there is no file"), ("LORA:inf", "strength is inf"), ("LORA:nan", "strength is nan")],
)
def test_loras_that_cannot_be(model, tmp_path, text, said):
    with pytest.raises(SetupError, match=said):
        ditkit.load(model, loras=[text.replace("LORA", str(a_lora(tmp_path)))])


def test_a_tiny_vae_as_draft_and_for_previews(model, plain):
    file = GOLDEN / "taehv/taew2_1_tiny.safetensors"
    draft = ditkit.load(model, components={"vae": str(file)}, share_with=plain)
    result = draft(**REQUEST)
    assert result.video.shape == (5, 32, 32, 3)
    assert result.state["latents"].equal(plain(**REQUEST).state["latents"]), "only the decoding is another"
    assert result.receipt["components"]["vae"]["class"] == "TAEHV"
    seen = ditkit.load(model, components={"preview_decoder": str(file)})
    look = seen.look()
    picture = look(result.state["latents"][:, :, :1])
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - result.video[0]).max() <= 1, "the same decoder, one frame"


def test_stand_ins_that_cannot_be(model, tmp_path):
    with pytest.raises(SetupError, match="did you mean 'vae'"):
        ditkit.load(model, components={"vea": "x"})
    with pytest.raises(LoadError, match="there is nothing of that name"):
        ditkit.load(model, components={"vae": str(tmp_path / "nothing.safetensors")})
    with pytest.raises(LoadError, match="its tensors are those of wan"):
        ditkit.load(model, components={"vae": str(model / "transformer")})
    wrong = GOLDEN / "vae/wan22/Wan2.2_VAE.safetensors"
    with pytest.raises(LoadError, match="latent channels"):
        ditkit.load(model, components={"vae": str(wrong)})


def test_one_of_several_state_dicts_is_named(model, plain, tmp_path):
    """Training checkpoints that no rule knows: the user says which weights are meant, and which they were is told."""
    one, other = weights(), {name: x * 0.5 for name, x in weights().items()}
    file = tmp_path / "run #3.pt"
    torch.save({"student": one, "teacher": other}, file)
    configured(file, model)
    with pytest.raises(LoadError, match=r"2 state dicts .*FILE#ENTRY"):
        ditkit.load(model, components={"transformer": str(file)})
    student = ditkit.load(model, components={"transformer": f"{file}#student"})
    teacher = ditkit.load(model, components={"transformer": f"{file}#teacher"})
    assert student(**REQUEST).state["latents"].equal(plain(**REQUEST).state["latents"])
    assert not teacher(**REQUEST).state["latents"].equal(plain(**REQUEST).state["latents"])
    assert student.model.identity != teacher.model.identity
    with pytest.raises(LoadError, match="did you mean 'teacher'"):
        ditkit.load(model, components={"transformer": f"{file}#teachr"})


def test_what_a_bare_vae_does_not_say_is_told(model, tmp_path):
    """A VAE trained anew has other statistics; without its config the colours would be wrong and nobody would know."""
    lone = tmp_path / "vae.safetensors"
    save_file(tiny.vae().state_dict(), lone)
    (note,) = ditkit.load(model, components={"vae": str(lone)}).model.parts["vae"].notes
    assert "the official ones are taken" in note
    assert ditkit.load(model).model.parts["vae"].notes == ()
