"""All that runs by default runs on Apple's GPU, which has no float64 and computes some things wrong (``metal.py``)."""

import numpy as np
import pytest
import tiny
import torch
from integration.test_family_runs import PICTURES, asked
from integration.test_stand_ins import GOLDEN, as_fp8, as_gguf, configured, is_matrix, weights
from metal import METAL, OnMetal, metal
from remembering import FirstBlockCache
from safetensors.torch import save_file
from torch.nn.functional import conv2d, conv3d, pad, scaled_dot_product_attention

import ditkit
from ditkit import Seams
from ditkit.errors import LoadError, StateError
from ditkit.nn import attention
from ditkit.nn.convolution import after_zeros, convolution
from ditkit.nn.dtype_policy import dtype_policy
from ditkit.nn.layers import timestep_embedding
from ditkit.seams import RunPlugs

SHORT = {"steps": 2}


@pytest.fixture
def gpu(monkeypatch):
    with metal(monkeypatch):
        yield METAL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("metal") / "t2v")


def on_both(monkeypatch, folder, request, **setup):
    """The clip on the CPU, and on Apple's GPU in float32, which ``auto`` picks."""
    expected = ditkit.load(folder, **setup)(**request)
    with metal(monkeypatch):
        pipe = ditkit.load(folder, dtype="float32", **setup)
        found = pipe(**request)
        facts = found.receipt["components"]
        assert {part["device"] for name, part in facts.items() if name != "tokenizer"} == {"mps"}
        assert isinstance(next(pipe.components["transformer"].parameters()), OnMetal)
    return expected, found


def assert_alike(expected, found):
    """The same numbers but for their last bits: convolutions and rotations are summed in another order."""
    assert np.abs(expected.video.astype(int) - found.video).max() <= 1
    assert torch.allclose(expected.state["latents"], found.state["latents"], atol=2e-4, rtol=2e-4)


# --- the stand-in itself


def test_the_stand_in_has_no_float64(gpu):
    x = torch.ones(3).to(gpu)
    assert x.device == gpu
    assert isinstance(x * 2, OnMetal)
    assert (x * 2).cpu().tolist() == [2, 2, 2]
    for make in (
        lambda: x.double(), lambda: x.to(torch.float64), lambda: torch.ones(3, dtype=torch.float64).to(gpu),
        lambda: torch.full((2,), 1.0, dtype=torch.float64, device=gpu), lambda: torch.complex(x.double(), x.double()),
        lambda: torch.ones(3).to(torch.float8_e4m3fn).to(gpu),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor"):
            make()
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(3)


def test_the_stand_in_knows_what_metal_computes_wrong(gpu):
    rows = torch.ones(1, 4, 3, 8).to(gpu)
    weight, frames = torch.ones(2, 2, 3, 3, 3).to(gpu), torch.ones(1, 2, 3, 8, 8).to(gpu)
    for call in (
        lambda: scaled_dot_product_attention(*[rows.transpose(1, 2)] * 3), lambda: conv3d(frames, weight),
        lambda: conv2d(frames[:, :, 0], weight[:, :, 0]), lambda: pad(frames, (0, 0, 0, 0, 1, 0)),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="on Metal"):
            call()


# --- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("task", PICTURES)
def test_every_task(monkeypatch, tmp_path, task):
    folder = tiny.write(tmp_path / task, task, "native")
    assert_alike(*on_both(monkeypatch, folder, asked(task, **SHORT)))


@pytest.mark.slow
def test_by_default_it_computes_in_bfloat16(model, gpu):
    result = ditkit.load(model)(**asked("t2v", **SHORT))
    assert {n: p["dtype"] for n, p in result.receipt["components"].items() if n != "tokenizer"} == {
        "text_encoder": "bfloat16", "transformer": "bfloat16", "vae": "float32",
    }  # fmt: skip
    assert result.video.std() > 5


@pytest.mark.parametrize("scheduler", ["dpm++", "dpm++_sde", "euler"])
@pytest.mark.slow
def test_every_scheduler_also_from_a_state(monkeypatch, model, scheduler):
    request = asked("t2v", steps=3, scheduler=scheduler, guidance_scale=1.0)
    expected = ditkit.load(model)(**request)
    with metal(monkeypatch):
        pipe = ditkit.load(model, dtype="float32")
        half = pipe.run(pipe.begin(pipe.request(request)), stop_at_step=2).state
        assert_alike(expected, pipe.run(half))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["diffusers", "float32"])
def test_every_dtype_policy_and_the_dense_kernel(monkeypatch, model, policy):
    request = asked("t2v", steps=1, guidance_scale=1.0)
    assert_alike(*on_both(monkeypatch, model, request, dtype_policy=policy, attention="dense"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["side", "fused"])
def test_loras_whose_factors_are_float64(monkeypatch, model, tmp_path, mode):
    g, factors = torch.Generator().manual_seed(5), {}
    for name, x in weights().items():
        path = f"diffusion_model.{name.removesuffix('.weight')}"
        if is_matrix(name, x) and "self_attn" in name:
            factors[f"{path}.lora_down.weight"] = torch.randn(2, x.shape[1], generator=g).double() * 0.2
            factors[f"{path}.lora_up.weight"] = torch.randn(x.shape[0], 2, generator=g).double() * 0.2
        elif name.endswith("norm_q.weight"):
            factors[f"{path}.diff"] = torch.randn(x.shape, generator=g).double() * 0.1
    save_file(factors, tmp_path / "lora.safetensors")
    setup = {"loras": [str(tmp_path / "lora.safetensors")], "lora_mode": mode}
    expected, found = on_both(monkeypatch, model, asked("t2v", steps=1, guidance_scale=1.0), **setup)
    assert_alike(expected, found)
    assert not np.array_equal(expected.video, ditkit.load(model)(**asked("t2v", steps=1, guidance_scale=1.0)).video)


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_fp8, as_gguf])
def test_quantised_weights(monkeypatch, model, tmp_path, write):
    setup = {"components": {"transformer": str(configured(write(tmp_path), model))}}
    assert_alike(*on_both(monkeypatch, model, asked("t2v", steps=1, guidance_scale=1.0), **setup))


@pytest.mark.slow
def test_a_tiny_vae_previews_and_a_plug_with_a_memory(monkeypatch, model):
    setup = {"components": {"vae": str(GOLDEN / "taehv/taew2_1_tiny.safetensors")}}
    seams = Seams(run_blocks=(FirstBlockCache(0.35),))
    request = asked("t2v", steps=3, guidance_scale=1.0)
    expected = ditkit.load(model, seams=seams, **setup)(**request)
    with metal(monkeypatch):
        pipe = ditkit.load(model, seams=seams, dtype="float32", **setup)
        half = pipe.run(pipe.begin(pipe.request(request)), stop_at_step=1).state
        assert half["memory"]
        found = pipe.run(half)
        seen = ditkit.load(model, components={"preview_decoder": setup["components"]["vae"]}, share_with=pipe)
        assert seen.look()(found.state["latents"][:, :, :1]).shape == (32, 32, 3)
    assert_alike(expected, found)


# --- its kernels


def test_convolutions_of_frames_are_sums_of_convolutions_of_pictures(gpu):
    g = torch.Generator().manual_seed(1)
    for kernel, every, margins in (((3, 3, 3), 1, (0, 1, 1)), ((3, 1, 1), 2, (0, 0, 0)), ((1, 1, 1), 1, (0, 0, 0))):
        x, bias = torch.randn(2, 4, 7, 9, 8, generator=g), torch.randn(5, generator=g)
        weight = torch.randn(5, 4, *kernel, generator=g)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        found = convolution(x.to(gpu), weight.to(gpu), bias.to(gpu), (every, 1, 1), margins)
        expected = conv3d(x.double(), weight.double(), bias.double(), (every, 1, 1), margins)
        assert torch.allclose(found.cpu().double(), expected, atol=1e-5)


def test_zeros_in_front_are_the_same_everywhere(gpu):
    x = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(after_zeros(x.to(gpu), 2).cpu(), pad(x, (0, 0, 0, 0, 2, 0)))
    assert after_zeros(x, 0) is x


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
def test_attention_takes_some_rows_at_a_time(gpu, monkeypatch, kernel):
    """Where all products at once would be too many for Metal."""
    monkeypatch.setattr(attention, "METAL_PRODUCTS", 2 * 4 * 7 * 3)
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, length, 4, 16, generator=g) for length in (11, 7, 7))
    found = attention.ATTENTION[kernel](*(x.to(gpu) for x in (q, k, v)), None).cpu()
    assert torch.allclose(found, attention.ATTENTION[kernel](q, k, v, None), atol=1e-6)


def test_angles_of_a_timestep_are_made_in_float64_on_the_cpu(gpu):
    told = torch.tensor([999.0, 0.25])
    for policy in ("wan", "diffusers"):
        dtype = dtype_policy(policy, torch.float32).sinusoid
        found = timestep_embedding(told.to(gpu), 32, dtype).to(torch.float32).cpu()
        assert torch.equal(found, timestep_embedding(told, 32, dtype).float())


# --- what it cannot do is one sentence


def test_a_memory_in_float64_does_not_move_there():
    memory = {"predict.Momentum.transformer/m": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(StateError, match="remembers float64, which that device does not have"):
        RunPlugs(remembered=memory, device=METAL)


def test_codes_in_float8_are_not_kept_there(model, tmp_path, gpu):
    from ditkit.checkpoints.files.opening import open_source
    from ditkit.checkpoints.load import SourceTensor
    from ditkit.checkpoints.views.quantized import Dequantized

    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    tensor = SourceTensor("loading X", Dequantized(open_source(tmp_path / "x.safetensors")), "a.weight",
                          torch.float32, torch.device("mps"))  # fmt: skip
    with pytest.raises(LoadError, match="mps does not have float8_e4m3fn"):
        tensor.stored()
