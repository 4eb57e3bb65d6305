"""Runs with a cache: what is found, what is not, what that saves, and what is said about it."""

from __future__ import annotations

import pytest

import ditkit


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def ran(pipe, prompt="a red circle", **more):
    """The result, the stages that were computed, the components that were loaded."""
    heard = []
    result = pipe(prompt, seed=3, **more, listeners=[heard.append])
    stages = [e["stage"] for e in heard if e.name == "stage.end"]
    return result, stages, [e["component"] for e in heard if e.name == "load.end"]


def test_the_same_prompt_again_loads_no_text_encoder(tiny_model, folder):
    plain = ditkit.load(tiny_model)("a red circle", seed=3)
    first, stages, _ = ran(ditkit.load(tiny_model, cache=str(folder)))
    assert stages == ["encode_text", "denoise", "decode_latents"]
    pipe = ditkit.load(tiny_model, cache=str(folder))
    again, stages, loaded = ran(pipe, steps=3)
    assert stages == ["denoise", "decode_latents"]
    assert loaded == ["transformer", "vae"]
    assert not {"text_encoder", "tokenizer"} & set(pipe.components.holder.loaded)
    assert again.receipt["cached"]["encode_text"].startswith("hit: made on 20")
    assert again.receipt["cached"]["denoise"] == "miss: the nearest one differs: steps was 4, is 3"
    whole, stages, loaded = ran(ditkit.load(tiny_model, cache=str(folder)))
    assert (stages, loaded) == ([], [])
    for one in (first, whole):
        assert one.state.equal(plain.state)
        assert one.state.fingerprints == plain.state.fingerprints
    assert ran(pipe, steps=3)[0].state.equal(again.state)
