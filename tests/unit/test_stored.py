"""The stored form of a tensor through all views: it stands for the very numbers that the same views give."""

from pathlib import Path

import pytest
import torch
from held import Held
from safetensors.torch import save_file
from test_quantized import E4, E5, coded, dense

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.lora.merge import Merged
from ditkit.checkpoints.lora.read import read_lora
from ditkit.checkpoints.views.key_table import KeyTable, Rule
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.prefixes import Unprefixed
from ditkit.checkpoints.views.quantized import Dequantized
from ditkit.checkpoints.views.source import Stored
from ditkit.errors import LoadError

TABLE = KeyTable.of(
    [("native.weight", "a.weight"), ("native.bias", "a.bias")],
    Rule(("joined.weight",), ("q.weight", "k.weight")),
)


def view(folder: Path, tensors: dict[str, torch.Tensor]) -> Mapped:
    """All views but LoRAs, one on the other, over a file with a prefix."""
    save_file({f"model.{name}": tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return Mapped(Dequantized(Unprefixed(TensorFiles(folder))), TABLE, "native")


def numbers(form: Stored) -> torch.Tensor:
    """As the table in the docstring of ``Stored`` says."""
    if form.format == "gguf Q8_0":
        scale, codes = (
            form.codes[:, :2].contiguous().view(torch.float16),
            form.codes[:, 2:].contiguous().view(torch.int8),
        )
        return (codes.float() * scale.float()).reshape(form.shape)
    return form.codes.float() if form.scales is None else form.codes.float() * form.scales


def scaled(dtype: torch.dtype, by_row: bool) -> dict[str, torch.Tensor]:
    codes, scale = coded(dense(), dtype, by_row)
    return {"a.weight": codes, "a.weight_scale": scale}


CASES = {
    "plain": ({"a.weight": dense().bfloat16()}, "plain", torch.bfloat16, None),
    "fp8": ({"a.weight": dense().to(E4)}, "fp8", E4, None),
    "scaled": (scaled(E5, False), "fp8_scaled", E5, ()),
    "scaled by row": (scaled(E4, True), "fp8_scaled", E4, (6, 1)),
    "int8": (scaled(torch.int8, False), "int8", torch.int8, ()),
    "int8 by row": (scaled(torch.int8, True), "int8", torch.int8, (6, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_form_stands_for_the_numbers_of_the_views(tmp_path, case):
    tensors, name, dtype, scales = CASES[case]
    source = view(tmp_path, tensors | {"a.bias": torch.arange(6.0)})
    form = source.stored("native.weight")
    assert (form.format, form.codes.dtype, form.shape) == (name, dtype, (6, 8))
    assert (None if form.scales is None else tuple(form.scales.shape)) == scales
    assert torch.equal(numbers(form), source["native.weight"].float())
    assert torch.equal(source.stored("native.bias").codes, torch.arange(6.0))


def test_blocks_of_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_gguf import blocks, written

    data = {"model.a.weight": ("Q8_0", blocks("Q8_0", 6, 64)), "model.a.bias": ("F16", blocks("F16", 6))}
    source = Mapped(Dequantized(Unprefixed(open_source(written(tmp_path / "x.gguf", data)))), TABLE, "native")
    form = source.stored("native.weight")
    assert (form.format, form.shape, form.codes.shape, form.scales) == ("gguf Q8_0", (6, 64), (12, 34), None)
    assert form.codes.numpy().tobytes() == data["model.a.weight"][1].tobytes()
    assert torch.equal(numbers(form), source["native.weight"])
    assert torch.equal(form.to("cpu").codes, form.codes)
    plain = source.stored("native.bias")
    assert (plain.format, plain.codes.dtype) == ("plain", torch.float16)
    assert gguf


def test_what_is_joined_has_a_form_only_if_it_is_plain(tmp_path):
    source = view(tmp_path, {"q.weight": dense(), "k.weight": -dense()})
    form = source.stored("joined.weight")
    assert (form.format, form.shape) == ("plain", (12, 8))
    assert torch.equal(form.codes, source["joined.weight"])
    source = view(tmp_path, {"q.weight": dense().to(E4), "k.weight": dense().to(E4)})
    with pytest.raises(
        LoadError, match=r"keeping joined\.weight of .* as it is stored: Mapped made it of other tensors"
    ):
        source.stored("joined.weight")


def test_a_merged_tensor_has_none_and_says_so(tmp_path):
    base = Held({"blocks.0.self_attn.q.weight": torch.ones(4, 4), "blocks.0.self_attn.k.weight": torch.ones(4, 4)})
    factors = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 4),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(4, 1),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    shapes = {name: tuple(facts.shape) for name, facts in base.tensors.items()}
    merged = Merged(base, [(read_lora(TensorFiles(tmp_path / "lora.safetensors"), shapes), 1.0)])
    assert merged.stored("blocks.0.self_attn.k.weight").format == "plain"
    with pytest.raises(LoadError, match=r"self_attn\.q\.weight of held as it is stored: a LoRA is merged into it"):
        merged.stored("blocks.0.self_attn.q.weight")


def test_codes_that_nobody_explained_are_no_numbers(tmp_path):
    save_file({"a.weight": dense().to(E4)}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match="it is F8_E4M3, and nobody has told what that stands for"):
        TensorFiles(tmp_path).stored("a.weight")
