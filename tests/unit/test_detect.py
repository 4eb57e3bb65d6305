"""What files are, told by their content: every kind, layout and wrapping, under names that say something else."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_names as names
import torch
from safetensors.torch import load_file, save_file

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.kinds.detect import recognise
from ditkit.errors import LoadError

GOLDEN = Path(__file__).parents[1] / "data/golden"
MISLEADING = "wan2.2_ti2v_5B_vae_lora_low_noise_fp8_e4m3fn_diffusers.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny whole models: task -> layout -> folder."""
    at = tmp_path_factory.mktemp("models")
    tasks = ("t2v", "i2v", "flf2v", "vace", "i2v_a14b", "ti2v")
    return {task: {layout: tiny.write(at / layout / task, task, layout) for layout in tiny.LAYOUTS} for task in tasks}


def native(folders, task="t2v"):
    folder = folders[task]["native"]
    folder = folder / "high_noise_model" if task.endswith("a14b") else folder
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def weights(folder):
    """The one file of a component's folder."""
    return next(iter(folder.glob("*.safetensors")))


def saved(tmp_path, tensors, metadata=None):
    file = tmp_path / MISLEADING
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata)
    return file


def pickled(tmp_path, value):
    torch.save(value, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def clip_tensors():
    return tiny.image_encoder().state_dict()


def fp8(tensors):
    big = {k for k, v in tensors.items() if v.ndim == 2 and "blocks" in k}
    return {k: v.to(torch.float8_e4m3fn) if k in big else v for k, v in tensors.items()}


def scaled(tensors, scale="scale_weight"):
    q = fp8(tensors)
    one = {k.replace(".weight", f".{scale}"): torch.tensor(1.0) for k, v in q.items() if v.element_size() == 1}
    return {**q, **one}


def comfy(tensors):
    q = scaled(tensors, "weight_scale")
    setting = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    layers = [k.removesuffix(".weight") for k, v in q.items() if v.element_size() == 1]
    return {**q, **{f"{layer}.comfy_quant": setting.clone() for layer in layers}}


def gguf_file(tmp_path, tensors):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    for name, tensor in tensors.items():
        x = tensor.float().numpy()
        if x.ndim == 2 and "blocks" in name and x.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        elif x.ndim == 5:
            writer.add_tensor(name, x.reshape(x.shape[0], -1))
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(x.shape))
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


CASES = {
    "native t2v": (lambda f, t: saved(t, native(f)), "wan", "native", {"variant": "t2v"}),
    "native i2v": (lambda f, t: saved(t, native(f, "i2v")), "wan", "native", {"variant": "i2v", "family": "Wan 2.1"}),
    "native flf2v": (lambda f, t: saved(t, native(f, "flf2v")), "wan", "native", {"variant": "flf2v"}),
    "native vace": (lambda f, t: saved(t, native(f, "vace")), "wan", "native", {"variant": "vace"}),
    "i2v without CLIP": (
        lambda f, t: saved(t, native(f, "i2v_a14b")), "wan", "native", {"variant": "i2v", "family": "Wan 2.2"},
    ),
    "native ti2v": (lambda f, t: saved(t, native(f, "ti2v")), "wan", "native", {"variant": "ti2v"}),
    "diffusers t2v": (
        lambda f, t: saved(t, load_file(weights(f["t2v"]["diffusers"] / "transformer"))), "wan", "diffusers",
        {"variant": "t2v"},
    ),
    "diffusers flf2v": (
        lambda f, t: saved(t, load_file(weights(f["flf2v"]["diffusers"] / "transformer"))), "wan", "diffusers",
        {"variant": "flf2v"},
    ),
    "diffusers vace": (
        lambda f, t: saved(t, load_file(weights(f["vace"]["diffusers"] / "transformer"))), "wan", "diffusers",
        {"variant": "vace"},
    ),
    "ComfyUI": (
        lambda f, t: saved(t, prefixed(native(f), "model.diffusion_model.")), "wan", "native",
        {"prefix": "model.diffusion_model."},
    ),
    "other prefix": (
        lambda f, t: saved(t, prefixed(native(f), "diffusion_model.")), "wan", "native", {"prefix": "diffusion_model."},
    ),
    "Self-Forcing": (
        lambda f, t: pickled(t, dict.fromkeys(("generator", "generator_ema"), prefixed(native(f), "model."))),
        "wan", "native", {"prefix": "model.", "variant": "t2v"},
    ),
    "nested": (lambda f, t: pickled(t, {"state_dict": native(f), "step": 3}), "wan", "native", {}),
    "16 bits": (
        lambda f, t: saved(t, {k: v.bfloat16() for k, v in native(f).items()}), "wan", "native", {"quantization": None},
    ),
    "plain fp8": (lambda f, t: saved(t, fp8(native(f))), "wan", "native", {"quantization": "fp8"}),
    "scaled fp8": (
        lambda f, t: saved(t, prefixed(scaled(native(f)), "model.diffusion_model.") | {"scaled_fp8": torch.zeros(2)}),
        "wan", "native", {"quantization": "fp8_scaled", "prefix": "model.diffusion_model."},
    ),
    "comfy_quant": (lambda f, t: saved(t, comfy(native(f))), "wan", "native", {"quantization": "fp8_scaled"}),
    "GGUF": (lambda f, t: gguf_file(t, native(f)), "wan", "native", {"quantization": "gguf Q8_0", "variant": "t2v"}),
    "VAE 2.1, wan": (
        lambda f, t: shutil.copy(f["t2v"]["native"] / "Wan2.1_VAE.pth", t / "a.bin"), "wan_vae", "native", {},
    ),
    "VAE 2.1, diffusers": (
        lambda f, t: saved(t, load_file(weights(f["t2v"]["diffusers"] / "vae"))), "wan_vae", "diffusers", {},
    ),
    "VAE 2.2, wan": (
        lambda f, t: shutil.copy(f["ti2v"]["native"] / "Wan2.2_VAE.pth", t / "Wan2.1_VAE.pth"),
        "wan_vae22", "native", {},
    ),
    "VAE 2.2, diffusers": (
        lambda f, t: saved(t, load_file(weights(f["ti2v"]["diffusers"] / "vae"))), "wan_vae22", "diffusers", {},
    ),
    "UMT5, wan": (
        lambda f, t: shutil.copy(f["t2v"]["native"] / "models_t5_umt5-xxl-enc-bf16.pth", t / "x.pt"),
        "umt5", "native", {},
    ),
    "UMT5, ComfyUI": (
        lambda f, t: saved(t, tiny._text_tensors() | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}),
        "umt5", "transformers", {},
    ),
    "CLIP, wan": (
        lambda f, t: shutil.copy(next(f["i2v"]["native"].glob("models_clip*")), t / "x.ckpt"), "clip", "native", {},
    ),
    "CLIP with prefix": (lambda f, t: saved(t, prefixed(clip_tensors(), "vision_model.")), "clip", "transformers", {}),
    "CLIP of transformers 5": (lambda f, t: saved(t, clip_tensors()), "clip", "transformers", {}),
    "whole CLIP": (
        lambda f, t: saved(t, prefixed(clip_tensors(), "vision_model.") | {
            "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(()),
        }), "clip", "transformers", {},
    ),
    "TAEHV": (
        lambda f, t: shutil.copy(GOLDEN / "taehv/taew2_1_tiny.safetensors", t / MISLEADING), "taehv", "native", {},
    ),
    "TAEHV 2.2": (
        lambda f, t: shutil.copy(GOLDEN / "taehv/taew2_2_tiny.safetensors", t / MISLEADING), "taehv", "native", {},
    ),
    "LoRA": (
        lambda f, t: saved(t, {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 64),
                               "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.zeros(64, 4)}),
        "lora", "", {},
    ),
    "kohya": (lambda f, t: saved(t, {"lora_unet_blocks_0_ffn_0.lora_up.weight": torch.zeros(4, 4)}), "lora", "", {}),
    "peft": (
        lambda f, t: saved(t, {"base_model.model.blocks.0.ffn.0.lora_A.default.weight": torch.zeros(4, 4)}),
        "lora", "", {},
    ),
    "deltas": (lambda f, t: saved(t, {"diffusion_model.head.diff_m": torch.zeros(4, 4)}), "lora", "", {}),
    "LyCORIS": (lambda f, t: saved(t, {"lycoris_blocks_0_ffn_0.lokr_w1": torch.zeros(4, 4)}), "lora", "", {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_flavour(case, folders, tmp_path):
    make, kind, layout, more = CASES[case]
    found = recognise(open_source(make(folders, tmp_path)))[0]
    assert (found.kind, found.layout, found.problems) == (kind, layout, ())
    for key, value in more.items():
        assert getattr(found, key) == value, key


def test_every_golden_component():
    transformers = GOLDEN.glob("transformer/**/diffusion_pytorch_model.safetensors")
    for file, kind in {
        **{str(p.relative_to(GOLDEN)): "wan" for p in transformers},
        "causal/model_prefix.safetensors": "wan", "causal/self_forcing_dmd.pt": "wan",
        "clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors": "clip",
        "umt5/models_t5_umt5-xxl-enc.safetensors": "umt5", "vae/wan21/Wan2.1_VAE.safetensors": "wan_vae",
        "vae/wan22/Wan2.2_VAE.safetensors": "wan_vae22", "taehv/taew2_1_tiny.safetensors": "taehv",
    }.items():  # fmt: skip
        found = recognise(open_source(GOLDEN / file))[0]
        assert (found.kind, found.layout, found.problems) == (kind, "native", ()), file


def test_the_task_of_every_golden_transformer():
    for folder in GOLDEN.glob("transformer/*"):
        place = folder / "high_noise_model" if (folder / "high_noise_model").is_dir() else folder
        said = json.loads((place / "config.json").read_text())["model_type"]
        assert recognise(open_source(place / "diffusion_pytorch_model.safetensors"))[0].variant == said, folder.name


def test_a_new_name_changes_nothing(folders, tmp_path):
    """A tool that read 480, high or flf2v out of file names gave other clips after a rename."""
    seen = []
    for name in ("wan2.1_t2v_1.3B.safetensors", "wan2.2_i2v_high_noise_flf2v_720p_fun.safetensors", "x.bin", "y"):
        save_file(native(folders, "i2v_a14b"), tmp_path / name)
        seen.append(recognise(open_source(tmp_path / name))[0])
    assert all(one == seen[0] for one in seen)


@pytest.mark.slow
def test_what_cannot_be_told_is_listed(tmp_path):
    """Of a 14B text-to-video transformer no shape tells the version or the expert."""
    from ditkit.checkpoints.views.source import Facts, View
    from ditkit.models.published import OFFICIAL
    from ditkit.models.wan import WanTransformer

    class Shapes(View):
        path, metadata, notes = tmp_path, {}, ()

        def __init__(self, name):
            with torch.device("meta"):
                module = WanTransformer(OFFICIAL[name].config)
            self.tensors = {k: Facts("BF16", tuple(v.shape)) for k, v in module.state_dict().items()}

    found = recognise(Shapes("wan2.1-t2v-14b"))[0]
    assert found == recognise(Shapes("wan2.2-t2v-a14b"))[0]
    assert found.size_name == "14B"
    assert found.possible == (
        "Wan 2.1 T2V-14B", "Wan 2.2 T2V-A14B, high-noise expert", "Wan 2.2 T2V-A14B, low-noise expert",
    )  # fmt: skip
    assert found.family == "Wan 2.1 or Wan 2.2"
    assert "the role that its folder or a manifest gives it" in found.decides
    assert recognise(Shapes("wan2.2-i2v-a14b"))[0].possible[0] == "Wan 2.2 I2V-A14B, high-noise expert"
    assert recognise(Shapes("wan2.1-i2v-14b"))[0].possible == ("Wan 2.1 I2V-14B-480P", "Wan 2.1 I2V-14B-720P")
    for name, size in (("wan2.1-t2v-1.3b", "1.3B"), ("wan2.2-ti2v-5b", "5B"), ("wan2.1-vace-14b", "14B")):
        one = recognise(Shapes(name))[0]
        assert (one.size_name, len(one.possible), one.decides) == (size, 1, None)


@pytest.mark.parametrize(("extra", "relative"), [
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ("casual_audio_encoder.weights", "S2V"),
    ("audio_proj.audio_proj_glob_1.layer.weight", "HuMo"),
    ("control_adapter.conv.weight", "Fun-Camera"),
    ("ref_conv.weight", "Fun-Reference"),
    ("dwpose_embedding.0.weight", "UniAnimate"),
])  # fmt: skip
def test_relatives_are_named_and_not_run(folders, tmp_path, extra, relative):
    found = recognise(open_source(saved(tmp_path, native(folders, "i2v") | {extra: torch.zeros(2)})))[0]
    assert (found.kind, found.variant) == ("wan", relative)
    assert found.problems == (f"it is {relative}, a relative of Wan that ditkit does not run",)


@pytest.mark.parametrize(
    ("channels", "said"), [(48, "it is Fun-Control"), (21, "its 21 input and 16 output channels are")]
)
def test_conditions_that_are_not_official(folders, tmp_path, channels, said):
    tensors = native(folders) | {"patch_embedding.weight": torch.zeros(64, channels, 1, 2, 2)}
    assert recognise(open_source(saved(tmp_path, tensors)))[0].problems[0].startswith(said)


def test_a_branch_on_its_own_and_a_saved_state_are_told_apart(folders, tmp_path):
    module = {k: v for k, v in native(folders, "vace").items() if k.startswith("vace_")}
    found = recognise(open_source(saved(tmp_path, module)))[0]
    assert (found.kind, found.problems[0][:37]) == ("vace_module", "it holds only VACE's control branch, ")
    state = saved(tmp_path, {"latents": torch.zeros(1, 16, 2, 4, 4)}, {"ditkit.state": "{}"})
    assert recognise(open_source(state))[0].problems == ("it is a saved State of ditkit, not a model",)


def test_a_plain_t5_is_no_umt5(tmp_path):
    tensors = tiny._text_tensors()
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert (
        "T5 with positions in its first block only" in recognise(open_source(saved(tmp_path, tensors)))[0].problems[0]
    )


def refused(file, *parts):
    with pytest.raises(LoadError) as error:
        recognise(open_source(file))[0]
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_two_kinds_at_once_and_none_at_all(folders, tmp_path):
    both = native(folders) | names.renamed(native(folders), names.TRANSFORMER)
    refused(saved(tmp_path, both), "its tensors fit wan (native) and wan (diffusers)", "one component at a time")
    mixed = native(folders) | load_file(weights(folders["t2v"]["diffusers"] / "vae"))
    refused(saved(tmp_path, mixed), "its tensors fit wan (native) and wan_vae (diffusers)")
    refused(saved(tmp_path, {"unet.conv.weight": torch.zeros(2), "a": torch.zeros(1)}), "nothing fits its 2 tensors")
    part = {k: v for k, v in native(folders).items() if not k.startswith("head")}
    refused(saved(tmp_path, part), "the nearest is wan (native), which has head.modulation")


def test_a_scale_without_its_weight_is_not_passed_over(folders, tmp_path):
    tensors = scaled(native(folders))
    del tensors[next(name for name in tensors if name.endswith("scale_weight"))]
    refused(saved(tmp_path, tensors), "8-bit weights have no scale")
