"""Rotary positions: the table against its formula, and both ways to turn pairs against each other."""

import math

import pytest
import torch

from ditkit.nn.rope import rope_table, rotate


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5), (2, 7, 1)])
@pytest.mark.parametrize("d", [6, 32, 64, 128])
def test_table(grid, d):
    cos, sin = rope_table(grid, d, torch.device("cpu"), torch.float64)
    side = d // 6
    places = [(f, r, c) for f in range(grid[0]) for r in range(grid[1]) for c in range(grid[2])]
    assert cos.shape == sin.shape == (len(places), 1, d // 2)
    for token, place in enumerate(places):
        angles = []
        for position, count in zip(place, (d // 2 - 2 * side, side, side), strict=True):
            angles += [position * 10000 ** (-i / count) for i in range(count)]
        torch.testing.assert_close(cos[token, 0], torch.tensor([*map(math.cos, angles)], dtype=torch.float64))
        torch.testing.assert_close(sin[token, 0], torch.tensor([*map(math.sin, angles)], dtype=torch.float64))
    narrow = rope_table(grid, d, torch.device("cpu"), torch.float32)
    assert torch.equal(narrow[0], cos.float())
    assert torch.equal(narrow[1], sin.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["dense", "heads first", "every other number"])
def test_both_ways_to_rotate(dtype, layout, monkeypatch):
    wide = torch.promote_types(dtype, torch.float32)
    table = rope_table((2, 3, 4), 16, torch.device("cpu"), wide)
    x = torch.randn(2, 24, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    if layout == "heads first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other number":
        x = x.repeat_interleave(2, -1)[..., ::2]
    with_complex_numbers = rotate(x, *table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    in_halves = rotate(x, *table)
    assert with_complex_numbers.dtype == in_halves.dtype == wide
    tolerance = torch.finfo(wide).eps * 4
    torch.testing.assert_close(with_complex_numbers, in_halves, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(in_halves.norm(dim=-1), x.to(wide).norm(dim=-1))  # a rotation


def test_gradients():
    table = rope_table((1, 2, 2), 6, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: rotate(x, *table), torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    )
