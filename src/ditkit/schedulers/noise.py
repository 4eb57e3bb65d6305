"""All randomness of a run: the noise it starts from and the noise that a step adds.

Drawn on the CPU in float32 from (seed, step) alone, one sample at a time: the same on every device, after a resume, and
wherever in a batch the sample lies. Nothing is read off or left in torch's global generator."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ditkit.errors import RequestError


def initial_noise(seed: int, shape_without_batch: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample, float32 on the CPU; the numbers of ``torch.randn`` with a CPU generator of
    that seed (what diffusers draws for a batch of one). torch's CPU generator uses the low 32 bits of a seed: two seeds
    that agree there start alike. Raises RequestError for a seed outside 0 .. 2^64 - 1."""
    return _normal(_checked(seed), shape_without_batch)


def step_noise(seed: int, step_index: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample for one step, float32 on the CPU, independent of the initial noise and of
    every other step's. Its generator is seeded with the first 8 bytes (little-endian) of the SHA-256 of the ASCII text
    ``ditkit step noise SEED STEP``, numbers in decimal. Raises RequestError as ``initial_noise`` does."""
    if step_index < 0:
        raise RequestError(f"noise of step {step_index}", "steps count from 0", "Hand in the index of the step")
    digest = hashlib.sha256(f"ditkit step noise {_checked(seed)} {int(step_index)}".encode("ascii")).digest()
    return _normal(int.from_bytes(digest[:8], "little"), shape)


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise RequestError(f"seed {seed!r}", "not a whole number from 0 to 2^64 - 1", "Choose a seed in that range")
    return seed


def _normal(seed: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)
