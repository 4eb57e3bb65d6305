"""Grids and single steps against diffusers' schedulers."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ditkit.schedulers import make
from ditkit.schedulers.sigmas import explicit, grid, timesteps
from ditkit.schedulers.table import step_table

SHIFTS = (1.0, 2.5, 3.0, 5.0, 8.0, 12.0, 16.0)


def diffusers_scheduler(name: str, shift: float, **options):
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "unipc":
        disable = [] if options.pop("corrector", True) else list(range(1000))
        order = options.pop("order", 2)
        return UniPCMultistepScheduler(**flow, solver_order=order, disable_corrector=disable, **options)
    algorithm = "sde-dpmsolver++" if name == "dpm++_sde" else "dpmsolver++"
    order = options.pop("order", 2)
    return DPMSolverMultistepScheduler(**flow, solver_order=order, algorithm_type=algorithm, **options)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ["unipc", "dpm++", "dpm++_sde", "euler"])
def test_grid_is_exactly_that_of_diffusers(name, shift):
    theirs = diffusers_scheduler(name, shift)
    for steps in (*range(1, 61), 80, 100, 200):
        theirs.set_timesteps(steps)
        sigmas = grid(name, steps, shift, "diffusers")
        assert np.float32(sigmas).tolist() == theirs.sigmas.tolist(), steps
        assert timesteps(sigmas, "diffusers", name, 1000.0) == theirs.timesteps.tolist(), steps


VARIANTS = [
    ("unipc", {}),
    ("unipc", {"solver_type": "bh1"}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 1, "solver_type": "bh1"}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 3, "solver_type": "bh1"}),
    ("unipc", {"corrector": False}),
    ("unipc", {"order": 3, "corrector": False}),
    ("dpm++", {}),
    ("dpm++", {"order": 1}),
    ("dpm++", {"order": 3}),
    ("dpm++", {"solver_type": "heun"}),
    ("dpm++_sde", {}),
    ("dpm++_sde", {"order": 1}),
    ("dpm++_sde", {"solver_type": "heun"}),
    ("euler", {}),
]


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_step_is_that_of_diffusers(name, options, shift):
    scheduler = make(name, **options)
    generator = torch.Generator().manual_seed(3)
    for count in (4, 5, 9, 14, 15, 20, 50):
        theirs = diffusers_scheduler(name, shift, **options)
        theirs.set_timesteps(count)
        theirs.set_begin_index(0)
        x = other = torch.randn(1, 4, 3, 4, 4, generator=generator)
        history = {}
        for step, t in zip(
            step_table(scheduler, count, shift, "diffusers", 1.0, 1000.0), theirs.timesteps, strict=True
        ):
            assert step.timestep == t.item()
            noise = torch.randn(x.shape, generator=generator) if scheduler.needs_noise else None
            extra = {"variance_noise": noise} if scheduler.needs_noise else {}
            before = other
            other = theirs.step(torch.sin(3 * other) + 0.1 * t / 1000, t, other, **extra).prev_sample
            x, history = scheduler.solve(x, torch.sin(3 * x) + 0.1 * t / 1000, step, history, noise)
            assert x.isfinite().all()
            if options.get("solver_type") == "bh1" and step.index == count - 1:
                # There diffusers computes inf * 0. The last step goes to the x0 prediction.
                assert not other.isfinite().all()
                other = before - step.sigma * (torch.sin(3 * before) + 0.1 * t / 1000)
            assert (x - other).abs().max() <= 1e-5 * other.abs().max(), (count, step)


@pytest.mark.parametrize(("count", "shift"), [(80, 16.0), (100, 12.0), (150, 8.0)])
def test_steps_that_share_a_timestep_are_all_taken(count, shift):
    """The official solvers and diffusers look a step up by its timestep and take the second of two equal ones."""
    scheduler = make("unipc")
    plan = step_table(scheduler, count, shift, "wan", 1.0, 1000.0)
    assert plan[0].timestep == plan[1].timestep == 999
    assert [step.index for step in plan] == list(range(count))

    theirs = diffusers_scheduler("unipc", 1.0)
    theirs.set_timesteps(sigmas=np.array([step.sigma for step in plan]))
    assert theirs.index_for_timestep(theirs.timesteps[0]) == 1  # the bug
    theirs.set_begin_index(0)  # the way around it
    x = other = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    history = {}
    for step, t in zip(plan, theirs.timesteps, strict=True):
        other = theirs.step(torch.sin(3 * other), t, other).prev_sample
        x, history = scheduler.solve(x, torch.sin(3 * x), step, history)
        assert (x - other).abs().max() <= 1e-5 * other.abs().max(), step


def test_explicit_sigmas_are_those_diffusers_takes():
    sigmas = [0.999, 0.9375, 0.8333, 0.625, 0.2]
    theirs = diffusers_scheduler("unipc", 1.0)
    theirs.set_timesteps(sigmas=np.array(sigmas))
    assert np.float32(explicit(sigmas)).tolist() == theirs.sigmas.tolist()
    assert timesteps(explicit(sigmas), "diffusers", "unipc", 1000.0) == theirs.timesteps.tolist()
