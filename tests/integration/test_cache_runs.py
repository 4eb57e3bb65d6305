"""Runs with a cache: what is found, what is not, what that saves, and what is said about it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from shell import alone

import ditkit


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def full(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "cache"
    ditkit.load(tiny_model, cache=str(folder))("a red circle", seed=3)
    return folder


@pytest.fixture
def filled(full, tmp_path):
    """A cache that holds all results of one run."""
    return shutil.copytree(full, tmp_path / "filled")


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


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


def test_the_same_by_the_command_line_in_a_new_process(model, tmp_path, folder):
    plain = ditkit.load(model, cache=str(folder))("a red circle", seed=3)
    words = ["generate", "a red circle", "--seed", 3, "--model", model, "--cache", folder, "--json", "--out", "a.npz"]
    said = subprocess.run([sys.executable, "-m", "ditkit", *map(str, words)], cwd=tmp_path, env=alone(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert (told["stages"], told["loads"]) == ({}, {}), told["cached"]
    assert [why[:9] for why in told["cached"].values()] == ["hit: made"] * 3
    assert told["output_sha256"] == [plain.manifests[0]["output_sha256"]]
    assert said.stderr.count("hit: made on") == 3, "and a person is told"


def test_clips_one_after_the_other_and_each_by_itself(tiny_model, folder):
    prompts = ["a red circle", "a blue square"]
    plain = ditkit.load(tiny_model)(prompts, seed=3).state
    pipe = ditkit.load(tiny_model, cache=str(folder))
    first, again = ran(pipe, prompts), ran(pipe, prompts)
    assert first[1] == ["encode_text", "denoise", "decode_latents", "denoise", "decode_latents"]
    assert again[1] == []
    for result in (first[0], again[0]):
        assert result.state.equal(plain)
        assert result.state.fingerprints == plain.fingerprints
    assert not first[0].state["video"][0].equal(first[0].state["video"][1])


def test_what_was_made_elsewhere_is_found_here_and_nothing_travels_on_a_hit(tiny_model, folder):
    plain = ditkit.load(tiny_model)("a red circle", seed=3).state
    placement = {"encode_text": "process", "denoise@2": "process"}
    there = ditkit.load(tiny_model, cache=str(folder), placement=placement)
    try:
        first, stages, _ = ran(there)
        assert stages == ["encode_text", "denoise", "denoise", "decode_latents"]
        assert len(first.receipt["travelled"]) == 2
        again, stages, _ = ran(there)
        assert (stages, again.receipt["travelled"]) == ([], [])
    finally:
        there.places.close()
    here, stages, loaded = ran(ditkit.load(tiny_model, cache=str(folder)))
    assert (stages, loaded) == ([], [])
    for result in (first, again, here):
        assert result.state.equal(plain)
        assert result.state.fingerprints == plain.fingerprints


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"steps": 3}, ["denoise", "decode_latents"]),
        ({"scheduler": "euler"}, ["denoise", "decode_latents"]),
        ({"guidance_scale": 3.0}, ["denoise", "decode_latents"]),
        ({"rounding": "diffusers"}, ["decode_latents"]),
        ({"fps": 30}, []),
        ({"max_sequence_length": 4}, ["encode_text", "denoise", "decode_latents"]),
        ({"negative_prompt": "ugly"}, ["encode_text", "denoise", "decode_latents"]),
    ],
    ids=str,
)
def test_only_what_depends_on_a_setting_is_computed_again(tiny_model, filled, changes, stages):
    pipe = ditkit.load(tiny_model, cache=str(filled))
    result, ran_now, _ = ran(pipe, **changes)
    assert ran_now == stages
    plain = ditkit.load(tiny_model)("a red circle", seed=3, **changes)
    assert result.state.equal(plain.state)
    assert result.state.fingerprints == plain.state.fingerprints
    whys = [why for why in result.receipt["cached"].values() if why.startswith("miss")]
    assert len(whys) == len(stages)
    assert not whys or next(iter(changes)) in whys[0]


def test_another_seed_and_another_prompt(tiny_model, filled):
    pipe = ditkit.load(tiny_model, cache=str(filled))
    result = pipe("a red circle", seed=4)
    assert result.receipt["cached"]["denoise"] == "miss: the nearest one differs: seed is another one"
    result = pipe("a blue circle", seed=3)
    assert result.receipt["cached"]["encode_text"] == "miss: the nearest one differs: prompt is another one"
    assert "prompt_embeds is another one" in result.receipt["cached"]["denoise"]


def test_half_a_loop_is_never_kept(tiny_model, folder):
    plain = ditkit.load(tiny_model)("a red circle", seed=3).state
    pipe = ditkit.load(tiny_model, cache=str(folder))
    half = pipe.run(begin(pipe), stop_at_step=2).state
    assert list(pipe.results.contents()) == ["encode_text"]
    assert pipe.run(half).state.equal(plain), "what goes on from a half is whole, but was not made in one go here"
    assert "denoise" not in pipe.results.contents()
    pipe.run(begin(pipe))
    whole = pipe.results.contents()
    assert whole["denoise"][0] == 1
    assert pipe.run(begin(pipe), stop_at_step=3).state["step"] == 3, "a part that is asked for is not the whole"


def doubled(inner):
    def predict(x, step):
        return 2 * inner(x, step)

    return predict


def test_plugs_count_for_the_stage_that_asks_for_them(tiny_model, filled):
    plain = ditkit.load(tiny_model)("a red circle", seed=3).state
    factor = 2
    for wrapper, kept in ((doubled, True), (lambda inner: lambda x, step: factor * inner(x, step), False)):
        seams = ditkit.Seams(predict=(wrapper,))
        expected = ditkit.load(tiny_model, seams=seams)("a red circle", seed=3).state
        for again in (False, True):
            pipe = ditkit.load(tiny_model, cache=str(filled), seams=seams)
            result, stages, _ = ran(pipe)
            assert ("denoise" in stages) == (not again or not kept)
            assert "encode_text" not in stages
            assert result.state.equal(expected)
            assert result.state.fingerprints == expected.fingerprints
            assert not result.state["latents"].equal(plain["latents"])
            assert ("no name that lasts" in result.receipt["cached"]["denoise"]) == (not kept)


def test_a_picture_counts_by_its_pixels(tmp_path_factory, tmp_path, folder):
    import tiny
    from PIL import Image

    model = tiny.write(tmp_path_factory.mktemp("i2v") / "model", "i2v")
    (model / "ditkit.toml").write_text("[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 2\n")
    pipe = ditkit.load(model, cache=str(folder))
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name, suffix in (("a", "png"), ("b", "bmp")):
        Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}")
    first, stages, _ = ran(pipe, image=str(tmp_path / "a.png"))
    assert {"encode_image", "encode_condition"} < set(stages)
    again, stages, loaded = ran(ditkit.load(model, cache=str(folder)), image=str(tmp_path / "b.bmp"))
    assert (stages, loaded) == ([], [])
    assert again.state["video"].equal(first.state["video"])
    pixels[5, 5, 0] ^= 1
    other, stages, _ = ran(pipe, image=pixels)
    assert {"encode_image", "encode_condition", "denoise"} < set(stages)
    assert "image is another one" in other.receipt["cached"]["encode_image"]
    assert "encode_text" not in stages


def test_a_replay_computes(tiny_model, filled, tmp_path):
    from ditkit import replay

    result = ditkit.load(tiny_model, cache=str(filled))("a red circle", seed=3)
    assert result.receipt["stages"] == {}
    (file,) = result.save(tmp_path / "clip.npz")
    again = replay.replay(replay.read(file))
    assert again.identical
    assert set(again.result.receipt["stages"]) == {"encode_text", "denoise", "decode_latents"}


def test_a_cache_that_breaks_stops_no_run(tiny_model, folder):
    plain = ditkit.load(tiny_model)("a red circle", seed=3).state
    pipe = ditkit.load(tiny_model, cache=str(folder))
    pipe("a red circle", seed=3)
    for file in pipe.results.results.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    result = pipe("a red circle", seed=3)
    assert result.state.equal(plain)
    assert all("damaged" in why for why in result.receipt["cached"].values())
    shutil.rmtree(folder)
    result = pipe("a red circle", seed=3)
    assert result.state.equal(plain)
    for why in result.receipt["cached"].values():
        assert why.startswith("miss: the cache cannot be read (")
        assert "; not kept: the cache cannot be written (" in why


def test_ctrl_c_while_a_result_is_written_loses_nothing(tiny_model, folder, monkeypatch):
    plain = ditkit.load(tiny_model)("a red circle", seed=3).state
    pipe = ditkit.load(tiny_model, cache=str(folder))

    def interrupted(question, outcome):
        if question.stage == "denoise":
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(pipe.results, "store", interrupted)
    with pytest.raises(ditkit.Interrupted) as e:
        pipe.run(begin(pipe))
    assert e.value.state["step"] == 4
    assert pipe.run(e.value.state).state.equal(plain)
    assert list(pipe.results.results.iterdir()) == []


def test_one_that_is_too_small_says_so(tiny_model, folder):
    result, _, _ = ran(ditkit.load(tiny_model, cache=str(folder), cache_gigabytes=1e-6))
    assert "not kept: it has 0.0 MB" in result.receipt["cached"]["decode_latents"]


# --- the command


def test_show_trim_and_clear(call, tmp_path, folder, monkeypatch):
    here = ["--cache", folder]
    said = call("cache", "show", *here)
    assert (said.code, said.out) == (0, f"folder {folder} (not there yet)\nlimit  20 GB\nkept   0 results, 0.0 MB\n")
    assert not folder.exists(), "looking makes nothing"
    cache = fill(folder)
    out = call("cache", "show", *here).out
    assert "kept   3 results, 2.4 MB" in out
    assert "encode_text  3        2.4 MB" in out
    monkeypatch.setenv("DITKIT_CACHE", str(folder))
    monkeypatch.setenv("DITKIT_CACHE_GIGABYTES", "0.002")
    assert "limit  0.002 GB" in call("cache", "show").out
    assert call("cache", "trim").out == "freed 0.8 MB; 1.6 MB are left\n"
    refused = call("cache", "clear")
    assert refused.code == 2
    assert "Add --yes" in refused.err
    assert cache.contents()
    assert call("cache", "clear", "--yes").out == "freed 1.6 MB\n"
    assert cache.contents() == {}
    assert call("cache", "show", "--cache-gigabytes", "none").code == 2


def fill(folder):
    """Three results of 0.8 MB."""
    from ditkit.store.cache import Cache, StageResult
    from ditkit.store.reasons import CacheKey

    cache = Cache(folder, 10**9)
    for version in range(3):
        question = CacheKey("encode_text", version, "c", {}, {}, {}, {}, {})
        assert cache.store(question, StageResult({"prompt_embeds": torch.zeros(200_000)}, {}, None)) == ""
    return cache
