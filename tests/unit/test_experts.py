"""Which of two transformers takes a step, with whose guidance, and that it is only asked for then."""

import json
from pathlib import Path

import pytest
import tiny

import ditkit
from ditkit.errors import RequestError
from ditkit.models.wan import TIMESTEP_SCALE
from ditkit.request import Request
from ditkit.schedulers import make
from ditkit.schedulers.table import request_steps

TABLES = json.loads((Path(__file__).parents[1] / "data/golden/expert_switch.json").read_text())["models"]
CASES = [(name, i) for name, model in TABLES.items() for i in range(len(model["tables"]))]


@pytest.mark.parametrize(("model", "index"), CASES)
def test_the_official_switch(model, index):
    """By timestep, never by a fraction of the steps (the predecessors' fault, which also swapped the guidance)."""
    official, table = TABLES[model], TABLES[model]["tables"][index]
    request = Request(
        steps=table["steps"], shift=float(table["shift"]), scheduler=table["solver"], boundary=official["boundary"],
        guidance_scale=official["guidance"]["high_noise"], guidance_scale_2=official["guidance"]["low_noise"],
    )  # fmt: skip
    steps = request_steps(make(table["solver"]), request, TIMESTEP_SCALE, experts=2)
    assert [s.timestep for s in steps] == table["timesteps"]
    assert [s.index for s in steps if s.expert == "transformer"] == table["high_noise_steps"]
    assert [s.index for s in steps if s.expert == "transformer_2"] == table["low_noise_steps"]
    assert [s.guidance_scale for s in steps] == table["guidance_per_step"]


def test_nothing_about_experts_is_ignored_or_guessed():
    scheduler = make("unipc")
    with pytest.raises(RequestError, match="no boundary between them is known"):
        request_steps(scheduler, Request(), TIMESTEP_SCALE, experts=2)
    with pytest.raises(RequestError, match="this model has one transformer"):
        request_steps(scheduler, Request(boundary=0.9), TIMESTEP_SCALE)
    with pytest.raises(RequestError, match="no boundary between two experts"):
        request_steps(scheduler, Request(guidance_scale_2=3.0), TIMESTEP_SCALE)
    one = request_steps(scheduler, Request(boundary=0.9, guidance_scale=4.0), TIMESTEP_SCALE, experts=2)
    assert {s.guidance_scale for s in one} == {4.0}  # without its own, the second expert has the first one's


@pytest.mark.parametrize(("boundary", "expected"), [(0.0, {"transformer"}), (1.0, {"transformer_2"})])
def test_a_boundary_at_either_end_leaves_one_expert(boundary, expected):
    steps = request_steps(make("unipc"), Request(boundary=boundary, steps=5), TIMESTEP_SCALE, experts=2)
    assert {s.expert for s in steps} == expected


def test_an_expert_is_asked_for_at_its_first_step(tmp_path):
    pipe, seen = ditkit.load(tiny.write(tmp_path / "model", "t2v_a14b")), []

    class Asked(dict):
        def __getitem__(self, name):
            seen.append(name)
            return super().__getitem__(name)

    def listen(event):
        if event.name == "step.start":
            seen.append(event["step"].index)

    request = pipe.model.request({"prompt": "a", "steps": 4, "width": 32, "height": 32, "frames": 5})
    state = pipe.run(pipe.begin(request), until="encode_text").state
    components = Asked({name: pipe.components[name] for name in ("transformer", "transformer_2")})
    seen.clear()
    pipe.stages.run(state, components, until="denoise", events=ditkit.Events(listen))
    experts = [step.expert for step in pipe.steps(request)]
    switch = experts.index("transformer_2")
    seen = seen[seen.index(0) :]  # before the first step all are asked for their fingerprints
    assert "transformer_2" not in seen[: seen.index(switch)]
    assert seen[seen.index(switch) + 1] == "transformer_2"
