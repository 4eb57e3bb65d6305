"""Every published transformer is built at full size, without memory, and counted; diffusers' class agrees."""

import pytest
import tiny
import tiny_names as names
import torch

from ditkit.models.published import OFFICIAL
from ditkit.models.wan import WanTransformer

PUBLISHED = {
    "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.1-vace-1.3b", "wan2.1-vace-14b",
    "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
}  # fmt: skip


def test_every_published_model_is_there():
    assert OFFICIAL.keys() == PUBLISHED
    repositories = [r for official in OFFICIAL.values() for r in official.repositories]
    assert len(repositories) == len(set(repositories)) == 10
    assert [name for name, official in OFFICIAL.items() if official.experts == 2] == [
        "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b",
    ]
    assert all(official.config.head_dim == 128 for official in OFFICIAL.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters_and_tensors(name):
    official = OFFICIAL[name]
    with torch.device("meta"):
        model = WanTransformer(official.config)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == official.parameters
    assert len(parameters) == len(model.state_dict()) == official.tensors


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_those_of_diffusers(name):
    """Every tensor of the full size has its counterpart in diffusers' class, of the same shape."""
    import diffusers

    config = OFFICIAL[name].config
    kind = getattr(diffusers, "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel")
    with torch.device("meta"):
        ours, theirs = WanTransformer(config), kind.from_config(tiny.transformer_json(config, kind.__name__))
    ours = names.renamed(ours.state_dict(), names.TRANSFORMER)
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.state_dict().items()}
