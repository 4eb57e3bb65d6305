"""One convolution, two kernels on a CPU: the faster one, by a rule that was measured.

PyTorch sends a convolution of one sample to oneDNN only if batch x channels x frames x height exceeds 20,480,
whatever the work is; below that it unfolds the input and multiplies matrices. For a video VAE that is slower by a
factor of up to five. GFLOP/s on one thread (EPYC with AVX-512, torch 2.13, kernel 3x3x3, 4 output frames):

    channels, size      PyTorch's choice   3 x conv2d   frames folded into channels   oneDNN
     3 ->  12,  64x64          17              44                  39                   58
    12 ->  12,  64x64          15              62                  35                   69
    12 ->   3,  64x64         4.5              17                 8.5                   17
    24 ->  24,  32x32          26              71                  49                   73
    48 ->  48,  16x16          44              88                  77                   92
    96 ->  96,  32x32          36             104                  89                  113
    96 ->  96,  96x128        110 (oneDNN)    109                  72                  110
    96 ->   3,  96x128         19 (oneDNN)     19                   5                   19

Below four million products the unfolding wins, by some microseconds. Gradients, compiled graphs, other devices and
other dtypes keep PyTorch's own choice. Both kernels give the same sum in another order (1e-6 apart)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ENOUGH_PRODUCTS = 4_000_000


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """``x`` [B, C, *sizes] with ``weight`` [C', C, *kernel]: what F.conv2d (two sizes) and F.conv3d (three) compute."""
    if x.device.type == "mps":
        return _on_metal(x, weight.contiguous(), bias, stride, padding)
    if takes_onednn(x, weight) and products(x, weight, stride) >= ENOUGH_PRODUCTS:
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * len(stride), 1)
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, stride, padding)


def _on_metal(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """On Apple's GPU, where F.conv3d is wrong in some versions of torch and macOS: as the sum of one F.conv2d for each
    frame of the kernel, each with a weight of its own memory (views are read wrong too)."""
    if x.dim() == 4:
        return F.conv2d(x.contiguous(), weight, bias, stride, padding)
    (every, *stride2), (margin, *padding2) = stride, padding
    assert not margin  # whoever calls it brings the frames in front
    frames = x.transpose(1, 2).contiguous()
    count = (frames.shape[1] - weight.shape[2]) // every + 1
    total: Tensor | None = None
    for at in range(weight.shape[2]):
        tap = frames[:, at : at + (count - 1) * every + 1 : every].flatten(0, 1)
        y = F.conv2d(tap, weight[:, :, at].contiguous(), None if at else bias, stride2, padding2)
        total = y if total is None else total.add_(y)
    assert total is not None  # a kernel has at least one frame
    return total.unflatten(0, (len(x), count)).transpose(1, 2)


def after_zeros(x: Tensor, frames: int) -> Tensor:
    """``x`` [B, C, T, H, W] with so many frames of zeros in front. On Apple's GPU not by F.pad, which writes wrong
    numbers there from 65,536 pixels on."""
    if not frames:
        return x
    if x.device.type == "mps":
        return torch.cat((x.new_zeros(*x.shape[:2], frames, *x.shape[3:]), x), 2)
    return F.pad(x, (0, 0, 0, 0, frames, 0))


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def products(x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> int:
    """Multiplications of the sum, about: the frames and pixels at the border are counted too."""
    return weight.numel() * x.shape[0] * math.prod(x.shape[2:]) // math.prod(stride)
