"""Which of two transformers takes a step, with whose guidance, and that it is only asked for then."""

import json
from pathlib import Path

import pytest
import torch
from ditkit.guidance.experts import by_expert

from ditkit.contracts import Step
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


def test_an_expert_is_asked_for_at_its_first_step():
    asked = []

    def maker(name, factor):
        def make_it():
            asked.append(name)
            return lambda x, step: factor * x

        return make_it

    predict = by_expert({"transformer": maker("transformer", 2), "transformer_2": maker("transformer_2", 3)})
    x = torch.ones(1)
    first, second = (Step(i, 2, 0.9, 0.5, 900, expert=name) for i, name in enumerate(("transformer", "transformer_2")))
    assert predict(x, first) == 2
    assert predict(x, first) == 2
    assert asked == ["transformer"]
    assert predict(x, second) == 3
    assert asked == ["transformer", "transformer_2"]
