"""Seam D: the default ``attend``. Other kernels have the same signature and live beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ditkit.contracts import Site
from ditkit.registry import Registry, Row


def sdpa(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """PyTorch's scaled dot product: [B, L, N, d] in and out, no mask, softmax scale 1 / sqrt(d)."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The same written out, with the whole L x L matrix in memory: the reference that kernels are compared with."""
    logits = q.transpose(1, 2) @ k.transpose(1, 2).mT * q.shape[-1] ** -0.5
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


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
