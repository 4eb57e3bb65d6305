"""States that were edited, cut together or written by another version are refused, in one sentence, before they run."""

from __future__ import annotations

import pytest
import tiny
import torch

import ditkit
from ditkit.checking import check_state
from ditkit.errors import UserError
from ditkit.state import State

JOB = {"width": 32, "height": 32, "frames": 5, "steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ditkit.load(tiny.write(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def half(pipe):
    return pipe.run(pipe.begin(pipe.model.request({"prompt": "a red circle", **JOB})), stop_at_step=2).state


def request(**changes):
    return lambda state: {"request": {**state["request"], **changes}}


BAD = {
    "a step count that is a word": request(steps="x"),
    "an unknown setting": request(bogus=1),
    "no frames a second": request(fps=0),
    "an odd width": request(width=17),
    "a list for a request": lambda s: {"request": []},
    "a word for a model": lambda s: {"model": "x"},
    "a bare prompt": lambda s: {"prompt": "abc"},
    "a record that is none": lambda s: {"records": {**s["records"], "encode_text": 0}},
    "a record with plugs that are none": lambda s: {
        "records": {**s["records"], "denoise": {**s["records"]["denoise"], "plugs": {"predict": 1}}}
    },
    "a record without its inputs": lambda s: {"records": {**s["records"], "denoise": {"settings": {}}}},
    "parts that are a word": lambda s: {"model": {**s["model"], "parts": "x"}},
    "no step taken, and a history of steps": lambda s: {"step": 0},
    "no prompt": lambda s: {"prompt": []},
    "two seeds for one prompt": lambda s: {"seed": [1, 2]},
    "a seed that is a word": lambda s: {"seed": ["x"]},
    "a step that is a word": lambda s: {"step": "2"},
    "a step too far": lambda s: {"step": 99},
    "a step before the first": lambda s: {"step": -1},
    "stages as a number": lambda s: {"stages": 5},
    "weights as a list": lambda s: {"weights": []},
    "more rows than there are": lambda s: {"prompt_lengths": [999]},
    "lengths that are null": lambda s: {"prompt_lengths": None},
    "latents in bfloat16": lambda s: {"latents": s["latents"].bfloat16()},
    "latents of another size": lambda s: {"latents": s["latents"][..., :2]},
    "text of another width": lambda s: {"prompt_embeds": torch.zeros(len(s["prompt_embeds"]), 7)},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_an_edited_state_is_refused(pipe, half, change):
    with pytest.raises(UserError) as e:
        pipe.run(half.with_fields(change(half)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["request", "prompt", "seed", "history", "sigmas", "latents", "prompt_embeds", "prompt_lengths",
             "negative_prompt_embeds"],
)  # fmt: skip
def test_a_state_that_lacks_something_is_refused(pipe, half, name):
    with pytest.raises(UserError):
        pipe.run(half.without(name))


def test_what_is_whole_passes(pipe, half):
    assert check_state(half).steps == 4
    assert pipe.run(State.from_bytes(half.to_bytes())).state["step"] == 4


def test_a_count_of_steps_that_is_gone_is_refused(half):
    with pytest.raises(UserError, match="no count of steps"):
        check_state(half.without("step"))


def test_an_older_state_that_knows_fewer_settings_goes_on(pipe, half):
    older = {name: value for name, value in half["request"].items() if name != "expand_attempt"}
    went_on = pipe.run(half.with_fields({"request": older})).state
    assert went_on.equal(pipe.run(half).state)


def test_a_setting_that_is_gone_makes_a_result_out_of_date(pipe, half):
    less = {name: value for name, value in half["request"].items() if name != "max_sequence_length"}
    stage, state = pipe.stages["encode_text"], half.with_fields({"request": less})
    assert pipe.stages.outdated(stage, state) == ["max_sequence_length was 512, is gone"]
