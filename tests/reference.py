"""The Wan 2.1 transformer once more, as plain float64 arithmetic: slow, short, and sharing no line with ditkit.

It is written from the formulas of the official ``wan/modules/model.py`` alone: sums are spelled out, rotations are
complex numbers, the softmax is explicit, samples are done one at a time. What it computes is the yardstick for the
float64 path of ditkit and for the rounding errors of its narrower ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TEXT_ROWS = 512


def linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("oi,...i->...o", w[f"{name}.weight"], x) + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def standardise(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def rms(w: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]


def turns(frames: int, rows: int, columns: int, d: int) -> Tensor:
    """One unit complex number for each token and pair of numbers: [L, 1, d/2]."""
    pairs = d // 2
    side = pairs // 3
    tokens = []
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                angles = []
                for position, count in ((f, pairs - 2 * side), (r, side), (c, side)):
                    angles += [position / 10000 ** (i / count) for i in range(count)]
                tokens.append([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.tensor(tokens, dtype=torch.complex128).unsqueeze(1)


def turned(x: Tensor, by: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * by).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Lq, N, d], [Lk, N, d] -> [Lq, N * d]."""
    logits = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)


def one(w: Mapping[str, Tensor], heads: int, layers: int, eps: float, latents: Tensor, timestep: float, text: Tensor):
    """[C, F, h, w], a timestep and [rows, D] of text -> velocity [C', F, h, w]."""
    _, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2

    patches = [
        latents[:, f, r : r + 2, c : c + 2]
        for f in range(frames)
        for r in range(0, height, 2)
        for c in range(0, width, 2)
    ]
    x = torch.einsum("ocyx,ncyx->no", w["patch_embedding.weight"][:, :, 0], torch.stack(patches))
    x = x + w["patch_embedding.bias"]
    dim = x.shape[1]

    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = [timestep / 10000 ** (j / half) for j in range(half)]
    sinusoid = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    time = linear(w, "time_embedding.2", silu(linear(w, "time_embedding.0", sinusoid)))
    six = linear(w, "time_projection.1", silu(time)).view(6, dim)

    context = torch.cat([text, torch.zeros(TEXT_ROWS - len(text), text.shape[1], dtype=torch.float64)])
    context = linear(w, "text_embedding.2", gelu(linear(w, "text_embedding.0", context)))

    def split(t: Tensor) -> Tensor:
        return t.view(len(t), heads, dim // heads)

    rope = turns(frames, rows, columns, dim // heads)
    for n in range(layers):
        b = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = w[f"{b}.modulation"][0] + six
        a = standardise(x, eps) * (1 + scale1) + shift1
        q, k = (split(rms(w, f"{b}.self_attn.norm_{i}", linear(w, f"{b}.self_attn.{i}", a), eps)) for i in "qk")
        v = split(linear(w, f"{b}.self_attn.v", a))
        x = x + gate1 * linear(w, f"{b}.self_attn.o", attention(turned(q, rope), turned(k, rope), v))
        a = standardise(x, eps) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"]
        q = split(rms(w, f"{b}.cross_attn.norm_q", linear(w, f"{b}.cross_attn.q", a), eps))
        k = split(rms(w, f"{b}.cross_attn.norm_k", linear(w, f"{b}.cross_attn.k", context), eps))
        x = x + linear(w, f"{b}.cross_attn.o", attention(q, k, split(linear(w, f"{b}.cross_attn.v", context))))
        a = standardise(x, eps) * (1 + scale2) + shift2
        x = x + gate2 * linear(w, f"{b}.ffn.2", gelu(linear(w, f"{b}.ffn.0", a)))

    shift, scale = w["head.modulation"][0] + time
    y = linear(w, "head.head", standardise(x, eps) * (1 + scale) + shift)
    y = y.view(frames, rows, columns, 2, 2, -1)  # within a token: row, column, channel
    out = torch.empty(y.shape[-1], frames, height, width, dtype=torch.float64)
    for r in range(2):
        for c in range(2):
            out[:, :, r::2, c::2] = y[:, :, :, r, c].permute(3, 0, 1, 2)
    return out


def wan(
    weights: Mapping[str, Tensor], heads: int, latents: Tensor, timestep: Sequence[float], text: Sequence[Tensor],
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """``weights`` under their official names. Latents [B, C, F, h, w], B timesteps, B times [rows, D] of text."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    samples = zip(latents.double(), timestep, text, strict=True)
    return torch.stack([one(w, heads, layers, eps, x, float(t), rows.double()) for x, t, rows in samples])


def rel(a: Tensor, b: Tensor) -> float:
    """The largest error, relative to the largest value of ``b``."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a - b).abs().max() / b.abs().max())


def l2(a: Tensor, b: Tensor) -> float:
    """The root mean square error, relative to that of ``b``."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a - b).norm() / b.norm())
