"""The two kernels behind one convolution: the same sum, and the rule that chooses between them."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import rel

from ditkit.models.vae_layers import RMSNorm
from ditkit.models.wan_vae import WanVAEConfig
from ditkit.nn import convolution as module
from ditkit.nn.convolution import ENOUGH_PRODUCTS, convolution, products, takes_onednn

# C', C, kernel, sizes, stride, padding
SHAPES = [
    (5, 3, (3, 3, 3), (3, 9, 7), (1, 1, 1), (0, 1, 1)),
    (12, 12, (3, 3, 3), (6, 40, 36), (1, 1, 1), (0, 1, 1)),
    (24, 24, (3, 1, 1), (5, 16, 16), (2, 1, 1), (0, 0, 0)),
    (16, 48, (1, 1, 1), (2, 33, 5), (1, 1, 1), (0, 0, 0)),
    (20, 30, (3, 3), (25, 19), (2, 2), (0, 0)),
    (3, 64, (3, 3), (48, 48), (1, 1), (1, 1)),
]


def given(shape, dtype=torch.float32, batch=1):
    out, into, kernel, sizes, stride, padding = shape
    g = torch.Generator().manual_seed(math.prod(sizes))
    x, weight = torch.randn(batch, into, *sizes, generator=g), torch.randn(out, into, *kernel, generator=g)
    return (
        x.to(dtype),
        (weight / weight[0].numel() ** 0.5).to(dtype),
        torch.randn(out, generator=g).to(dtype),
        stride,
        padding,
    )


def plain(x, weight, bias, stride, padding):
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, stride, padding)


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("enough", [0, ENOUGH_PRODUCTS])
def test_both_kernels_give_the_sum(shape, batch, enough, monkeypatch):
    monkeypatch.setattr(module, "ENOUGH_PRODUCTS", enough)
    exact = plain(*given(shape, torch.float64, batch))
    assert rel(convolution(*given(shape, torch.float32, batch)), exact) <= 2e-6
    dense = given(shape, torch.float32, batch)
    layout = torch.channels_last if dense[0].dim() == 4 else torch.channels_last_3d
    assert rel(convolution(dense[0].contiguous(memory_format=layout), *dense[1:]), exact) <= 2e-6
    sliced = torch.cat((dense[0], dense[0]), 2)[:, :, dense[0].shape[2] :]
    assert rel(convolution(sliced, *dense[1:]), exact) <= 2e-6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_who_takes_onednn():
    x, weight, *_ = given(SHAPES[1])
    with torch.no_grad():
        assert takes_onednn(x, weight)
        assert not takes_onednn(x.double(), weight.double())
        assert not takes_onednn(x.bfloat16(), weight.bfloat16())
        assert not takes_onednn(x.to("meta"), weight.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes_onednn(x, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not takes_onednn(x, weight)
    assert not takes_onednn(x, weight)  # gradients are on


def test_gradients_and_other_dtypes_are_pytorchs_own():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, *rest = given(SHAPES[1], dtype)
        x.requires_grad_()
        assert torch.equal(convolution(x, *rest), plain(x, *rest))
        assert convolution(x, *rest).sum().requires_grad


def test_products():
    x, weight, _, stride, _ = given(SHAPES[2])
    assert products(x, weight, stride) == 24 * 24 * 3 * 5 * 16 * 16 // 2


def test_a_vae_with_gradients_and_without(monkeypatch):
    """The in-place and oneDNN path against the plain one, on a size where it is taken; gradients reach every weight."""
    vae = tiny.vae(config=WanVAEConfig(dim=8))
    clip = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        monkeypatch.setattr(module, "ENOUGH_PRODUCTS", 0)
        latents = vae.encode(clip)
        frames = torch.cat(list(vae.decode(latents)), 2)
    vae.requires_grad_(True)
    plain_latents = vae.encode(clip)
    plain_frames = torch.cat(list(vae.decode(latents.clone())), 2)
    assert rel(latents, plain_latents.detach()) <= 3e-6
    assert rel(frames, plain_frames.detach()) <= 1e-5
    (plain_frames.square().mean() + plain_latents.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in vae.named_parameters() if n != "conv1.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_black_pixels_stay_finite(dtype):
    """The norm of a pixel whose channels are all zero is 0; it must give 0, with and without gradients."""
    norm, x = RMSNorm(6, 3, silu=True).to(dtype), torch.zeros(1, 6, 2, 3, 3, dtype=dtype)
    x[0, :, 0] = torch.randn(6, 3, 3, dtype=dtype)
    with torch.no_grad():
        before = x.clone()
        y = norm(x)
        assert torch.equal(x, before)  # nothing is written to what came in
    assert torch.equal(y[0, :, 1], torch.zeros(6, 3, 3, dtype=dtype))
    assert torch.equal(norm(x), y)
