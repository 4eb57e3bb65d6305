"""Prefixes: taken away as whole segments, only when all tensors have them, and never so that names collide."""

import pytest
import torch
from safetensors.torch import save_file

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.views.prefixes import Unprefixed, shared_prefix
from ditkit.errors import LoadError

BARE = ("blocks.0.self_attn.q.weight", "head.modulation", "patch_embedding.bias")


def source(folder, names) -> TensorFiles:
    save_file({name: torch.full((2,), float(n)) for n, name in enumerate(names)}, folder / "x.safetensors")
    return TensorFiles(folder)


@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.", "module.model."],
)
def test_a_shared_prefix_is_taken_away_and_told(tmp_path, prefix):
    view = Unprefixed(source(tmp_path, [prefix + name for name in BARE]))
    assert view.prefix == prefix
    assert set(view.tensors) == set(BARE)
    assert [view[name][0] for name in BARE] == [0, 1, 2]
    assert {name: int(tensor[0]) for name, tensor in view} == {name: n for n, name in enumerate(BARE)}
    assert view.notes == ((f"{prefix} was removed from the names",) if prefix else ())
    assert (view.sha256, view.files, view.path) == (view.source.sha256, view.source.files, view.source.path)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.blocks.0.self_attn.q.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight",
        "_fsdp_wrapped_module.model.blocks.0._checkpoint_wrapped_module.self_attn.q.weight",
        "module._orig_mod.blocks.0.self_attn.q.weight",
    ],
)
def test_wrappers_are_removed_wherever_they_stand(tmp_path, name):
    assert set(Unprefixed(source(tmp_path, [name])).tensors) == {BARE[0]}


def test_only_whole_segments_of_all_tensors_count(tmp_path):
    for names in (
        ["model.a", "b"],
        ["model.a", "other"],
        ["modelx.a", "modelx.b"],
        ["transformer_2.a", "transformer_2.b"],
        ["my_orig_mod.a"],
        ["blocks.0.module.a"],
    ):
        view = Unprefixed(source(tmp_path, names))
        assert (set(view.tensors), view.prefix, view.notes) == (set(names), "", ())


def test_markers_may_stand_outside(tmp_path):
    view = Unprefixed(source(tmp_path, ["scaled_fp8", "spiece_model", "model.diffusion_model.a"]))
    assert set(view.tensors) == {"scaled_fp8", "spiece_model", "a"}
    assert set(Unprefixed(source(tmp_path, ["model.scaled_fp8", "model.a"])).tensors) == {"scaled_fp8", "a"}
    assert shared_prefix(["scaled_fp8"]) == ""


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    with pytest.raises(LoadError, match=r"_orig_mod\.a, a would both be a"):
        Unprefixed(source(tmp_path, ["a", "_orig_mod.a"]))


def test_the_self_forcing_checkpoint(tmp_path):
    torch.save({"generator_ema": {"model._fsdp_wrapped_module.a": torch.ones(1)}}, tmp_path / "x.pt")
    view = Unprefixed(open_source(tmp_path))
    assert view["a"] == 1
    assert view.notes == ("model. was removed from the names", "_fsdp_wrapped_module was removed from the names")
