"""Earlier names of settings are still read: in keywords, flags, configs, environment, States, manifests and runs."""

import json
from pathlib import Path

import pytest
import torch
from reference import rel
from safetensors import safe_open

import ditkit
from ditkit import config
from ditkit.cli.main import _today
from ditkit.errors import RequestError, SetupError, StateError
from ditkit.request import OLD_NAMES, Request
from ditkit.setup import Setup
from ditkit.state import State

OLD = {"solver": "dpm++", "solver_options": {"order": 1}, "schedule": "official", "image_processing": "official"}
NEW = {"scheduler": "dpm++", "scheduler_options": {"order": 1}, "convention": "wan", "image_processing": "wan"}


def test_every_name_of_today_is_a_setting():
    assert {*OLD_NAMES.values()} <= {*config.FIELDS}
    assert not {*OLD_NAMES} & {*config.FIELDS}


def test_keywords():
    assert Request(**OLD) == Request(**NEW)
    assert Setup(
        precision="official", remember_text=False, patience=3, parts={"vae": "x"}, expect={"denoise": "0" * 8}
    ) == Setup(
        dtype_policy="wan",
        cache_text_kv=False,
        timeout=3.0,
        components={"vae": "x"},
        expected_probes={"denoise": "0" * 8},
    )


def test_both_names_at_once_are_refused():
    with pytest.raises(RequestError, match="scheduler was given twice"):
        Request.of({"solver": "unipc", "scheduler": "unipc"})
    with pytest.raises(SetupError, match="given before"):
        config.text_layer([("solver", "a", "flag", True), ("scheduler", "b", "flag", True)])


def test_a_state_with_both_names_is_damaged():
    state = State({"request": {"scheduler": "unipc"}}).to_bytes()
    for both in (b'"solver": "unipc", "scheduler": "unipc"', b'"schedule": "official", "convention": "wan"'):
        damaged = State({"request": json.loads(b"{" + both + b"}")}).to_bytes()
        assert State.from_bytes(state)["request"] == {"scheduler": "unipc"}
        with pytest.raises(StateError, match=r"was given twice, also by its earlier name\. Save the State again"):
            State.from_bytes(damaged)


def test_a_fault_is_told_by_the_name_that_was_given():
    with pytest.raises(RequestError, match="schedule='karras'"):
        Request.of({"schedule": "karras"})


def test_config_and_environment(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('solver = "dpm++"\nschedule = "official"\n')
    layers = [config.file_layer(file), config.environment_layer({"DITKIT_PRECISION": "official"})]
    settled = config.settle(*layers)
    assert (settled.request().scheduler, settled.request().convention) == ("dpm++", "wan")
    assert settled.setup().dtype_policy == "wan"
    assert settled.explain("solver") == settled.explain("scheduler")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--solver", "--scheduler"), ("--solver=euler", "--scheduler=euler"), ("--schedule", "--convention"),

        ("--no-remember-text", "--no-cache-text-kv"), ("--parts", "--components"), ("--steps", "--steps"),
        ("solver", "solver"),
    ],
)  # fmt: skip
def test_flags(old, new):
    assert _today(old) == new


@pytest.mark.slow
def test_a_state_of_earlier_goes_on():
    """``earlier/half.safetensors`` was saved by the version before the names were changed: "a red circle", seed 3,
    after 2 of 4 steps of the embedded model."""
    file = Path(__file__).parents[1] / "data/earlier/half.safetensors"
    with safe_open(file, "pt") as saved:
        assert "solver" in saved.metadata()["ditkit.state"]
    pipe = ditkit.load("shapes")
    whole = pipe.run(pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, "steps": 4}))).state
    half = State.load(file)
    assert half["request"] == {n: v for n, v in whole["request"].items() if n in half["request"]}
    assert half["weights"].items() - whole["weights"].items() <= {("tokenizer", half["weights"]["tokenizer"])}, "ftfy"
    again = pipe.run(half).state
    assert {*again} == {*whole}
    assert rel(again["latents"], whole["latents"]) <= 1e-4  # its first steps were taken by another machine
    assert torch.equal(again["latents"], pipe.run(half.without("records")).state["latents"])
