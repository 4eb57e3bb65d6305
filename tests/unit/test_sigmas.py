"""Sigma grids, explicit sigmas, timesteps and the step table."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.errors import RequestError
from ditkit.schedulers import SCHEDULERS, make
from ditkit.schedulers.sigmas import CONVENTIONS, explicit, grid, timesteps
from ditkit.schedulers.table import format_table, step_table

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "schedulers"


@given(st.sampled_from(list(SCHEDULERS)), st.integers(1, 300), st.floats(0.05, 30), st.sampled_from(CONVENTIONS))
def test_every_grid_falls_strictly_to_zero(name, steps, shift, convention):
    sigmas = grid(name, steps, shift, convention)
    assert len(sigmas) == steps + 1
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas == make(name).sigmas(steps, shift, convention)
    told = timesteps(sigmas, convention, name, 1000.0)
    assert len(told) == steps
    assert all(0 <= t <= 1000 for t in told)
    assert name == "euler" or all(t == int(t) for t in told)


def test_the_two_conventions_differ():
    for name in SCHEDULERS:
        assert grid(name, 10, 5.0, "wan") != grid(name, 10, 5.0, "diffusers")
    official, theirs = (timesteps(grid("unipc", 50, 5.0, s), s, "unipc", 1000.0) for s in CONVENTIONS)
    assert official[:4] == [999, 995, 991, 987]
    assert official[-3:] == [241, 172, 92]
    assert sum(a != b for a, b in zip(official, theirs, strict=True)) == 27


def test_timesteps_are_cut_off_not_rounded_and_follow_the_scale():
    assert timesteps([0.9999, 0.5, 0.0], "wan", "unipc", 1000.0) == [999, 500]
    assert timesteps([0.9, 0.7, 0.0], "wan", "dpm++", 1000.0) == [900, 700]  # of 0.9, not of float32(0.9)
    assert timesteps([0.9999, 0.5, 0.0], "wan", "unipc", 10.0) == [9, 5]
    assert timesteps([0.75, 0.5, 0.0], "wan", "euler", 1.0) == [0.75, 0.5]


def test_explicit_sigmas():
    assert explicit([1, 0.5]) == explicit((1.0, 0.5, 0.0)) == [1.0, 0.5, 0.0]
    assert explicit([0.3]) == [0.3, 0.0]


@pytest.mark.parametrize(
    "sigmas",
    [
        [],
        [0.0],
        [0.5, 0.5],
        [0.3, 0.5],
        [1.5, 0.5],
        [0.5, -0.1],
        [math.nan, 0.5],
        [math.inf],
        [True, 0.5],
        ["0.9"],
        [0.5, 0.0, 0.0],
        [0.5, 0.5 - 1e-12],
        [1e-60],
        [None],
    ],
)
def test_bad_explicit_sigmas_are_refused(sigmas):
    with pytest.raises(RequestError, match="sigmas"):
        explicit(sigmas)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("unipc", 0, 5.0, "wan"), "at least 1"),
        (("unipc", True, 5.0, "wan"), "at least 1"),
        (("unipc", 4.0, 5.0, "wan"), "at least 1"),
        (("unipc", 4, 0.0, "wan"), "not a positive number"),
        (("unipc", 4, math.nan, "wan"), "not a positive number"),
        (("unipc", 4, math.inf, "wan"), "not a positive number"),
        (("unipc", 50, 1e9, "wan"), "coincide"),
        (("unipc", 4, 5.0, "difusers"), "did you mean 'diffusers'"),
        (("uni-pc", 4, 5.0, "wan"), "did you mean 'unipc'"),
    ],
)
def test_impossible_grids_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        grid(*arguments)


def test_make_names_the_nearest_known_word():
    with pytest.raises(RequestError, match="did you mean 'unipc'"):
        make("unipic")
    with pytest.raises(RequestError, match="did you mean 'corrector'"):
        make("unipc", corector=False)
    with pytest.raises(RequestError, match="no options"):
        make("euler", order=1)
    for name, options in [
        ("unipc", {"order": 4}),
        ("unipc", {"order": True}),
        ("unipc", {"solver_type": "bh3"}),
        ("unipc", {"corrector": "no"}),
        ("dpm++", {"order": 0}),
        ("dpm++", {"solver_type": "bh2"}),
        ("dpm++_sde", {"order": 3}),
    ]:
        with pytest.raises(RequestError, match=next(iter(options))):
            make(name, **options)
    for name in SCHEDULERS:
        assert make(name).name == name
        assert make(name).needs_noise == name.endswith("_sde")
        assert make(name) == make(name)
        with pytest.raises(AttributeError):
            make(name).order = 1


def test_laying_out_a_run_needs_no_torch():
    code = (
        "import sys, ditkit.schedulers, ditkit.schedulers.sigmas as s, ditkit.schedulers.table;"
        "s.grid('unipc', 4, 5.0, 'wan'); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_step_table():
    scheduler = make("unipc")
    plan = step_table(scheduler, 4, 5.0, "wan", 6.0, 1000.0)
    assert [(s.index, s.count, s.timestep, s.guidance_scale, s.expert) for s in plan] == [
        (0, 4, 999, 6.0, "transformer"),
        (1, 4, 937, 6.0, "transformer"),
        (2, 4, 833, 6.0, "transformer"),
        (3, 4, 624, 6.0, "transformer"),
    ]
    assert [s.sigma for s in plan[1:]] + [0.0] == [s.sigma_next for s in plan]
    assert [s.guidance_scale for s in step_table(scheduler, 3, 5.0, "wan", [3, 2, 1], 1000.0)] == [3, 2, 1]
    by_hand = step_table(scheduler, None, None, "wan", 1.0, 1000.0, [0.75, 0.5])
    assert [(s.sigma, s.sigma_next, s.timestep) for s in by_hand] == [(0.75, 0.5, 750), (0.5, 0.0, 500)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"explicit_sigmas": [0.7, 0.3], "steps": None}, "Leave the shift out"),
        ({"explicit_sigmas": [0.7, 0.3], "shift": None}, "Leave the steps out"),
        ({"steps": None}, "missing"),
        ({"shift": None}, "missing"),
        ({"guidance_scale": [1, 2]}, "there are 4 steps"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"guidance_scale_2": 3.0}, "no boundary"),
        ({"boundary": 875}, "between 0 and 1"),
        ({"convention": "karras"}, "wan, diffusers"),
    ],
)
def test_step_tables_that_do_not_fit_together_are_refused(changes, words):
    known = {"scheduler": make("unipc"), "steps": 4, "shift": 5.0, "convention": "wan"}
    with pytest.raises(RequestError, match=words):
        step_table(**{**known, "guidance_scale": 5.0, "scale": 1000.0, **changes})


def test_two_experts_share_the_steps_as_in_the_official_code():
    models = json.loads((GOLDEN / "expert_switch.json").read_text())["models"]
    tables = [(model, table) for model in models.values() for table in model["tables"]]
    assert len(tables) == 12
    for model, table in tables:
        guidance = model["guidance"]
        plan = step_table(
            make(table["solver"]),
            table["steps"],
            table["shift"],
            "wan",
            guidance["high_noise"],
            1000.0,
            boundary=model["boundary"],
            guidance_scale_2=guidance["low_noise"],
        )
        assert [s.timestep for s in plan] == table["timesteps"]
        assert [s.index for s in plan if s.expert == "transformer"] == table["high_noise_steps"]
        assert [s.index for s in plan if s.expert == "transformer_2"] == table["low_noise_steps"]
        assert [s.guidance_scale for s in plan] == table["guidance_per_step"]


def test_the_first_expert_has_the_boundary_itself():
    plan = step_table(make("dpm++"), 8, 1.0, "wan", 5.0, 1000.0, boundary=0.875)
    assert [s.timestep for s in plan if s.expert == "transformer"] == [1000, 875]
    assert {s.guidance_scale for s in plan} == {5.0}


def test_format_table():
    plan = step_table(make("euler"), 3, 5.0, "wan", 4.5, 1000.0, boundary=0.95, guidance_scale_2=3.0)
    assert format_table(plan).splitlines() == [
        "i  timestep     sigma  guidance  expert",
        "0      1000  1.000000       4.5  transformer",
        "1   909.091  0.909091         3  transformer_2",
        "2   714.286  0.714286         3  transformer_2",
    ]
