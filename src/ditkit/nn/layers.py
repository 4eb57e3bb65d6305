"""What networks are made of: what one knows of itself when it is loaded, and the small layers of a Wan transformer,
each with its dtype made explicit.

Leaves out: attention (``attention.py``) and positions (``rope.py``)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.devices import for_float64


class Loaded(nn.Module):
    """A network whose weights come from files. They may lie on several devices or be held in other forms, so nothing is
    read off one of them: whoever loads it says with ``loaded`` where and in which dtype it computes. A network that
    nobody loaded is where its first parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.identify: Callable[[], str] = lambda: "not loaded from files"
        self._computes: tuple[torch.device, torch.dtype] | None = None

    def loaded(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self._computes = torch.device(device), dtype

    @property
    def fingerprint(self) -> str:
        """Stands for the weights and how they compute; whoever loads the module sets ``identify``."""
        return self.identify()

    @property
    def device(self) -> torch.device:
        """Where inputs are to be."""
        return self._computes[0] if self._computes else next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._computes[1] if self._computes else next(self.parameters()).dtype


class Linear(nn.Linear):
    """Computes in the dtype of its input; weights held in another dtype are cast for the call."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def modulation(rows: int, dim: int) -> nn.Parameter:
    """A new table [1, rows, dim], random as in the official code. Where there is no data nothing is drawn: on the meta
    device torch would import its compiler for that, 1 to 2 seconds."""
    table = torch.empty(1, rows, dim)
    return nn.Parameter(table if table.is_meta else table.normal_().div_(dim**0.5))


@dataclass(frozen=True)
class Modulation:
    """What the timestep does to blocks and head: ``values`` [B, n, dim], or one row for each different timestep and
    ``token`` [B, L], which says whose row each token takes (a few rows stand for 30,000 tokens)."""

    values: Tensor
    token: Tensor | None = None

    def parts(self, own: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
        """``own`` [1, n, dim] added, then the n parts one by one: [B, 1, dim], or [B, L, dim]."""
        for part in (own.to(wide) + self.values.to(wide)).chunk(own.shape[1], dim=1):
            yield part if self.token is None else part.squeeze(1)[self.token]


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed and returned in float32 (float64 stays float64)."""

    def __init__(self, dim: int, eps: float, affine: bool = False):
        super().__init__()
        self.dim, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(at_least_float32(x.dtype))
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, self.dim, eps=self.eps)
        return F.layer_norm(x, self.dim, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last axis (all heads at once in Wan).

    Normalised in float32, rounded to x's dtype, then times the weight: in the dtype of both together, as the
    official code does (Wan2.1 ``WanRMSNorm``)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.to(at_least_float32(x.dtype))
        return F.rms_norm(wide, self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def timestep_embedding(timestep: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[...] -> [..., dim], cosines first: ``cos(t w_j), sin(t w_j)``, ``w_j = 10000^(-j / (dim / 2))``.

    The official code makes the angles in float64, diffusers in float32 (3e-5 apart at t = 999). Where the device of
    ``timestep`` has no float64, the CPU makes them, and they stay there."""
    half = dim // 2
    timestep = timestep.to(for_float64(timestep.device)) if dtype == torch.float64 else timestep
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=dtype, device=timestep.device))
    angle = timestep.to(dtype).unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def patchify(latents: Tensor, embedding: nn.Conv3d) -> Tensor:
    """[B, C, F, h, w] -> tokens [B, L, dim], column fastest. The same sum as a convolution with stride = kernel."""
    b, c, f, h, w = latents.shape
    p, q, r = embedding.kernel_size
    x = latents.reshape(b, c, f // p, p, h // q, q, w // r, r).permute(0, 2, 4, 6, 1, 3, 5, 7)
    weight, bias = embedding.weight, embedding.bias
    assert bias is not None  # the convolution was made with one
    return F.linear(x.flatten(4).flatten(1, 3), weight.flatten(1).to(x.dtype), bias.to(x.dtype))
