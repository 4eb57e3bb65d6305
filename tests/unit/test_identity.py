"""Which parts a State belongs to, and which expert each part of a loop calls. Real parts, tiny."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.assembly.model import check_begun
from ditkit.errors import StateError
from ditkit.events import Event
from ditkit.placement import Places
from ditkit.request import Request
from ditkit.schedulers import make
from ditkit.schedulers.table import request_steps
from ditkit.setup import Setup
from ditkit.stages.denoise import Denoise

TAEHV = Path(__file__).parents[1] / "data/golden/taehv/taew2_1_tiny.safetensors"
SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 4, "seed": 3}
TWO = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


@pytest.fixture(scope="module")
def draft(tiny_model):
    return ditkit.load(tiny_model, components={"vae": str(TAEHV)})


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe("a red circle", **SMALL)


def test_a_draft_is_decoded_once_more_with_the_final_vae(pipe, draft, whole):
    first = draft("a red circle", **SMALL)
    assert not torch.equal(first.state["video"], whole.state["video"])
    with pytest.raises(StateError, match=r"another vae\. .*or run it once more from decode_latents"):
        pipe.run(first.state)
    final = pipe.run(first.state, start="decode_latents")
    assert torch.equal(final.state["video"], whole.state["video"])
    assert final.state.fingerprints == whole.state.fingerprints
    assert final.state["model"]["parts"] == whole.state["model"]["parts"]
    with pytest.raises(StateError, match="another vae"):  # it is the final one's now
        draft.run(final.state)
    assert draft.run(final.state, start="decode_latents").state.equal(first.state)


def test_a_part_may_be_exchanged_until_it_has_worked(pipe, draft, whole):
    half = draft.run(draft.begin(draft.model.request({"prompt": "a red circle", **SMALL})), until="denoise").state
    assert torch.equal(pipe.run(half).state["video"], whole.state["video"])


def test_ctrl_c_keeps_whose_parts_were_at_work(pipe, draft):
    """The clip that is there is the draft's until another one is."""
    first = draft("a red circle", **SMALL).state

    def stop(event: Event):
        if event.name == "frames":
            raise KeyboardInterrupt

    with pytest.raises(ditkit.Interrupted) as e:
        pipe.run(first, start="decode_latents", listeners=[stop])
    assert e.value.state["model"]["parts"]["vae"] == draft.model.identities["vae"]


def test_ctrl_c_keeps_whose_parts_have_worked(pipe, whole, tiny_model, tmp_path):
    file = shutil.copytree(tiny_model / "text_encoder", tmp_path / "text_encoder") / "model.safetensors"
    save_file({name: x * 1.5 for name, x in load_file(file).items()}, file, {"format": "pt"})
    other = ditkit.load(tiny_model, components={"text_encoder": str(file.parent)})
    first = other("a red circle", **SMALL).state

    def late(event: Event):
        if event.name == "step.end":
            raise KeyboardInterrupt

    with pytest.raises(ditkit.Interrupted) as e:
        pipe.run(first, start="encode_text", listeners=[late])
    assert torch.equal(pipe.run(e.value.state).state["video"], whole.state["video"])
    with pytest.raises(StateError, match="another text_encoder"):
        other.run(e.value.state)


def test_a_state_of_an_older_version_knows_all_parts_as_one(pipe, draft, whole):
    old = whole.state.with_fields({"model": {"name": pipe.setup.model, "identity": pipe.model.identity}})
    assert pipe.run(old).state.equal(old)
    with pytest.raises(StateError, match="another one or more parts"):
        draft.run(old, start="decode_latents")


def test_another_transformer_is_refused_whatever_was_done(pipe, tmp_path):
    other = ditkit.load(tiny.write(tmp_path / "other", "vace"))
    state = pipe.begin(pipe.model.request({"prompt": "x", **SMALL}))
    with pytest.raises(StateError, match=r"another model, .* which has another transformer"):
        check_begun(state, "other", other.model, other.stages, other.stages.stages)


# --- experts


def request(**values):
    return Request.of({"prompt": "x", "steps": 8, "shift": 5.0, "boundary": 0.875, **values})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"boundary": 0.9, "shift": 12.0},
        {"boundary": 0.0},
        {"boundary": 1.0},
        {"scheduler": "euler"},
        {"scheduler": "dpm++", "convention": "diffusers"},
        {"steps": None, "shift": None, "sigmas": [1.0, 0.9, 0.875, 0.5, 0.2]},  # the boundary is a noise level
        {"steps": None, "shift": None, "scheduler": "euler", "sigmas": [1.0, 0.875, 0.5]},
        {"steps": None, "shift": None, "sigmas": [1.0, 0.8759, 0.8749999999, 0.2]},  # one that is cut off, and rounded
        {"steps": None, "shift": None, "sigmas": [0.8, 0.2]},
        {"steps": None, "shift": None, "sigmas": [1.0, 0.8755, 0.2], "boundary": 0.8752},  # above, and told 875
    ],
    ids=str,
)
def test_a_part_of_the_loop_calls_the_experts_of_its_own_steps(values):
    asked = request(**{k: v for k, v in values.items() if v is not None})
    table = request_steps(make(asked.scheduler), asked, 1000.0, 2)
    stage, count = Denoise(experts=TWO, timestep_scale=1000.0), len(table)
    fresh = {"request": asked.model_dump()}
    begun = {**fresh, "sigmas": [*(s.sigma for s in table), table[-1].sigma_next]}
    for done, stop in itertools.product(range(count), [*range(count + 1), None]):
        used = {s.expert for s in table[done:stop]} or {table[done].expert}
        state = {**begun, "step": done} if done else fresh
        assert {*stage.needs(state, stop)} == used, (done, stop)
    assert len(stage.needs({**begun, "step": count})) == 1


def test_noise_levels_that_the_request_does_not_give_tell_nothing():
    asked = request().model_dump()
    sigmas = [1.0, 0.5, 0.0]
    assert Denoise(experts=TWO, timestep_scale=1000.0).needs({"request": asked, "sigmas": sigmas, "step": 1}) == TWO
    assert Denoise(experts=TWO).needs({"request": asked}) == TWO


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ({"denoise.transformer": "cpu"}, [(0, "cpu"), (3, "here")]),
        ({"denoise.transformer_2": "cpu"}, [(0, "here"), (3, "cpu")]),
        ({"denoise": "http://a", "denoise.transformer": "cpu"}, [(0, "cpu"), (3, "http://a")]),
        ({"denoise": "http://a", "denoise.transformer_2": "cpu"}, [(0, "http://a"), (3, "cpu")]),
        ({"denoise.transformer": "http://a", "denoise.transformer_2": "http://b"}, [(0, "http://a"), (3, "http://b")]),
        ({"denoise.transformer": "http://a", "denoise@2": "http://b"}, [(0, "http://a"), (2, "http://b")]),
        ({"denoise": "http://a", "denoise@2": "http://b"}, [(0, "http://a"), (2, "http://b")]),
    ],
    ids=str,
)
def test_an_expert_is_placed_for_its_own_steps(two, placement, expected):
    """``cpu`` is a device of this process, which is called here."""
    pipe = ditkit.load(two)
    table = [SimpleNamespace(index=i, expert=TWO[i >= 3]) for i in range(5)]
    where = Places(Setup(placement=placement)).of_run(pipe.stages, {}, pipe.seams, lambda: table)
    names = [(segment.from_step, segment.place.name) for segment in where["denoise"]]
    assert names == [(step, "here" if name == "cpu" else name) for step, name in expected]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("two") / "model", "t2v_a14b")


def test_one_step_at_a_time_each_by_a_process_of_its_own(two):
    """Each takes the State over, loads one expert, and the fingerprints are those of one run."""
    values = {"prompt": "a red circle", **SMALL, "steps": 5}
    pipe = ditkit.load(two)
    state = pipe.begin(pipe.model.request(values))
    whole = pipe.run(state, until="denoise").state
    experts = [step.expert for step in pipe.steps(SimpleNamespace(**whole["request"]))]
    assert set(experts) == set(TWO)
    for step, expert in enumerate(experts, 1):
        part = ditkit.load(two)
        state = part.run(state, until="denoise", stop_at_step=step).state
        assert {*part.components.holder.loaded} & {*TWO} == {expert}
    assert state.equal(whole)
    assert state.fingerprints == whole.fingerprints


def test_a_stop_before_the_first_step_asks_one_expert(two):
    pipe = ditkit.load(two)
    state = pipe.run(pipe.begin(pipe.model.request({"prompt": "x", **SMALL})), until="denoise", stop_at_step=0).state
    assert state["step"] == 0
    assert {*pipe.components.holder.loaded} & {*TWO} == {"transformer"}
