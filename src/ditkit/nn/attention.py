"""Seam D: the default ``attend``. Other kernels have the same signature and live beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.contracts import Site
from ditkit.registry import Registry, Row

METAL_PRODUCTS = 2**30  # of queries and keys at once on Apple's GPU, all heads together


def sdpa(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """PyTorch's scaled dot product: [B, L, N, d] in and out, no mask, softmax scale 1 / sqrt(d)."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Callable[..., Tensor] | None = None) -> Tensor:
    """[B, N, L, d] in and out by PyTorch's kernel, or by another. On Apple's GPU, whose kernels read transposed views
    wrong (torch 2.8 and later) and lose count beyond 2^32 products, from blocks of memory and some rows at a time."""
    kernel = kernel or F.scaled_dot_product_attention
    if q.device.type != "mps":
        return kernel(q, k, v)
    k, v = k.contiguous(), v.contiguous()
    rows = max(1, METAL_PRODUCTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    return torch.cat([kernel(part.contiguous(), k, v) for part in q.split(rows, 2)], 2)


def dense(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The same written out, with the whole L x L matrix in memory: the reference that kernels are compared with."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _written_out).transpose(1, 2)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


ATTENTION: Registry["AttentionRow"] = Registry("attention kernel", "ditkit.attention")


@dataclass(frozen=True)
class AttentionRow(Row):
    """``make``: an ``attend(q, k, v, site)``; the row can be called as that. ``lacks``: why it cannot be used on this
    machine, or nothing."""

    name: str
    make: Any
    help: str = ""
    lacks: Callable[[], str] = lambda: ""

    registry: ClassVar[Registry[Any]] = ATTENTION

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return self.made(q, k, v, site)


ATTENTION.add(AttentionRow("sdpa", sdpa, "PyTorch's scaled dot product"), "ditkit")
ATTENTION.add(AttentionRow("dense", dense, "the formula written out; slow, the reference"), "ditkit")
