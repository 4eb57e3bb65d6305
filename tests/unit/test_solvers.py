"""What every scheduler must do: exactness, order of accuracy, no hidden state, no surprise at sigma 1 and 0."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ditkit.contracts import Step
from ditkit.errors import PipelineError, StateError
from ditkit.schedulers import make
from ditkit.schedulers.noise import step_noise
from ditkit.schedulers.table import step_table

SOLVERS = [
    ("euler", {}),
    *(
        ("unipc", {"order": o, "solver_type": t, "corrector": c})
        for o in (1, 2, 3)
        for t in ("bh1", "bh2")
        for c in (0 < 1, 1 < 0)
    ),
    *(("dpm++", {"order": o, "solver_type": t}) for o in (1, 2, 3) for t in ("midpoint", "heun")),
    *(("dpm++_sde", {"order": o, "solver_type": t}) for o in (1, 2) for t in ("midpoint", "heun")),
]
SHAPE = (1, 4, 2, 3, 3)


def noise_for(scheduler, step, like):
    return step_noise(5, step.index, like.shape) if scheduler.needs_noise else None


def velocity_of(x, step):
    return torch.sin(3 * x) + 0.1 * step.sigma


def run(scheduler, x, plan, velocity=velocity_of, history=None):
    history = {} if history is None else history
    for step in plan:
        x, history = scheduler.solve(x, velocity(x, step), step, history, noise_for(scheduler, step, x))
        assert x.isfinite().all(), step
        assert all(value.isfinite().all() for value in history.values()), step
    return x, history


def start(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("name", "options"), SOLVERS)
@pytest.mark.parametrize("convention", ["wan", "diffusers"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_a_model_that_knows_the_answer_is_believed(name, options, convention, steps):
    """With the same x0 prediction at every step the end is that x0, and on the way (without fresh noise) x stays on
    the straight line between it and the noise."""
    scheduler, x0, noise = make(name, **options), start(torch.float64).flip(1), start(torch.float64)
    plan = step_table(scheduler, steps, 5.0, convention, 1.0, 1000.0)
    x, history = (1 - plan[0].sigma) * x0 + plan[0].sigma * noise, {}
    for step in plan:
        x, history = scheduler.solve(x, (x - x0) / step.sigma, step, history, noise_for(scheduler, step, x))
        if not scheduler.needs_noise:
            line = (1 - step.sigma_next) * x0 + step.sigma_next * noise
            torch.testing.assert_close(x, line, rtol=0, atol=1e-13)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SOLVERS)
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 18), st.integers(0, 17), st.sampled_from(["wan", "diffusers"]), st.sampled_from([3.0, 12.0]))
def test_a_run_goes_on_from_a_file_bit_for_bit(tmp_path_factory, name, options, steps, stop, convention, shift):
    scheduler, stop = make(name, **options), min(stop, steps)
    plan = step_table(scheduler, steps, shift, convention, 1.0, 1000.0)
    whole, whole_history = run(scheduler, start(), plan)
    x, history = run(scheduler, start(), plan[:stop])
    path = tmp_path_factory.mktemp("run") / "state.safetensors"
    save_file({"x": x, "start": start(), **{f"history.{k}": v for k, v in history.items()}}, path)
    saved = load_file(path)
    loaded = {k.removeprefix("history."): v for k, v in saved.items() if k.startswith("history.")}
    x, history = run(make(name, **options), saved["x"], plan[stop:], history=loaded)
    assert torch.equal(x, whole)
    assert history.keys() == whole_history.keys()
    assert all(torch.equal(history[k], whole_history[k]) for k in history)


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_inputs_are_left_alone_and_shared_with_nobody(name, options):
    scheduler = make(name, **options)
    plan = step_table(scheduler, 6, 5.0, "wan", 1.0, 1000.0)
    x, history = start(), {}
    for step in plan:
        velocity, noise = velocity_of(x, step), noise_for(scheduler, step, x)
        given = {"x": x, "velocity": velocity, **history, **({} if noise is None else {"noise": noise})}
        copies = {k: v.clone() for k, v in given.items()}
        keys = set(history)
        x_next, history_next = scheduler.solve(x, velocity, step, history, noise)
        assert set(history) == keys
        assert all(torch.equal(given[k], copies[k]) for k in given)
        storages = [t.untyped_storage().data_ptr() for t in (x, velocity, x_next, *history_next.values())]
        assert len(set(storages)) == len(storages)
        for key, value in history_next.items():
            scalar = key.startswith("sigma_")
            assert value.shape == (() if scalar else SHAPE)
            assert value.dtype == (torch.float64 if scalar else torch.float32)
            assert value.device.type == "cpu"
        x, history = x_next, history_next


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_two_threads_share_one_solver(name, options):
    scheduler = make(name, **options)
    plans = [step_table(scheduler, n, s, "wan", 1.0, 1000.0) for n, s in ((12, 5.0), (17, 3.0))] * 2
    alone = [run(scheduler, start(), plan)[0] for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda plan: run(scheduler, start(), plan)[0], plans))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_precision_of_the_sample(name, options):
    scheduler = make(name, **options)
    plan = step_table(scheduler, 5, 5.0, "wan", 1.0, 1000.0)
    half = start().bfloat16()
    narrow, history = run(scheduler, half, plan[:1], velocity=lambda x, step: velocity_of(x.float(), step).bfloat16())
    wide, _ = run(scheduler, half.float(), plan[:1], velocity=lambda x, step: velocity_of(x, step).bfloat16())
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)
    double, history = run(scheduler, start(torch.float64), plan)
    assert {double.dtype, *(v.dtype for v in history.values())} == {torch.float64}
    torch.testing.assert_close(run(scheduler, start(), plan)[0].double(), double, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_sigma_one_is_the_limit_of_sigmas_close_to_it(name, options):
    """lambda is -inf there. Solvers may start from pure noise, whichever grid they are given."""
    if options.get("solver_type") == "bh1" and options["corrector"]:
        pytest.skip("B = -h has no limit; the next test covers it")
    scheduler, rest = make(name, **options), [0.9, 0.7, 0.5, 0.3, 0.1]

    def end(first):
        plan = step_table(scheduler, None, None, "wan", 1.0, 1000.0, [0.99, *rest])
        plan = [replace(plan[0], sigma=first), *plan[1:]]
        return run(scheduler, start(torch.float64), plan)[0]

    # Where 1 / r enters the distance to the limit shrinks like 1 / lambda, so slowly; elsewhere like 1 - sigma.
    far, near = ((end(1 - eps) - end(1.0)).abs().max().item() * -math.log(eps) for eps in (1e-4, 1e-15))
    assert near < 1.1 * far


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bh1_from_pure_noise_is_finite_and_close_to_bh2(order):
    plan = step_table(make("unipc"), None, None, "wan", 1.0, 1000.0, [1.0, 0.96, 0.9, 0.8, 0.6, 0.3])
    ends = [run(make("unipc", order=order, solver_type=t), start(torch.float64), plan)[0] for t in ("bh1", "bh2")]
    assert (ends[0] - ends[1]).abs().max() < 0.1


def gauss(sigma, mean=0.7, spread=0.4, z=1.3):
    """Normal data N(mean, spread^2): the exact path of one point, and its x0 prediction."""
    alpha = 1 - sigma
    width = math.sqrt((alpha * spread) ** 2 + sigma**2)
    return alpha * mean + width * z, lambda x: mean + alpha * spread**2 / width**2 * (x - alpha * mean)


def error_after(scheduler, steps):
    """Error at sigma 0.1 after ``steps`` steps from 0.9, evenly in lambda; the first three steps start from exact
    values, so that the warm-up does not hide the order."""
    top = math.log(9)
    sigmas = [1 / (1 + math.exp(-top + 2 * top * i / steps)) for i in range(steps + 1)]
    history = {}
    x = None
    for i in range(steps):
        step = Step(i, steps + 99, sigmas[i], sigmas[i + 1], 0.0)  # 99 steps to go: no lower order at the end
        exact, predict = gauss(sigmas[i])
        if i < 3:
            x = torch.tensor([exact], dtype=torch.float64)
        x, history = scheduler.solve(x, (x - predict(x)) / sigmas[i], step, history)
    return abs(x.item() - gauss(sigmas[-1])[0])


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1),
        ("dpm++", {"order": 1}, 1),
        ("dpm++", {"order": 2}, 2),
        ("dpm++", {"order": 2, "solver_type": "heun"}, 2),
        ("dpm++", {"order": 3}, 2),  # as published
        ("unipc", {"order": 1, "corrector": False}, 1),
        ("unipc", {"order": 2, "corrector": False}, 2),
        ("unipc", {"order": 3, "corrector": False}, 3),
        ("unipc", {"order": 1}, 2),
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 2, "solver_type": "bh1"}, 3),
        ("unipc", {"order": 3}, 4),
        ("unipc", {"order": 3, "solver_type": "bh1"}, 4),
    ],
)
def test_order_of_accuracy(name, options, order):
    errors = [error_after(make(name, **options), steps) for steps in (40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.35)


def test_higher_orders_end_closer_on_an_ordinary_run():
    """The whole path with warm-up and low-order end, as a person runs it: 20 steps of the official grid."""

    def end(scheduler):
        plan = step_table(scheduler, 20, 3.0, "wan", 1.0, 1000.0)
        x = torch.tensor([gauss(plan[0].sigma)[0]], dtype=torch.float64)
        return abs(run(scheduler, x, plan, lambda x, s: (x - gauss(s.sigma)[1](x)) / s.sigma)[0].item() - gauss(0.0)[0])

    euler, dpm, unipc = end(make("euler")), end(make("dpm++")), end(make("unipc"))
    assert unipc < dpm < euler


def test_sde_ends_with_the_spread_of_the_data():
    """Fresh noise keeps the distribution: normal data keeps its mean and width."""
    scheduler = make("dpm++_sde")
    plan = step_table(scheduler, 60, 3.0, "wan", 1.0, 1000.0)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, _ = run(scheduler, x, plan, lambda x, s: (x - gauss(s.sigma)[1](x)) / s.sigma)
    assert x.mean() == pytest.approx(0.7, abs=0.02)
    assert x.std() == pytest.approx(0.4, abs=0.02)


def test_what_does_not_fit_is_refused():
    x, step = start(), Step(0, 2, 0.9, 0.5, 900)
    for name in ("euler", "unipc", "dpm++"):
        with pytest.raises(PipelineError, match="would not be used"):
            make(name).solve(x, x, step, {}, x)
    with pytest.raises(PipelineError, match="no noise"):
        make("dpm++_sde").solve(x, x, step, {})
    with pytest.raises(PipelineError, match="shape"):
        make("unipc").solve(x, x[:, :1], step, {})
    _, history = make("dpm++").solve(x, x, step, {})
    with pytest.raises(StateError, match="without one"):
        make("unipc").solve(x, x, Step(1, 2, 0.5, 0.0, 500), history)
