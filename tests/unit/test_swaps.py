"""Seam C: swaps act before any weight is read, for every component, and may keep what the file stores."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from held import Held
from safetensors.torch import save_file
from torch import nn

import ditkit
from ditkit.assembly.components import Components
from ditkit.assembly.model import Model
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.lora.read import read_lora
from ditkit.checkpoints.views.quantized import Dequantized
from ditkit.contracts import Seams, Swap
from ditkit.errors import DitkitError, LoadError, SetupError
from ditkit.nn.dtype_policy import dtype_policy
from ditkit.nn.lora import AdaptedLinear, lora_swaps
from ditkit.setup import Setup
from ditkit.shared import Shared, nbytes

TAEHV = Path(__file__).parents[1] / "data/golden/taehv/taew2_1_tiny.safetensors"
EVERY = {
    "transformer": "blocks.0.self_attn.q",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q",
    "image_encoder": "encoder.layers.1.mlp.fc1",
    "vae": "decoder.conv1",
    "preview_decoder": "decoder.1",
}
SMALL = {"prompt": "a red circle", "seed": 3, "width": 32, "height": 32, "frames": 5, "steps": 2}


def itself(module: nn.Module) -> nn.Module:
    return module


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("swaps") / "i2v", "i2v")


def components(folder: Path, *swaps: Swap, shared: Shared | None = None, device_of=None, **setup) -> Components:
    chosen = Setup.of({"model": str(folder), "components": {"preview_decoder": str(TAEHV)}, **setup})
    return Components(Model.open(str(folder), chosen), chosen, swaps, shared, device_of)


def module_of(component) -> nn.Module:
    return component if isinstance(component, nn.Module) else component.model


def at(path: str):
    return lambda name, module: name == path


# --- every component, before the load


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_swap_sees_a_component_without_data_and_its_result_is_filled(i2v, name):
    seen = []

    def make(module: nn.Module) -> nn.Module:
        seen.append({tensor.device.type for tensor in module.parameters()})
        return nn.Sequential(module)

    shared = Shared()
    plain = components(i2v, shared=shared)
    swapped = components(i2v, Swap("wrap", at(EVERY[name]), make, (name,)), shared=shared)
    before, after = (module_of(c[name]).state_dict() for c in (plain, swapped))
    assert seen == [{"meta"}]
    moved = {key.replace(f"{EVERY[name]}.0.", f"{EVERY[name]}."): tensor for key, tensor in after.items()}
    assert moved.keys() == before.keys() != after.keys()
    assert all(torch.equal(moved[key], before[key]) for key in before)
    assert swapped[name] is not plain[name]
    assert swapped[name].fingerprint == swapped.fingerprint_of(name) != plain.fingerprint_of(name)
    assert swapped.describe()[name]["swaps"] == ["wrap"]
    others = [other for other in EVERY if other != name]
    assert all(swapped[other] is plain[other] for other in others)
    assert all(swapped.fingerprint_of(other) == plain.fingerprint_of(other) for other in others)


def test_by_default_a_swap_is_for_the_transformers(tmp_path):
    folder = tiny.write(tmp_path / "two", "t2v_a14b")
    swapped, plain = components(folder, Swap("q", at(EVERY["transformer"]), nn.Sequential)), components(folder)
    for name in ("transformer", "transformer_2"):
        assert isinstance(swapped[name].blocks[0].self_attn.q, nn.Sequential)
        assert swapped[name].fingerprint != plain[name].fingerprint
    assert swapped.fingerprint_of("text_encoder") == plain.fingerprint_of("text_encoder")
    only = components(folder, Swap("q", at(EVERY["transformer"]), nn.Sequential, ("transformer_2",)))
    assert not isinstance(only["transformer"].blocks[0].self_attn.q, nn.Sequential)
    assert isinstance(only["transformer_2"].blocks[0].self_attn.q, nn.Sequential)


@pytest.mark.parametrize("name", EVERY)
def test_a_swap_without_a_match_in_its_component_is_an_error(i2v, name):
    with pytest.raises(SetupError, match="swap 'nothing': it matches no module of"):
        components(i2v, Swap("nothing", at("nowhere"), itself, (name,)))[name]


@pytest.mark.parametrize("names", [("image_encoder",), ("transformer", "text_encodr"), ("text_encoder", "tokenizer")])
def test_a_swap_for_a_component_that_is_not_there_is_an_error(tiny_model, names):
    found = f"swap 'x' for {', '.join(names)}: .* has no such component with weights; it has "
    with pytest.raises(SetupError, match=found):
        components(tiny_model, Swap("x", at("y"), itself, names))


def test_a_swap_that_would_have_no_effect_where_its_stage_runs_is_an_error(tiny_model):
    swap = Swap("q", at(EVERY["text_encoder"]), itself, ("text_encoder",))
    pipe = ditkit.load(tiny_model, placement={"encode_text": "process"}, seams=Seams(swaps=(swap,)))
    with pytest.raises(SetupError, match="encode_text runs at process, and Python objects do not travel"):
        pipe(**SMALL)


@pytest.mark.slow
def test_a_swap_counts_for_the_stages_that_use_its_component_and_for_no_other(tiny_model):
    swaps = {
        "text": Swap("text", at(EVERY["text_encoder"]), copy.deepcopy, ("text_encoder",)),
        "main": Swap("main", at(EVERY["transformer"]), copy.deepcopy),
    }
    plain, one, both = (
        ditkit.load(tiny_model, seams=Seams(swaps=tuple(chosen)))(**SMALL)
        for chosen in ((), [swaps["text"]], swaps.values())
    )
    records = [result.state["records"] for result in (plain, one, both)]
    assert [record["denoise"]["plugs"] for record in records] == [{}, {}, {"swaps": [swaps["main"].fingerprint]}]
    assert one.receipt["seams"] == {"swaps": [swaps["text"].fingerprint]}
    assert one.state.fingerprints["latents"] != plain.state.fingerprints["latents"], "by the text that it was made of"


@pytest.mark.slow
def test_a_swap_of_another_stage_forbids_no_place(tiny_model):
    swap = Swap("q", at(EVERY["text_encoder"]), itself, ("text_encoder",))
    here = ditkit.load(tiny_model, seams=Seams(swaps=(swap,)))
    elsewhere = ditkit.load(tiny_model, placement={"denoise": "process"}, seams=here.seams)
    try:
        there = elsewhere(**SMALL).state
    finally:
        elsewhere.places.close()
    assert there.equal(here(**SMALL).state)
    main = Seams(swaps=(Swap("q", at(EVERY["transformer"]), itself),))
    with pytest.raises(DitkitError, match="swaps is changed here by Python objects, which do not travel"):
        ditkit.load(tiny_model, placement={"denoise": "process"}, seams=main)(**SMALL)


def test_mlx_has_no_modules_to_swap(tiny_model):
    pytest.importorskip("mlx.core")
    swap = Swap("q", at(EVERY["text_encoder"]), itself, ("text_encoder",))
    with pytest.raises(SetupError, match="loading the text_encoder with mlx: q is for modules of torch"):
        components(tiny_model, swap, backends={"text_encoder": "mlx"})["text_encoder"]


# --- what a new module may declare


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)


def net() -> Net:
    with torch.device("meta"):
        return Net()


def weights() -> Held:
    g = torch.Generator().manual_seed(1)
    return Held({name: torch.randn(t.shape, generator=g) for name, t in Net().state_dict().items()})


def loaded(make, **options) -> Net:
    module = net()
    load_into(module, weights(), swaps=(Swap("new", at("first"), make),), **options)
    return module


def test_a_copy_and_a_new_module_of_the_same_names_are_filled():
    def another(module):
        with torch.device("meta"):
            return nn.Linear(4, 3)

    for make in (copy.deepcopy, another):
        module = loaded(make)
        assert torch.equal(module.first.weight, weights()["first.weight"])
        assert torch.equal(module.first.bias, weights()["first.bias"])


def test_a_tensor_without_a_place_is_an_error():
    for make in (lambda m: nn.Sequential(copy.deepcopy(m)), lambda m: nn.Identity()):
        with pytest.raises(LoadError, match=r"2 tensors have no place after the swaps \(first.bias, first.weight\)"):
            loaded(make)


def test_a_parameter_that_nobody_fills_is_an_error():
    def make(module):
        module.extra = nn.Parameter(torch.empty(2, device="meta"))
        return module

    with pytest.raises(LoadError, match=r"1 tensors stayed without data \(first.extra\). Fill them where the module"):
        loaded(make)


def test_the_names_are_compared_before_a_swap_hides_anything():
    held = weights()
    held.tensors["odd"] = held.tensors.pop("first.bias")
    with pytest.raises(LoadError, match="1 tensors are unknown to the model"):
        load_into(net(), held, swaps=(Swap("new", at("first"), lambda m: pytest.fail("a swap ran")),))
    assert held.read == []


class Halved(nn.Module):
    """Fills itself: its weight is half of the file's, its bias is gone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.told: dict[str, object] = {}

    def load_weight(self, tensor):
        self.told = {"key": tensor.key, "dtype": tensor.dtype, "device": tensor.device.type}
        return tensor.read(torch.float64) / 2

    def load_bias(self, tensor):
        self.register_buffer("zero_point", tensor.stored().codes.sum())


def test_a_module_can_fill_itself():
    module = loaded(Halved, dtype_of=lambda name: torch.bfloat16)
    first = module.first
    assert first.told == {"key": "first.weight", "dtype": torch.bfloat16, "device": "cpu"}
    assert isinstance(first.weight, nn.Parameter)
    assert torch.equal(first.weight, weights()["first.weight"].double() / 2)
    assert dict(first.named_buffers()).keys() == {"zero_point"}
    assert not hasattr(first, "bias")
    assert module.second.weight.dtype == torch.bfloat16


def test_a_module_that_fills_itself_has_to_look():
    class Blind(Halved):
        def load_bias(self, tensor):
            return torch.zeros(3)

    with pytest.raises(LoadError, match=r"load_bias of Blind did not look at first\.bias"):
        loaded(Blind)


def test_numbers_that_are_not_finite_are_seen_in_a_stored_form_too(tmp_path):
    codes = torch.ones(3, 4).to(torch.float8_e4m3fn)
    codes[1, 2] = float("nan")
    held = {name: t.clone() for name, t in weights().held.items()}
    save_file(held | {"first.weight": codes, "first.weight_scale": torch.ones(())}, tmp_path / "x.safetensors")

    class Kept(Halved):
        def load_weight(self, tensor):
            self.register_buffer("codes", tensor.stored().codes)

    source = Dequantized(TensorFiles(tmp_path))
    with pytest.raises(LoadError, match=r"first\.weight holds infinite or undefined numbers"):
        load_into(net(), source, swaps=(Swap("kept", at("first"), Kept),), check_finite=True)


# --- LoRA is a swap


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Low rank, and changes of a norm, a bias, the modulation and the patch embedding."""
    g, D = torch.Generator().manual_seed(2), tiny.TRANSFORMER.dim
    factors = {"lora_A.weight": torch.randn(4, D, generator=g), "lora_B.weight": torch.randn(D, 4, generator=g)}
    tensors = {f"blocks.{n}.self_attn.q.{key}": value / 8 for n in range(2) for key, value in factors.items()}
    tensors |= {
        "blocks.0.norm3.diff": torch.randn(D, generator=g),
        "blocks.1.diff_m": torch.randn(1, 6, D, generator=g),
    }
    tensors |= {"blocks.1.ffn.0.diff_b": torch.randn(tiny.TRANSFORMER.ffn_dim, generator=g)}
    tensors |= {"patch_embedding.diff": torch.randn(D, 16, 1, 2, 2, generator=g)}
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file({key: value.bfloat16() for key, value in tensors.items()}, path)
    shapes = {name: tuple(t.shape) for name, t in tiny.transformer().state_dict().items()}
    return read_lora(TensorFiles(path), shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_beside_weights_that_come_later_is_bit_equal_to_one_beside_weights_that_are_there(adapter, dtype):
    policy, held = dtype_policy("wan", dtype), tiny.transformer().state_dict()
    swaps = lora_swaps([(adapter, 0.7)])
    there = tiny.built(tiny.TRANSFORMER, held, "wan", dtype)
    for swap in swaps:
        setattr(there, swap.match.name, swap.make(there.get_submodule(swap.match.name)))
    with torch.device("meta"):
        later = tiny.WanTransformer(tiny.TRANSFORMER, policy).eval().requires_grad_(False)
    load_into(later, Held(held), dtype_of=policy.weight_dtype, swaps=swaps, check_finite=True)
    one, other = later.state_dict(), there.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    assert {type(m).__name__ for m in later.modules()} == {type(m).__name__ for m in there.modules()}
    assert not [m for m in later.modules() for name in vars(m) if name.startswith("load_")]


def test_a_lora_beside_a_layer_that_a_swap_took_away_is_an_error(tiny_model, adapter):
    lora = {"loras": [str(adapter.path)]}
    for path, make in (("blocks.0.self_attn.q", nn.Sequential), ("blocks.0.self_attn", nn.Sequential)):
        with pytest.raises(SetupError, match=r"changes blocks\.0\.self_attn\.q\.weight: a swap put something else"):
            components(tiny_model, Swap("x", at(path), make), **lora)["transformer"]


# --- quantized weights that stay so


class Q8Linear(nn.Module):
    """Keeps blocks of Q8_0, 34 bytes for 32 numbers, and makes numbers of them for each call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def load_weight(self, tensor):
        form = tensor.stored()
        assert form.format == "gguf Q8_0"
        self.register_buffer("codes", form.codes)
        self.shape, self.dtype, self.weight = form.shape, tensor.dtype, None

    def forward(self, x):
        scales, codes = self.codes.split([2, 32], 1)
        weight = codes.view(torch.int8).float() * scales.contiguous().view(torch.float16).float()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.view(self.shape).to(self.dtype).to(x.dtype), bias)


def quantized(path: Path, tensors: dict[str, torch.Tensor], architecture: str, is_q8) -> Path:
    gguf = pytest.importorskip("gguf")
    writer, q8 = gguf.GGUFWriter(path, architecture), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if is_q8(name):
            writer.add_tensor(name, gguf.quants.quantize(numbers, q8), raw_dtype=q8)
            continue
        if numbers.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(numbers.shape))
            numbers = numbers.reshape(len(numbers), -1)
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def is_wan_linear(name: str, module: nn.Module) -> bool:
    return "attn." in name and name.rpartition(".")[2] in ("q", "k", "v", "o")


def is_umt5_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("wo")


KEEP = Swap("q8", is_wan_linear, Q8Linear)
KEEP_TEXT = Swap("q8 text", is_umt5_linear, Q8Linear, ("text_encoder",))


@pytest.fixture(scope="module")
def wan_gguf(tmp_path_factory):
    def is_q8(name: str) -> bool:
        return name.endswith(".weight") and is_wan_linear(name.removesuffix(".weight"), None)

    folder = tmp_path_factory.mktemp("q8")
    (folder / "config.json").write_text(json.dumps(tiny._native_json(tiny.TRANSFORMER, "t2v")))
    return quantized(folder / "wan.gguf", tiny.transformer().state_dict(), "wan", is_q8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformer_that_keeps_its_codes(tiny_model, wan_gguf, dtype):
    setup = {"components": {"transformer": str(wan_gguf)}, "dtype": dtype}
    plain = ditkit.load(tiny_model, **setup)
    kept = ditkit.load(tiny_model, **setup, seams=Seams(swaps=(KEEP,)))
    latents = [p.run(p.begin(p.model.request(SMALL)), until="denoise").state["latents"] for p in (plain, kept)]
    assert torch.equal(*latents)
    a, b = (p.components["transformer"] for p in (plain, kept))
    layers = [m for m in b.modules() if isinstance(m, Q8Linear)]
    assert len(layers) == 16  # two blocks of two attentions of q, k, v and o
    numbers, wide = 16 * tiny.TRANSFORMER.dim**2, 4 if dtype == "float32" else 2
    assert nbytes([a]) - nbytes([b]) == numbers * wide - numbers * 34 // 32
    assert a.fingerprint != b.fingerprint == kept.components.fingerprint_of("transformer")
    assert kept.components.facts("transformer")["quantization"] == "gguf Q8_0"


def test_a_text_encoder_that_keeps_its_codes(tiny_model, tmp_path):
    from test_gguf import T5

    names = {new.replace("block.0.", f"block.{n}."): old.replace("blk.0.", f"blk.{n}.")
             for n in range(tiny.TEXT.num_layers) for old, new in T5.items()}  # fmt: skip
    tensors = {names[name]: tensor for name, tensor in tiny._text_tensors().items()}
    linears = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_o.weight", "ffn_gate.weight", "ffn_up.weight")
    path = quantized(tmp_path / "t5.gguf", tensors, "t5encoder", lambda name: name.endswith(linears))
    parts = {"text_encoder": str(path)}
    plain, kept = (components(tiny_model, *swaps, components=parts) for swaps in ((), (KEEP_TEXT,)))
    a, b = plain["text_encoder"], kept["text_encoder"]
    assert torch.equal(a([5, 9, 30, 1]), b([5, 9, 30, 1]))
    layers = [m for m in b.model.modules() if isinstance(m, Q8Linear)]
    assert len(layers) == 12
    numbers = 2 * (4 * 32 * 32 + 2 * 48 * 32)
    assert nbytes([a]) - nbytes([b]) == numbers * 4 - numbers * 34 // 32
    assert a.fingerprint != b.fingerprint == kept.fingerprint_of("text_encoder")


def test_a_lora_stands_beside_kept_codes(tiny_model, wan_gguf, adapter):
    setup = {"components": {"transformer": str(wan_gguf)}, "loras": [f"{adapter.path}:0.5"]}
    plain = ditkit.load(tiny_model, **setup)
    kept = ditkit.load(tiny_model, **setup, seams=Seams(swaps=(KEEP,)))
    latents = [p.run(p.begin(p.model.request(SMALL)), until="denoise").state["latents"] for p in (plain, kept)]
    assert torch.equal(*latents)
    adapted = kept.components["transformer"].blocks[0].self_attn.q
    assert isinstance(adapted, AdaptedLinear)
    assert isinstance(adapted.base, Q8Linear)


def test_a_lora_that_is_merged_leaves_no_codes_to_keep(tiny_model, wan_gguf, adapter):
    setup = {"components": {"transformer": str(wan_gguf)}, "loras": [str(adapter.path)], "lora_mode": "fused"}
    kept = components(tiny_model, KEEP, **setup)
    with pytest.raises(LoadError, match=r"keeping blocks\.0\.self_attn\.q\.weight of .*: a LoRA is merged into it"):
        kept["transformer"]


# --- devices


def test_a_component_can_wait_for_some_of_its_weights(tiny_model):
    def where(component: str, name: str) -> str:
        return "meta" if name.startswith(("blocks.1.", "patch_embedding.")) else "cpu"

    shared = Shared()
    waiting, plain = components(tiny_model, shared=shared, device_of=where), components(tiny_model, shared=shared)
    a, b = waiting["transformer"], plain["transformer"]
    assert a is not b
    assert {n for n, p in a.named_parameters() if p.is_meta} == {
        n for n, _ in b.named_parameters() if where("", n) == "meta"
    }
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters() if not p.is_meta)
    assert a.device == torch.device("cpu")  # where it computes, whatever its first parameter waits for
    assert a.fingerprint == b.fingerprint


def test_what_a_swap_brought_goes_to_its_device_too(adapter):
    asked = []

    def where(name: str) -> str:
        asked.append(name)
        return "meta" if name.startswith("head.") else "cpu"

    with torch.device("meta"):
        module = tiny.WanTransformer(tiny.TRANSFORMER).eval().requires_grad_(False)
    load_into(module, Held(tiny.transformer().state_dict()), device_of=where, swaps=lora_swaps([(adapter, 1.0)]))
    assert {f"blocks.1.self_attn.q.{leaf}" for leaf in ("factors", "down", "up")} <= {*asked}
    assert "blocks.1.self_attn.q.weight" in asked  # names of the model, also where a swap put them elsewhere
    assert {p.device.type for n, p in module.named_parameters() if n.startswith("head.")} == {"meta"}
    assert {p.device.type for n, p in module.named_parameters() if not n.startswith("head.")} == {"cpu"}
