"""Seam D: the default ``attend``. Other kernels have the same signature and live beside it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ditkit.contracts import Site


def sdpa(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """PyTorch's scaled dot product: [B, L, N, d] in and out, no mask, softmax scale 1 / sqrt(d)."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The same written out, with the whole L x L matrix in memory: the reference that kernels are compared with."""
    logits = q.transpose(1, 2) @ k.transpose(1, 2).mT * q.shape[-1] ** -0.5
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


ATTENTION = {"sdpa": sdpa, "dense": dense}
