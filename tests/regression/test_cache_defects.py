"""Wrong hits. A cache keyed on the text of the prompt gives back what another encoder made of it; each of these is a
way to get an embedding, or a clip, that is not the one that was asked for."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.state import Field, State
from ditkit.store.cache import Cache

WEIGHTS = "text_encoder/model.safetensors"
PROMPT = "a red circle moving left on black background"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("models") / "t2v")
    (folder / "ditkit.toml").write_text("[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 2\n")
    return folder


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def encoded(model, cache=None, request=(), **setup):
    """The embeddings of one prompt, and what the cache said."""
    pipe = ditkit.load(model, cache=cache, **setup)
    state = pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": 1, **dict(request)}))
    result = pipe.run(state, until="encode_text")
    return result.state, result.receipt["cached"].get("encode_text", "")


def other_weights(model):
    tensors = load_file(model / WEIGHTS)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[::2] += 0.25
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    return model


def other_tokenizer(model):
    file = model / "tokenizer" / "tokenizer.json"
    text = file.read_text()
    swapped = text.replace("red", "\0").replace("blue", "red").replace("\0", "blue")
    assert swapped != text
    file.write_text(swapped)
    return model


def other_model(folder, change):
    return lambda model: change(shutil.copytree(model, folder / "other"))


CHANGES = {
    "weights": ({"change": other_weights}, "text_encoder is another one"),
    "tokenizer": ({"change": other_tokenizer}, "tokenizer is another one"),
    "dtype": ({"dtypes": {"text_encoder": "bfloat16"}}, "text_encoder is another one"),
    "length": ({"request": {"max_sequence_length": 3}}, "max_sequence_length was 512, is 3"),
    "guidance": ({"request": {"guidance_scale": 1.0}}, "guided was True, is False"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_prompt_with_something_else_is_never_the_old_embedding(whole, cache, tmp_path, name):
    how, why = CHANGES[name]
    old, _ = encoded(whole, cache)
    change = how.get("change")
    model = whole if change is None else other_model(tmp_path, change)(whole)
    setup = {key: value for key, value in how.items() if key != "change"}
    right, _ = encoded(model, **setup)
    assert not right.equal(old), "the change matters"
    found, said = encoded(model, cache, **setup)
    assert said == f"miss: the nearest one differs: {why}"
    assert found.without("model").equal(right.without("model"))
    assert found.fingerprints == right.fingerprints
    again, said = encoded(model, cache, **setup)
    assert said.startswith("hit")
    assert again.without("model").equal(right.without("model"))
    assert encoded(whole, cache)[0].equal(old), "and the old one is still the old one"


def test_a_copy_of_the_model_is_the_same_model(whole, cache, tmp_path):
    encoded(whole, cache)
    assert encoded(shutil.copytree(whole, tmp_path / "copy"), cache)[1].startswith("hit")


def test_other_cleaning_is_another_tokenizer(whole, cache, monkeypatch):
    import ftfy

    encoded(whole, cache)
    monkeypatch.setattr(ftfy, "__version__", "0")
    assert encoded(whole, cache)[1] == "miss: the nearest one differs: tokenizer is another one"


def test_weights_that_are_replaced_in_place_with_the_old_time(whole, cache, tmp_path):
    """Size, inode and mtime are what they were, and the hash of the old content is on disk."""
    model = shutil.copytree(whole, tmp_path / "model")
    file = model / WEIGHTS
    while time.time() - file.stat().st_ctime < 2.2:
        time.sleep(0.1)
    encoded(model, cache)
    before = file.stat()
    other_weights(shutil.copytree(model, tmp_path / "made"))
    with file.open("r+b") as stream:
        stream.write((tmp_path / "made" / WEIGHTS).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    found, said = encoded(model, cache)
    assert said == "miss: the nearest one differs: text_encoder is another one"
    assert found["prompt_embeds"].equal(encoded(tmp_path / "made")[0]["prompt_embeds"])


# --- loops, seams and components of the user's own


class Named:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


@dataclasses.dataclass(frozen=True)
class Loop(BaseStage):
    """Reads a setting in its first half only."""

    name = "loop"
    reads = ("seed", "request")
    writes = ("total", "count")
    loop = ("total", "count")
    components = ("thing",)
    fields = (Field("total", "plain", "int", "", "", "loop", ""), Field("count", "plain", "int", "", "", "loop", ""))

    def done(self, state):
        return state.get("count") == 2

    def run(self, inputs, ctx):
        total, count = inputs.get("total", 0), inputs.get("count", 0)
        for at in range(count, 2 if ctx.stop_at_step is None else ctx.stop_at_step):
            total += ctx.settings.steps if at == 0 else ctx.settings.fps
        return {"total": total, "count": 2 if ctx.stop_at_step is None else ctx.stop_at_step}


def looped(results, steps, thing="a" * 64, segments=(0,)):
    from ditkit.execution.place import Here, Segment

    components = {"thing": Named(thing)} if thing else {"thing": object()}
    places = {"loop": [Segment(Here(components), at) for at in segments]}
    state = State({"seed": [1], "request": {"steps": steps, "fps": 10, "guidance_scale": 1.0}})
    return StageList([Loop()]).run(state, components, results=results, places=places)["total"]


def test_what_the_first_of_two_places_read_counts_for_the_whole_loop(cache):
    results = Cache(cache, 10**6)
    assert looped(results, 1, segments=(0, 1)) == 11
    assert looped(results, 2, segments=(0, 1)) == 12
    assert looped(results, 1) == 11


def test_a_component_that_nothing_tells_from_another_one_is_not_cached(cache):
    results = Cache(cache, 10**6)
    assert looped(results, 1, thing=None) == 11
    assert results.contents() == {}


PLAIN = """
from ditkit.execution.stage import BaseStage
from ditkit.state import Field

class Answer(BaseStage):
    name = "answer"
    reads = ("seed",)
    writes = ("answer",)
    fields = (Field("answer", "plain", "int", "", "", "answer", ""),)

    def run(self, inputs, ctx):
        return {"answer": NUMBER}
"""


def test_a_stage_that_was_rewritten_is_another_one(cache, tmp_path, monkeypatch):
    """Its name and version are what they were: nobody raises a version while trying things out."""
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    for number in (1, 2, 1):
        (tmp_path / "own_stage.py").write_text(PLAIN.replace("NUMBER", str(number)))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        import own_stage

        stage = importlib.reload(own_stage).Answer()
        for results in (Cache(cache, 10**6), Cache(cache, 10**6)):
            assert StageList([stage]).run(State({"seed": [1]}), {}, results=results)["answer"] == number
    assert Cache(cache, 10**6).contents()["answer"][0] == 2


def scaled(inner):
    return lambda x, step: 0.5 * inner(x, step)


def test_a_plugged_run_after_a_plain_one_is_not_the_plain_one(whole, cache):
    """A loop that asked for the seams and found them empty is another one than a stage that never asks."""
    plain = ditkit.load(whole, cache=cache)(PROMPT, seed=1).state
    seams = ditkit.Seams(predict=(scaled,))
    right = ditkit.load(whole, seams=seams)(PROMPT, seed=1).state
    found = ditkit.load(whole, cache=cache, seams=seams)(PROMPT, seed=1).state
    assert found.equal(right)
    assert not found["latents"].equal(plain["latents"])
    assert ditkit.load(whole, cache=cache)(PROMPT, seed=1).state.equal(plain)


def test_what_is_found_may_be_written_to(whole, cache):
    """Each hit is a tensor of its own: a stage of the user's that changes it in place changes no later run."""
    pipe = ditkit.load(whole, cache=cache)
    right = pipe(PROMPT, seed=1).state["latents"].clone()
    pipe(PROMPT, seed=1).state["latents"].zero_()
    assert torch.equal(pipe(PROMPT, seed=1).state["latents"], right)


def test_asking_whether_a_component_is_there_loads_nothing(whole):
    pipe = ditkit.load(whole)
    heard = []
    view = pipe.components.listening(ditkit.Events(heard.append))
    assert "vae" in pipe.components
    assert "vae" in view
    assert "preview_decoder" not in view
    assert heard == []
    assert list(pipe.components.holder.loaded) == []
