"""UMT5 in MLX against the official outputs (golden), against transformers, and against our torch encoder.

MLX is the real one, on the CPU of this machine.
"""

import sys
import threading
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import test_umt5 as torchs
import tiny
import torch
from safetensors.torch import save_file
from test_umt5 import golden_cases, golden_encoder, l2, rel, saved  # noqa: F401

import ditkit
from ditkit.assembly import Components, Model
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import umt5_keys
from ditkit.checkpoints.model.open_part import open_part
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.contracts import TextEncoder
from ditkit.errors import LoadError, MissingDependency, RequestError, SetupError
from ditkit.mlx.umt5 import MLXTextEncoder, Packed, _inside, buckets_of, is_linear, shapes, to_mlx, to_torch
from ditkit.models.encoders import UMT5TextEncoder
from ditkit.models.umt5 import UMT5Config, build_umt5
from ditkit.setup import Setup
from ditkit.shapes.measure import psnr

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = Path(ditkit.__file__).parent / "assets/shapes/text_encoder"


def load(folder: Path, dtype: torch.dtype = torch.float32, backend: str = "mlx") -> MLXTextEncoder:
    files = TensorFiles(folder)
    config = UMT5Config(**KINDS["umt5"].read_config("transformers", read_json(folder / "config.json"), files.tensors))
    return MLXTextEncoder.load(config, files, dtype, "cpu", backend)


def golden(dtype: torch.dtype) -> MLXTextEncoder:
    config = UMT5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4,
    )  # fmt: skip
    files = TensorFiles(torchs.GOLDEN / "models_t5_umt5-xxl-enc.safetensors")
    return MLXTextEncoder.load(config, Mapped(files, umt5_keys(config.num_layers), "other"), dtype)


def prompt(length: int, words: int) -> list[int]:
    g = torch.Generator().manual_seed(length)
    return [*torch.randint(2, words, (length - 1,), generator=g).tolist(), 1]


# --- numbers


def test_the_official_outputs_in_float32():
    encoder = golden(torch.float32)
    for ids, expected, _ in golden_cases():
        assert encoder(ids).shape == expected.shape
        assert rel(encoder(ids), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_near_as_torchs(dtype):
    encoder, theirs = golden(dtype), golden_encoder(dtype)
    for ids, expected, _ in golden_cases():
        rows = encoder(ids)
        assert rows.dtype == dtype
        assert l2(rows, expected) <= 1.5 * l2(theirs(ids), expected)


def transformers_umt5(config: UMT5Config):
    """The network that ours has to agree with."""
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    settings = {"feed_forward_proj": "gated-gelu", "attn_implementation": "eager"}
    return UMT5EncoderModel(TheirConfig(**asdict(config), **settings)).eval()


SIZES = [
    {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 3},
    {"d_model": 64, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 5, "relative_attention_num_buckets": 16,
     "relative_attention_max_distance": 40, "layer_norm_epsilon": 1e-4},
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_random_sizes_and_all_lengths_against_transformers(sizes, tmp_path):
    config = UMT5Config(vocab_size=99, **sizes)
    theirs = tiny.randomise(transformers_umt5(config), 5)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name != "shared.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    ours = MLXTextEncoder.load(config, TensorFiles(tmp_path), torch.float32)
    for length in (1, 2, 129, 512):
        ids = prompt(length, 99)
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert rel(ours(ids), expected) <= 2e-5, length


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (16, 40), (8, 64)])
def test_every_distance_falls_where_transformers_has_it(buckets, reach):
    config = UMT5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=reach,
    )  # fmt: skip
    theirs = transformers_umt5(config).encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-600, 601)
    assert torch.equal(buckets_of(distances, buckets, reach), theirs._relative_position_bucket(distances))


def test_known_distances_of_umt5():
    known = {0: 0, 1: 17, 7: 23, 8: 24, 16: 26, 127: 31, 128: 31, -1: 1, -8: 8, -16: 10, -128: 15}
    assert buckets_of(torch.tensor(list(known)), 32, 128).tolist() == list(known.values())


def test_float16_leaves_its_range_where_transformers_does_and_comes_back(tmp_path):
    """Rows of the first attention sum to more than float16 holds; the last linear layer of the feed-forward too."""
    config = UMT5Config(vocab_size=20, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    model = tiny.randomise(build_umt5(config).to_empty(device="cpu"), 8)
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.o.weight.mul_(6e4)
        model.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(2e4)
    save_file({k: v.clone() for k, v in model.state_dict().items() if k != "shared.weight"}, tmp_path / "a.safetensors")
    theirs = UMT5TextEncoder.load(config, TensorFiles(tmp_path), torch.float16)
    ours = MLXTextEncoder.load(config, TensorFiles(tmp_path), torch.float16)
    ids = prompt(9, 20)
    seen = []
    layer = theirs.model.encoder.block[0].layer[0]
    layer.register_forward_hook(lambda module, args, out: seen.append(out[0].isinf().any().item()))
    expected, rows = theirs(ids), ours(ids)
    assert seen == [True]
    assert expected.isfinite().all()
    assert l2(rows, expected) <= 1e-2


def test_the_range_that_float16_comes_back_to_is_smaller_where_something_was_infinite():
    for numbers in ([65504.0, -3.0, -65504.0], [torch.inf, 64900.0, -torch.inf]):
        x = torch.tensor(numbers, dtype=torch.float16)
        limit = torch.where(x.isinf().any(), torch.finfo(x.dtype).max - 1000, torch.finfo(x.dtype).max).to(x.dtype)
        assert to_torch(_inside(to_mlx(x))).tolist() == x.clamp(-limit, limit).tolist()


# --- weights


def llamas(name: str) -> str:
    """transformers' name -> llama.cpp's."""
    for theirs, word in (
        ("shared", "token_embd"), ("encoder.final_layer_norm", "enc.output_norm"), ("encoder.block", "enc.blk"),
        ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"), ("layer.0.SelfAttention.", "attn_"),
        ("layer.0.layer_norm", "attn_norm"), ("layer.1.layer_norm", "ffn_norm"),
        ("layer.1.DenseReluDense.wi_0", "ffn_gate"), ("layer.1.DenseReluDense.wi_1", "ffn_up"),
        ("layer.1.DenseReluDense.wo", "ffn_down"),
    ):  # fmt: skip
        name = name.replace(theirs, word)
    return name


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """One encoder in the layouts that people have: diffusers, the official pickle, float8, GGUF."""
    gguf = pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("layouts")
    for layout in tiny.LAYOUTS:
        tiny.write(root / layout, "t2v", layout)
    native = next((root / "native").glob("models_t5*"))
    tensors = torch.load(native, weights_only=True)
    narrow = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 and "embedding" not in k else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in narrow.items()}, root / "fp8.safetensors")
    writer = gguf.GGUFWriter(root / "text.gguf", "t5encoder")
    for name, tensor in TensorFiles(root / "diffusers/text_encoder"):
        packed = is_linear(name) and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType["Q8_0" if packed else "F32"]
        writer.add_tensor(llamas(name), gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "diffusers": root / "diffusers/text_encoder", "native": native, "fp8": root / "fp8.safetensors",
        "gguf": root / "text.gguf",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["diffusers", "native", "fp8", "gguf"])
def test_every_layout_gives_the_bits_that_torch_gets(layouts, layout, dtype):
    part = open_part(layouts[layout], "text_encoder")
    config = UMT5Config(**part.config)
    theirs = UMT5TextEncoder.load(config, part.source, dtype).model.state_dict()
    ours = MLXTextEncoder.load(config, part.source, dtype).network.weights
    assert ours.keys() == shapes(config).keys() == theirs.keys() - {"encoder.embed_tokens.weight"}
    for name, array in ours.items():
        assert to_torch(array).dtype == theirs[name].dtype, name
        assert torch.equal(to_torch(array), theirs[name]), name


def test_two_layouts_of_the_same_numbers_give_the_same_rows(layouts):
    both = [open_part(layouts[name], "text_encoder") for name in ("diffusers", "native")]
    rows = [MLXTextEncoder.load(UMT5Config(**p.config), p.source, torch.bfloat16)([4, 9, 17, 1]) for p in both]
    assert torch.equal(*rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_and_go_bit_for_bit(dtype):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).T
    assert torch.equal(to_torch(to_mlx(tensor)), tensor)
    assert to_torch(to_mlx(tensor)).dtype == dtype


def test_one_tensor_of_torch_is_held_at_a_time(saved):  # noqa: F811
    alive: list[weakref.ref] = []
    most = []

    class Watched(TensorFiles):
        def cast(self, name, dtype=None, look=lambda part: None):
            tensor = super().cast(name, dtype, look)
            most.append(sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(tensor))
            return tensor

    files = Watched(saved)
    config = UMT5Config(**KINDS["umt5"].read_config("transformers", read_json(saved / "config.json"), files.tensors))
    MLXTextEncoder.load(config, files, torch.bfloat16)
    assert len(most) == len(files.tensors)
    assert max(most) <= 1  # the one before, until its array takes the next one's place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder.final_layer_norm.weight": None}, "1 tensors are missing"),
        ({"encoder.final_layer_norm.bias": torch.ones(32)}, "1 tensors are unknown"),
        ({"encoder.final_layer_norm.weight": torch.ones(33)}, "1 tensors have another shape"),
        ({"encoder.final_layer_norm.weight": torch.full((32,), torch.inf)}, "infinite or undefined"),
        ({"encoder.embed_tokens.weight": torch.ones(99, 32)}, "differs from its other name shared.weight"),
    ],
)
def test_loading_is_strict(saved, change, said):  # noqa: F811
    tensors = dict(TensorFiles(saved)) | change
    file = saved / "model.safetensors"
    file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(LoadError, match=said):
        load(saved)


def test_the_real_encoder_has_the_tensors_that_torch_has():
    sizes = UMT5Config()
    theirs = {name: tuple(t.shape) for name, t in build_umt5(sizes).state_dict().items() if "embed_tokens" not in name}
    assert shapes(sizes) == theirs
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == 5_680_910_336


# --- packed weights


@pytest.mark.parametrize(
    ("backend", "dtype", "worst"),
    [
        ("mlx-8bit", torch.float32, 0.03),
        ("mlx-8bit", torch.float16, 0.05),
        ("mlx-8bit", torch.bfloat16, 0.12),
        ("mlx-4bit", torch.float32, 0.25),
        ("mlx-4bit", torch.bfloat16, 0.35),
    ],
)
def test_packed_weights_are_near_and_as_small_as_promised(backend, dtype, worst):
    """Measured: 0.020, 0.034, 0.077, 0.18, 0.24. The scales have the dtype: bfloat16 rounds them by up to 0.4 %."""
    plain, packed = load(SHAPES), load(SHAPES, dtype, backend)
    ids = prompt(40, 160)
    floor = l2(load(SHAPES, dtype)(ids), plain(ids))
    assert floor < l2(packed(ids), plain(ids)) <= worst
    bits, expected = int(backend[4]), 0
    for name, shape in shapes(plain.network.sizes).items():
        numbers = torch.Size(shape).numel()
        size = 4 if name.endswith(".wo.weight") and dtype == torch.float16 else dtype.itemsize
        expected += numbers * bits // 8 + numbers // 64 * 2 * size if is_linear(name) else numbers * size
        assert isinstance(packed.network.weights[name], Packed) == is_linear(name)
    assert packed.facts["weight_bytes"] == expected < load(SHAPES, dtype).facts["weight_bytes"]


def test_rows_that_cannot_be_packed_are_refused(saved):  # noqa: F811
    with pytest.raises(SetupError, match=r"q\.weight has rows of 32 numbers.*Use the backend mlx"):
        load(saved, backend="mlx-8bit")


# --- one encoder


@pytest.mark.parametrize("backend", ["mlx", "mlx-8bit"])
def test_two_threads_get_what_one_gets(backend):
    """It was loaded by a third one: an array that is still to be computed cannot leave its thread."""
    loaded: list[MLXTextEncoder] = []
    loader = threading.Thread(target=lambda: loaded.append(load(SHAPES, torch.bfloat16, backend)))
    loader.start()
    loader.join()
    encoder = loaded[0]
    inputs = [[n % 99 for n in range(start, start + length)] for start, length in ((1, 40), (7, 3), (50, 17), (2, 1))]
    expected = [encoder(ids) for ids in inputs]
    right: list[bool] = []
    barrier = threading.Barrier(2)

    def work(order: list[int]) -> None:
        barrier.wait()
        right.extend(torch.equal(encoder(inputs[i]), expected[i]) for i in order * 15)

    threads = [threading.Thread(target=work, args=(order,)) for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 120


def test_the_contract_and_the_fingerprint(saved):  # noqa: F811
    first, same, other = load(saved), load(saved), load(saved, torch.bfloat16)
    assert isinstance(first, TextEncoder)
    assert first.fingerprint == same.fingerprint
    named = {first.fingerprint, other.fingerprint, torchs.load(saved).fingerprint}
    named |= {load(SHAPES, backend=b).fingerprint for b in ("mlx", "mlx-8bit", "mlx-4bit")}
    assert len(named) == 6


def test_bad_ids_are_refused(saved):  # noqa: F811
    encoder = load(saved)
    with pytest.raises(RequestError, match="no tokens"):
        encoder([])
    for ids in ([1, 99], [-1, 4]):
        with pytest.raises(LoadError, match="knows 0 to 98"):
            encoder(ids)


# --- the setting


def text_encoder_of(setup: Setup) -> tuple[Components, object]:
    components = Components(Model.open("shapes", setup), setup)
    return components, components["text_encoder"]


def test_the_setting_chooses_and_the_identity_says_so():
    told = {}
    for backend in ("torch", "mlx", "mlx-8bit", "mlx-4bit"):
        setup = Setup(backends={"text_encoder": backend})
        components, encoder = text_encoder_of(setup)
        told[backend] = components.describe()["text_encoder"]
        assert encoder.fingerprint == Components(components.model, setup).fingerprint_of("text_encoder")
        told[backend]["fingerprint"] = encoder.fingerprint
        assert isinstance(encoder, UMT5TextEncoder if backend == "torch" else MLXTextEncoder)
    assert len({facts["fingerprint"] for facts in told.values()}) == 4
    facts = told["mlx-8bit"]
    assert (facts["class"], facts["dtype"], facts["device"]) == ("MLXTextEncoder", "float32", "cpu")
    assert facts["backend"].startswith("mlx-8bit (mlx 0.")
    assert facts["weight_bytes"] < told["mlx"]["weight_bytes"]
    plain, named = Setup(), Setup(backends={"text_encoder": "torch"})
    model = Model.open("shapes", plain)
    assert len({Components(model, s).fingerprint_of("text_encoder") for s in (plain, named)}) == 1


def test_one_store_of_parts_keeps_backends_apart():
    from ditkit.shared import Shared

    shared, setups = Shared(), [Setup(), Setup(backends={"text_encoder": "mlx"})]
    encoders = [Components(Model.open("shapes", s), s, shared=shared)["text_encoder"] for s in setups]
    assert [type(e) for e in encoders] == [UMT5TextEncoder, MLXTextEncoder]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backends": {"vae": "mlx"}}, "vae is computed by torch only"),
        ({"backends": {"text_encoder": "mxl"}}, "did you mean 'mlx'"),
        ({"backends": {"text_encodr": "mlx"}}, "there is no component"),
    ],
)
def test_a_backend_that_there_is_not(values, said):
    with pytest.raises(SetupError, match=said):
        Setup.of(values)


def test_a_dtype_or_device_that_mlx_does_not_have():
    with pytest.raises(SetupError, match=r"not in float64\. Set dtypes\.text_encoder"):
        text_encoder_of(Setup(dtype="float64", backends={"text_encoder": "mlx"}))
    with pytest.raises(SetupError, match="MLX computes it on cpu"):
        Setup(device="cuda:7", backends={"text_encoder": "mlx"}).device_of("text_encoder")


def test_on_apple_silicon_its_gpu_and_bfloat16_are_chosen(monkeypatch):
    """Which devices there are is all that is pretended."""
    import mlx.core as mx

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    setup = Setup(backends={"text_encoder": "mlx"})
    assert (setup.device_of("text_encoder"), setup.dtype_of("text_encoder")) == ("mps", "bfloat16")
    on_cpu = Setup(backends={"text_encoder": "mlx"}, devices={"text_encoder": "cpu"})
    assert (on_cpu.device_of("text_encoder"), on_cpu.dtype_of("text_encoder")) == ("cpu", "float32")


def test_without_mlx_the_error_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, "ditkit.mlx.umt5")
    with pytest.raises(MissingDependency, match=r'pip install "ditkit\[mlx\]"'):
        text_encoder_of(Setup(backends={"text_encoder": "mlx"}))
    with pytest.raises(MissingDependency, match=r'pip install "ditkit\[mlx\]"'):
        import ditkit.mlx.umt5  # noqa: F401


@pytest.mark.parametrize(("backend", "least"), [("mlx", 70.0), ("mlx-8bit", 55.0)])
def test_a_clip_with_text_from_mlx_is_nearly_the_same(backend, least):
    """The bound is on the finished frames, in dB. Measured: 93 and 78."""
    asked = {"prompt": "a red circle moving left on a black background", "seed": 3, "steps": 4}
    plain = ditkit.load("shapes")(**asked)
    ours = ditkit.load("shapes", backends={"text_encoder": backend})(**asked)
    bound = 1e-5 if backend == "mlx" else 0.01
    assert 0 < rel(ours.state["prompt_embeds"], plain.state["prompt_embeds"]) <= bound
    assert psnr(ours.video, plain.video) >= least
