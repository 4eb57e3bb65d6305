"""Our UMT5 against the official outputs (golden) and against transformers' own loading and padding."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.contracts import TextEncoder
from ditkit.errors import LoadError, RequestError
from ditkit.models.encoders import UMT5TextEncoder
from ditkit.models.umt5 import UMT5Config, build_umt5

GOLDEN = Path(__file__).parents[1] / "data/golden/umt5"


def golden_encoder(dtype: torch.dtype = torch.float32) -> UMT5TextEncoder:
    raw = json.loads((GOLDEN / "config.json").read_text())
    config = UMT5Config(
        vocab_size=raw["vocab_size"],
        d_model=raw["dim"],
        d_kv=raw["dim_attn"] // raw["num_heads"],
        d_ff=raw["dim_ffn"],
        num_layers=raw["num_layers"],
        num_heads=raw["num_heads"],
        relative_attention_num_buckets=raw["num_buckets"],
        relative_attention_max_distance=raw["max_distance"],
        layer_norm_epsilon=raw["eps"],
    )
    files = TensorFiles(GOLDEN / "models_t5_umt5-xxl-enc.safetensors")
    return UMT5TextEncoder.load(config, Mapped(files, umt5_keys(config.num_layers), "other"), dtype)


def golden_cases() -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    io = TensorFiles(GOLDEN / "io.safetensors")
    lengths = io["mask"].sum(1).tolist()
    return [
        (io["ids"][i, :length].tolist(), io[f"output.{i}"], io[f"output_bf16.{i}"]) for i, length in enumerate(lengths)
    ]


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_official_outputs_in_float32():
    encoder = golden_encoder()
    for ids, expected, _ in golden_cases():
        assert encoder(ids).shape == expected.shape
        assert rel(encoder(ids), expected) <= 1e-5


def test_bfloat16_is_as_near_as_the_official_bfloat16():
    encoder = golden_encoder(torch.bfloat16)
    for ids, expected, official in golden_cases():
        rows = encoder(ids)
        assert rows.dtype == torch.bfloat16
        assert l2(rows, expected) <= 1.5 * l2(official, expected)


def test_r4_every_prompt_of_a_list_is_encoded():
    """A predecessor returned from its loop after the first prompt."""
    encoder, cases = golden_encoder(), golden_cases()
    rows = [encoder(ids) for ids, _, _ in cases]
    assert len(rows) == len(cases) == 3
    for row, (ids, expected, _) in zip(rows, cases, strict=True):
        assert len(row) == len(ids)
        assert rel(row, expected) <= 1e-5


@pytest.fixture
def saved(tmp_path):
    """A random tiny encoder, saved by transformers, with nothing left at 0 or 1."""
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    torch.manual_seed(11)
    config = TheirConfig(vocab_size=99, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_heads=3)
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1, 0.2)
    model.save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> UMT5TextEncoder:
    files = TensorFiles(folder)
    return UMT5TextEncoder.load(
        UMT5Config(**KINDS["umt5"].read_config("transformers", read_json(folder / "config.json"), files.tensors)),
        files,
        dtype,
    )


IDS = [5, 77, 3, 3, 98, 60, 12, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("large", [1.0, 300.0])
def test_every_length_and_dtype_has_the_bits_of_transformers(saved, dtype, large, tmp_path):
    """Also where float16 leaves its range and comes back."""
    from transformers import UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[0].SelfAttention.o.weight.mul_(large)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(large)
    theirs.save_pretrained(tmp_path / "large")
    theirs = UMT5EncoderModel.from_pretrained(tmp_path / "large", dtype=dtype, attn_implementation="eager").eval()
    (tmp_path / "large/config.json").write_text((saved / "config.json").read_text())
    ours = load(tmp_path / "large", dtype)
    for length in (1, 2, 7, 60, 130, 300, 512):
        ids = torch.randint(0, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert ours(ids).dtype == expected.dtype
        assert torch.equal(ours(ids), expected), length


def test_a_model_opens_and_encodes_without_transformers_and_without_torchs_compiler(tiny_model):
    """Each costs seconds of a short run."""
    code = f"""
import sys, ditkit
pipe = ditkit.load({str(tiny_model)!r})
pipe("a red circle", steps=1)
sys.exit(" ".join(sys.modules.keys() & {{"transformers", "torch._dynamo", "diffusers", "sympy"}}) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_dtypes_are_those_of_transformers(saved, dtype):
    from transformers import UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(saved, dtype=dtype, attn_implementation="eager").eval()
    ours = load(saved, dtype)
    state, expected = ours.model.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) and state[k].dtype == expected[k].dtype for k in expected)
    with torch.no_grad():
        rows = theirs(input_ids=torch.tensor([IDS])).last_hidden_state[0]
    assert torch.equal(ours(IDS), rows)
    wide = {name for name, tensor in state.items() if tensor.dtype != dtype}
    assert wide == ({name for name in state if name.endswith(".wo.weight")} if dtype == torch.float16 else set())


def test_padding_and_masking_would_give_the_same_rows(saved):
    from transformers import UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(saved, dtype=torch.float32).eval()
    ids = torch.tensor([IDS + [0] * (512 - len(IDS))])
    with torch.no_grad():
        padded = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[0, : len(IDS)]
    assert rel(load(saved)(IDS), padded) <= 5e-6


def test_it_works_inside_and_outside_of_inference_mode(saved):
    encoder = load(saved)
    outside = encoder(IDS)
    with torch.inference_mode():
        inside = encoder(IDS)
        made_inside = load(saved)
    assert torch.equal(outside, inside)
    assert torch.equal(outside, made_inside(IDS))
    assert not outside.requires_grad
    assert not outside.is_inference()
    torch.nn.Linear(32, 1)(outside).sum().backward()  # features can feed a training


def test_no_dropout_is_active(saved):
    encoder = load(saved)
    assert not any(module.training for module in encoder.model.modules())
    assert torch.equal(encoder(IDS), encoder(IDS))


def test_two_threads_get_what_one_gets(saved):
    encoder = load(saved)
    inputs = [[n % 99 for n in range(start, start + length)] for start, length in ((1, 40), (7, 3), (50, 17), (2, 1))]
    expected = [encoder(ids) for ids in inputs]
    wrong: list[int] = []
    barrier = threading.Barrier(2)

    def work(order: list[int]) -> None:
        barrier.wait()
        wrong.extend(i for i in order * 15 if not torch.equal(encoder(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(order,)) for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_contract_and_the_fingerprint(saved):
    first, same, other = load(saved), load(saved), load(saved, torch.bfloat16)
    assert isinstance(first, TextEncoder)
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_the_embedding_is_one_tensor_under_both_names(saved):
    encoder = load(saved)
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_bad_ids_are_refused(saved):
    encoder = load(saved)
    with pytest.raises(RequestError, match="no tokens"):
        encoder([])
    for ids in ([1, 99], [-1, 4]):
        with pytest.raises(LoadError, match="knows 0 to 98"):
            encoder(ids)


def test_building_takes_no_memory():
    model = build_umt5(UMT5Config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    own = [tensor for name, tensor in model.state_dict().items() if name not in UMT5_ALIASES]
    assert (len(own), sum(tensor.numel() for tensor in own)) == (242, 5_680_910_336)
