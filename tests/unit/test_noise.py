"""Seeds: what is drawn depends on (seed, step) and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditkit.errors import RequestError
from ditkit.schedulers.noise import initial_noise, step_noise

SHAPE = (4, 3, 5, 6)
SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS)
@settings(max_examples=30)
def test_initial_noise_is_that_of_a_cpu_generator(seed):
    noise = initial_noise(seed, SHAPE)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    assert torch.equal(noise, torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
    # diffusers draws a batch of one
    assert torch.equal(noise, torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed))[0])


@given(SEEDS, st.integers(0, 1000))
@settings(max_examples=30)
def test_step_noise_repeats_and_differs_from_all_other_noise(seed, step):
    noise = step_noise(seed, step, SHAPE)
    assert torch.equal(noise, step_noise(seed, step, SHAPE))
    others = [initial_noise(seed, SHAPE), step_noise(seed, step + 1, SHAPE), step_noise(seed ^ 1, step, SHAPE)]
    others += [step_noise(seed ^ 2**40, step, SHAPE), initial_noise((seed + step) % 2**63, SHAPE)]
    for other in others:
        correlation = torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 0.35  # 360 numbers: over 6 standard deviations


def test_step_noise_of_known_seeds_never_changes():
    """Saved runs go on with the same noise: these numbers are part of the format."""
    expected = {
        (0, 0): [1.243043, -0.290535, 0.264172],
        (0, 1): [-0.781558, 0.457701, -0.710179],
        (7, 3): [-1.579493, 0.004639, -0.274343],
        (2**63 - 1, 49): [1.757904, 0.156214, 0.201763],
    }
    for (seed, step), values in expected.items():
        torch.testing.assert_close(step_noise(seed, step, (3,)), torch.tensor(values), rtol=0, atol=1e-6)


def test_noise_is_normal():
    noise = torch.stack([step_noise(7, step, (16, 4, 8, 8)) for step in range(20)])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    rows = torch.corrcoef(noise.flatten(1)) - torch.eye(20)
    assert rows.abs().max() < 0.08  # 4096 numbers: 5 standard deviations


def test_torchs_own_state_neither_matters_nor_changes():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = initial_noise(0, SHAPE), step_noise(0, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        second = initial_noise(0, SHAPE), step_noise(0, 0, SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], initial_noise(1, SHAPE))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "7"])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(RequestError, match="seed"):
        initial_noise(seed, SHAPE)
    with pytest.raises(RequestError, match="seed"):
        step_noise(seed, 0, SHAPE)


def test_steps_count_from_zero():
    with pytest.raises(RequestError, match="count from 0"):
        step_noise(0, -1, SHAPE)
