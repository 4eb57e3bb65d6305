"""A stage is done when the State's own request and inputs are those that its result was made from."""

from __future__ import annotations

import pytest

import ditkit
from ditkit.errors import PipelineError
from ditkit.state import State


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe("a red circle", seed=3).state


def ran(pipe, state, **more):
    heard = []
    after = pipe.run(
        state, listeners=[lambda e: heard.append(e) if e.name in ("stage.end", "stage.outdated") else None]
    )
    return after.state, [e["stage"] for e in heard if e.name == "stage.end"], {
        e["stage"]: e["reasons"] for e in heard if e.name == "stage.outdated"
    }  # fmt: skip


def with_request(state, **changes):
    return state.with_fields({"request": {**state["request"], **changes}})


def test_a_finished_state_is_left_alone_also_after_its_way_over_the_disk(pipe, whole, tmp_path):
    again, stages, reasons = ran(pipe, State.load(whole.save(tmp_path / "a.safetensors")))
    assert (stages, reasons) == ([], {})
    assert again.equal(whole)


def test_another_prompt_is_encoded_and_all_that_follows_is_made_again(pipe, whole):
    changed, stages, reasons = ran(pipe, whole.with_fields({"prompt": ["a blue square"]}))
    assert stages == ["encode_text", "denoise", "decode_latents"]
    assert reasons == {"encode_text": ["prompt is another one"]}
    anew = pipe("a blue square", seed=3).state
    assert changed.without("request").equal(anew.without("request"))
    assert changed.fingerprints == anew.fingerprints


def test_the_same_prompt_written_again_is_no_change(pipe, whole):
    _, stages, _ = ran(pipe, whole.with_fields({"prompt": ["a red circle"]}))
    assert stages == []


@pytest.mark.parametrize(
    ("changes", "stages", "reason"),
    [
        ({"steps": 3}, ["denoise", "decode_latents"], "steps was 4, is 3"),
        ({"rounding": "diffusers"}, ["decode_latents"], "rounding was 'wan', is 'diffusers'"),
        ({"guidance_scale": 3.0}, ["denoise", "decode_latents"], "guidance_scale was 5.0, is 3.0"),
        ({"guidance_scale": 1.0}, ["encode_text", "denoise", "decode_latents"], "guided was True, is False"),
        ({"fps": 24}, [], None),
    ],
)
def test_a_changed_request_makes_again_what_reads_it(pipe, whole, changes, stages, reason):
    after, took, reasons = ran(pipe, with_request(whole, **changes))
    assert took == stages
    assert reason is None or any(reason in r for r in reasons.values())
    anew = pipe("a red circle", seed=3, **changes).state
    for name in ("latents", "video"):
        assert after[name].equal(anew[name])


def test_another_seed(pipe, whole):
    after, stages, reasons = ran(pipe, whole.with_fields({"seed": [4]}))
    assert stages == ["denoise", "decode_latents"]
    assert reasons == {"denoise": ["seed is another one"]}
    assert after["video"].equal(pipe("a red circle", seed=4).state["video"])


def test_what_the_caller_put_there_himself_is_his(pipe, whole):
    """Nobody wrote down what these came from, so they are never out of date."""
    own = pipe.begin(pipe.model.request({"prompt": "x", "seed": 3})).with_fields(
        {n: whole[n] for n in whole if n.startswith(("prompt_", "negative_prompt_"))}
    )
    _, stages, _ = ran(pipe, own)
    assert stages == ["denoise", "decode_latents"]


def test_a_field_made_by_hand_is_new_to_what_reads_it(pipe, whole):
    after, stages, reasons = ran(pipe, whole.with_fields({"prompt_embeds": whole["prompt_embeds"] * 0.9}))
    assert stages == ["denoise", "decode_latents"]
    assert reasons == {"denoise": ["prompt_embeds is another one"]}
    assert not after["video"].equal(whole["video"])


def test_an_input_that_was_not_there_before_is_new(pipe, whole):
    with_it = whole.with_fields({"expanded_prompt": ["a green triangle, slowly"]})
    after, stages, reasons = ran(pipe, with_it)
    assert reasons["encode_text"] == ["expanded_prompt is new"]
    assert stages[0] == "encode_text"
    assert after["video"].equal(pipe("a green triangle, slowly", seed=3).state["video"])


def test_a_slice_that_was_asked_for_does_not_ask_back(pipe, whole):
    changed = with_request(whole, steps=3)
    heard = []
    pipe.run(changed, start="decode_latents", listeners=[lambda e: heard.append(e.name)])
    assert "stage.outdated" not in heard


def test_clips_keep_their_records_when_they_are_split_and_joined(pipe):
    both = pipe(["a red circle", "a blue square"], seed=[1, 2]).state
    assert ran(pipe, both)[1] == []
    _, stages, _ = ran(pipe, both.with_fields({"prompt": ["a red circle", "a green square"]}))
    assert stages[0] == "encode_text"


def test_undeclared_reading_is_still_refused(pipe, whole):
    class Peeks(ditkit.BaseStage):
        name, reads, writes = "peeks", ("video",), ("latents",)

        def run(self, inputs, ctx):
            return {"latents": inputs["prompt"]}

    with pytest.raises(PipelineError, match="did not declare"):
        pipe.stages.insert(Peeks(), after="decode_latents").run(whole, pipe.components, start="peeks")


def test_only_the_name_of_a_scheduler_may_hold_its_code(pipe, whole):
    """It is NAME@CODE in a record. Any other text with an @ in it is just another text."""
    record = whole["records"]["decode_latents"]
    older = {**record, "settings": {**record["settings"], "rounding": "wan@home"}}
    state = whole.with_fields({"records": {**whole["records"], "decode_latents": older}})
    _, stages, reasons = ran(pipe, state)
    assert (stages, reasons) == (["decode_latents"], {"decode_latents": ["rounding was 'wan@home', is 'wan'"]})
