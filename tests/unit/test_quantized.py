"""Weights in 8 bits: equal to a dense reference in every flavour, and no way to lose a scale."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.views.prefixes import Unprefixed
from ditkit.checkpoints.views.quantized import Dequantized
from ditkit.errors import LoadError

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, torch.Tensor]


def dense(rows: int = 6, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 3


def coded(weight: torch.Tensor, dtype: torch.dtype, by_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) as quantisers make them: the largest number of the type for the largest weight."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / largest
    codes = weight / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale.float()


def exact(codes: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The definition, in float64, rounded to float32 once and then to ``dtype``."""
    scale = scale.double() if isinstance(scale, torch.Tensor) else scale
    return (codes.to(torch.float64) * scale).float().to(dtype)


def blob(**setting: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(setting).encode()), dtype=torch.uint8)


def view(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Dequantized:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors", metadata)
    return Dequantized(Unprefixed(TensorFiles(folder)))


def refused(folder: Path, tensors: Tensors, *parts: str, metadata: dict[str, str] | None = None) -> None:
    with pytest.raises(LoadError) as error:
        view(folder, tensors, metadata)
    for part in (str(folder), *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


PLAIN = {"a.bias": torch.arange(6.0), "norm.weight": torch.ones(8).bfloat16()}


def holds(source: Dequantized, expected: torch.Tensor) -> None:
    """``a.weight`` is ``expected``, the rest is PLAIN as it was, and nothing else is there."""
    loaded = {name: source.cast(name, expected.dtype if name == "a.weight" else None) for name in source.tensors}
    assert loaded.keys() == source.tensors.keys() == {"a.weight", *PLAIN}
    assert torch.equal(loaded["a.weight"], expected)
    assert loaded["a.weight"].dtype == expected.dtype
    assert source.tensors["a.weight"].shape == tuple(expected.shape)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in PLAIN.items())
    assert torch.equal(source["a.weight"].to(expected.dtype), expected)


@pytest.mark.parametrize("dtype", [E4, E5])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_fp8_is_cast(tmp_path, dtype, wanted):
    codes = dense().to(dtype)
    source = view(tmp_path, {"a.weight": codes, **PLAIN})
    holds(source, codes.to(wanted))
    assert (source.quantization, source.notes) == ("fp8", ())
    assert source.tensors["a.weight"].dtype == "F32"


@pytest.mark.parametrize("dtype", [E4, E5])
@pytest.mark.parametrize("marker", [torch.zeros(0), torch.zeros(2)])
def test_comfys_older_scaled_fp8(tmp_path, dtype, marker):
    codes, scale = coded(dense(), dtype)
    marker = marker.to(dtype)
    extra = {"a.scale_weight": scale, "a.scale_input": torch.tensor(0.5), "scaled_fp8": marker}
    source = view(tmp_path, {"a.weight": codes, **PLAIN, **extra})
    holds(source, exact(codes, scale))
    assert source.quantization == "fp8_scaled"
    assert any("scaled_fp8" in note for note in source.notes)
    assert any("1 scales of activations were left out" in note for note in source.notes)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("where", ["tensors", "metadata", "both"])
@pytest.mark.parametrize(
    ("name", "dtype", "flavour"),
    [("float8_e4m3fn", E4, "fp8_scaled"), ("float8_e5m2", E5, "fp8_scaled"), ("int8_tensorwise", torch.int8, "int8")],
)
def test_comfys_newer_layout(tmp_path, name, dtype, flavour, where, prefix):
    codes, scale = coded(dense(), dtype)
    extra = {"a.weight_scale": scale, "a.input_scale": torch.ones(1)}
    setting = {"format": name, "full_precision_matrix_mult": True}
    if where != "metadata":
        extra["a.comfy_quant"] = blob(**setting)
    metadata = None
    if where != "tensors":
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {f"{prefix}a": setting}})}
    source = view(tmp_path, {prefix + k: t for k, t in {"a.weight": codes, **PLAIN, **extra}.items()}, metadata)
    holds(source, exact(codes, scale))
    assert source.quantization == flavour


@pytest.mark.parametrize("dtype", [E4, torch.int8])
@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_a_scale_for_each_row_as_lightx2v_writes_it(tmp_path, dtype, shape):
    codes, scale = coded(dense(), dtype, by_row=True)
    source = view(tmp_path, {"a.weight": codes, **PLAIN, "a.weight_scale": scale.reshape(shape)})
    for wanted in (torch.float32, torch.bfloat16):
        holds(source, exact(codes, scale, wanted))


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_both_spellings_and_all_shapes_of_one_scale(tmp_path, spelling, shape):
    codes, scale = coded(dense(), E4)
    source = view(tmp_path, {"a.weight": codes, **PLAIN, f"a.{spelling}": scale.reshape(shape)})
    holds(source, exact(codes, scale))


@pytest.mark.parametrize("dtype", [E4, E5, torch.int8])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.0123])
@pytest.mark.parametrize("shape", [(300, 602), (301, 603), (3, 5)])
def test_looking_codes_up_is_bit_equal_to_the_definition(tmp_path, dtype, wanted, scale, shape):
    """All codes, NaN too, in more than one piece; an odd number of them; and so few that no pairs are taken."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8).view(dtype)
    source = view(tmp_path, {"a.weight": codes, **PLAIN, "a.weight_scale": torch.tensor(scale)})
    found, right = source.cast("a.weight", wanted), (codes.float() * scale).to(wanted)
    assert (found.dtype, found.shape) == (wanted, right.shape)
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("dtype", [E4, torch.int8])
def test_rows_in_many_pieces(tmp_path, dtype):
    codes, scale = coded(dense(300, 3001), dtype, by_row=True)
    source = view(tmp_path, {"a.weight": codes, **PLAIN, "a.weight_scale": scale})
    assert torch.equal(source.cast("a.weight", torch.bfloat16), exact(codes, scale, torch.bfloat16))


def test_unquantised_weights_pass_and_have_no_flavour(tmp_path):
    source = view(tmp_path, {"a.weight": dense().bfloat16(), **PLAIN})
    assert source.quantization is None
    assert source.notes == ()
    holds(source, dense().bfloat16())


def test_the_vocabulary_in_comfys_umt5_is_left_out_and_told(tmp_path):
    extra = {"spiece_model": torch.arange(9, dtype=torch.uint8)}
    source = view(tmp_path, {"a.weight": dense(), **PLAIN, **extra})
    holds(source, dense())
    assert source.notes == ("spiece_model was left out: the tokenizer is opened from its own file",)


def test_a_module_loads_dequantised(tmp_path):
    codes, scale = coded(dense(6, 8), E4)
    module = nn.ModuleDict({"a": nn.Linear(8, 6)})
    tensors = {"weight": codes, "weight_scale": scale, "bias": torch.zeros(6)}
    tensors = {f"model.a.{name}": tensor for name, tensor in tensors.items()}
    source = view(tmp_path, tensors)
    load_into(module, source, dtype_of=lambda name: torch.bfloat16)
    assert torch.equal(module["a"].weight, exact(codes, scale, torch.bfloat16))


def test_scales_cannot_be_lost(tmp_path):
    """Loaders that skip scale tensors gave white or garbage frames and no error (stable-diffusion.cpp 1898)."""
    codes, scale = coded(dense(), E4)
    weights = {"a.weight": codes, "b.weight": codes.clone()}
    refused(tmp_path, {**weights, "a.scale_weight": scale}, "1 8-bit weights have no scale (b.weight)")
    refused(tmp_path, {**weights, "scaled_fp8": torch.zeros(0).to(E4)}, "2 8-bit weights have no scale")
    settings = {f"{layer}.comfy_quant": blob(format="float8_e4m3fn") for layer in "ab"}
    refused(tmp_path, {**weights, **settings}, "2 8-bit weights have no scale (a.weight, b.weight)")
    refused(tmp_path, {"a.weight": torch.ones(2, 2, dtype=torch.int8)}, "1 8-bit weights have no scale (a.weight)")


def test_scales_without_their_weights(tmp_path):
    codes, scale = coded(dense(), E4)
    refused(tmp_path, {"a.weight": codes, "a.weight_scale": scale, "b.weight_scale": scale}, "1 scales have no 8-bit")
    refused(tmp_path, {"a.weight": dense(), "a.scale_weight": scale}, "1 scales have no 8-bit weight (a.scale_weight)")
    two = {"a.weight": codes, "a.weight_scale": scale, "a.scale_weight": scale.clone()}
    refused(tmp_path, two, "a.weight has two scales (a.scale_weight, a.weight_scale)")


def test_settings_that_contradict_the_weights(tmp_path):
    codes, scale = coded(dense(), E4)
    both = {"a.weight": codes, "a.weight_scale": scale}
    refused(tmp_path, {**both, "a.comfy_quant": blob(format="float8_e5m2")}, "should be float8_e5m2 and is F8_E4M3")
    refused(tmp_path, {**both, "b.comfy_quant": blob(format="float8_e4m3fn")}, "b.weight should be", "is absent")
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e5m2"}}})}
    differs = {**both, "a.comfy_quant": blob(format="float8_e4m3fn")}
    refused(tmp_path, differs, "a.comfy_quant differs from what the file's metadata say", metadata=metadata)
    for broken in ("{", "[]", "{}", '{"layers": {"a": 1}}'):
        refused(tmp_path, both, "_quantization_metadata", metadata={"_quantization_metadata": broken})
    refused(tmp_path, {**both, "a.comfy_quant": torch.ones(3)}, "a.comfy_quant is F32, not bytes of JSON")
    refused(tmp_path, {**both, "a.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "it is not valid JSON")


def test_a_broken_scale_fails_when_it_is_read(tmp_path):
    codes, _ = coded(dense(), E4)
    source = view(tmp_path, {"a.weight": codes, "a.weight_scale": torch.tensor(float("nan"))})
    with pytest.raises(LoadError, match=r"a\.weight_scale is not finite"):
        dict(source)


U8 = torch.ones(6, 4, dtype=torch.uint8)
INT8 = {"a.weight": torch.ones(6, 8, dtype=torch.int8), "a.weight_scale": torch.ones(6)}


@pytest.mark.parametrize(
    ("tensors", "flavour"),
    [
        ({"a.weight": U8, "a.weight_scale": torch.ones(6, 1).to(E4), "a.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({"a.weight": U8, "a.comfy_quant": blob(format="nvfp4")}, "packed 4-bit numbers (U8)"),
        ({"a.weight": dense().to(E4), "a.weight_scale": U8, "a.comfy_quant": blob(format="mxfp8")}, "mxfp8"),
        ({"a.weight": dense().to(E4), "a.weight_scale": U8}, "the scales of MXFP8 or NVFP4"),
        ({**INT8, "a.comfy_quant": blob(format="int8_tensorwise", convrot=True, convrot_groupsize=4)}, "convrot"),
        ({**INT8, "a.comfy_quant": blob(format="convrot_w4a4")}, "convrot_w4a4"),
        ({"a.weight": INT8["a.weight"], "a.weight_s_rel": torch.ones(1), "a.weight_codebook": torch.ones(16)}, "W4A8"),
        ({**INT8, "a.pre_quant_scale": torch.ones(8)}, "pre_quant_scale"),
        ({"a.qweight": U8, "a.wscales": torch.ones(2)}, "SVDQuant"),
        ({"a.smooth_factor": torch.ones(2), "a.wscales": torch.ones(2)}, "SVDQuant"),
        ({"a.weight._data": U8.to(torch.int8), "a.weight._scale": torch.ones(6, 1)}, "quanto"),
        ({"a.weight": U8, "a.weight.absmax": torch.ones(2)}, "bitsandbytes"),
        ({"a.weight": INT8["a.weight"], "a.SCB": torch.ones(6)}, "bitsandbytes"),
        ({"a.weight": dense().to(E4), "a.weight_scale": torch.ones(3, 4)}, "scales of blocks"),
        ({"a.weight": dense().to(E4), "a.weight_scale": torch.ones(1, 8)}, "scales of blocks"),
    ],
)
def test_flavours_that_are_refused_by_name(tmp_path, tensors, flavour):
    refused(tmp_path, tensors, flavour, "Use a file in 16 bits, scaled or plain float8, int8 or GGUF")


def test_convrot_that_only_the_metadata_of_one_shard_tells(tmp_path):
    layers = {n: {f"a{n}": {"format": "int8_tensorwise", "convrot": n == 2}} for n in (1, 2)}
    names = {}
    for n in (1, 2):
        file = f"model-0000{n}-of-00002.safetensors"
        tensors = {f"a{n}.weight": INT8["a.weight"], f"a{n}.weight_scale": INT8["a.weight_scale"]}
        save_file(tensors, tmp_path / file, {"_quantization_metadata": json.dumps({"layers": layers[n]})})
        names |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(LoadError, match=r"a2\.weight is stored as int8_tensorwise with convrot"):
        Dequantized(open_source(tmp_path))


def test_hashes_are_those_of_the_file(tmp_path):
    source = view(tmp_path, {"model.a.weight": dense().to(E4)})
    files = TensorFiles(tmp_path)
    assert (source.sha256, source.fingerprint, source.sketch) == (files.sha256, files.fingerprint, files.sketch)
    with pytest.raises(KeyError):
        source["a.weight_scale"]
