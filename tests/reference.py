"""The Wan transformer once more, as plain float64 arithmetic: slow, short, and sharing no line with ditkit.

It is written from the formulas of the official ``wan/modules/model.py`` and ``vace_model.py`` alone: sums are spelled
out, rotations are complex numbers, the softmax is explicit, samples are done one at a time. What it computes is the
yardstick for the float64 path of ditkit and for the rounding errors of its narrower ones.
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


def split(t: Tensor, heads: int) -> Tensor:
    return t.view(len(t), heads, -1)


def block(w: Mapping[str, Tensor], b: str, heads: int, eps: float, x: Tensor, six: Tensor, rope: Tensor, rows: Tensor,
          image: Tensor | None) -> Tensor:  # fmt: skip
    """Tokens x [L, D], the six vectors of the timestep [1 or L, 6, D], rows of text and of the image, embedded."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (w[f"{b}.modulation"] + six).unbind(1)
    a = standardise(x, eps) * (1 + scale1) + shift1
    q, k = (split(rms(w, f"{b}.self_attn.norm_{i}", linear(w, f"{b}.self_attn.{i}", a), eps), heads) for i in "qk")
    v = split(linear(w, f"{b}.self_attn.v", a), heads)
    x = x + gate1 * linear(w, f"{b}.self_attn.o", attention(turned(q, rope), turned(k, rope), v))

    c = f"{b}.cross_attn"
    a = standardise(x, eps) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"]
    q = split(rms(w, f"{c}.norm_q", linear(w, f"{c}.q", a), eps), heads)
    k, v = rms(w, f"{c}.norm_k", linear(w, f"{c}.k", rows), eps), linear(w, f"{c}.v", rows)
    seen = attention(q, split(k, heads), split(v, heads))
    if image is not None:
        k, v = rms(w, f"{c}.norm_k_img", linear(w, f"{c}.k_img", image), eps), linear(w, f"{c}.v_img", image)
        seen = seen + attention(q, split(k, heads), split(v, heads))
    x = x + linear(w, f"{c}.o", seen)

    a = standardise(x, eps) * (1 + scale2) + shift2
    return x + gate2 * linear(w, f"{b}.ffn.2", gelu(linear(w, f"{b}.ffn.0", a)))


def embedded(w: Mapping[str, Tensor], name: str, latents: Tensor) -> Tensor:
    """[C, F, h, w] -> tokens [L, D], one for each 2x2 patch; frame, row, column."""
    _, frames, height, width = latents.shape
    patches = [
        latents[:, f, r : r + 2, c : c + 2]
        for f in range(frames)
        for r in range(0, height, 2)
        for c in range(0, width, 2)
    ]
    return torch.einsum("ocyx,ncyx->no", w[f"{name}.weight"][:, :, 0], torch.stack(patches)) + w[f"{name}.bias"]


def sinusoid(w: Mapping[str, Tensor], timestep: float) -> Tensor:
    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = [timestep / 10000 ** (j / half) for j in range(half)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)


def picture(w: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """CLIP features -> rows for the image's own attention. The GELU here is the exact one."""

    def norm(name: str, x: Tensor) -> Tensor:
        return standardise(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    if "img_emb.emb_pos" in w:
        rows = rows + w["img_emb.emb_pos"][0]
    x = linear(w, "img_emb.proj.1", norm("img_emb.proj.0", rows))
    x = linear(w, "img_emb.proj.3", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    return norm("img_emb.proj.4", x)


def one(w: Mapping[str, Tensor], heads: int, layers: int, eps: float, latents: Tensor, timestep: Sequence[float],
        text: Tensor, image: Tensor | None, control: Tensor | None, hints: Mapping[int, float]) -> Tensor:  # fmt: skip
    """[C, F, h, w], one timestep or one for each token, [rows, D] of text, CLIP rows, VACE's input -> [C', F, h, w].
    ``hints``: main block -> how much its hint counts."""
    _, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2
    x = embedded(w, "patch_embedding", latents)
    dim = x.shape[1]

    waves = torch.stack([sinusoid(w, t) for t in timestep])
    time = linear(w, "time_embedding.2", silu(linear(w, "time_embedding.0", waves)))
    six = linear(w, "time_projection.1", silu(time)).view(-1, 6, dim)

    context = torch.cat([text, torch.zeros(TEXT_ROWS - len(text), text.shape[1], dtype=torch.float64)])
    context = linear(w, "text_embedding.2", gelu(linear(w, "text_embedding.0", context)))
    seen = None if image is None else picture(w, image)
    rope = turns(frames, rows, columns, dim // heads)
    rest = (heads, eps)

    added = {}
    if control is not None:  # all hints before the first main block, as the official code makes them
        c = linear(w, "vace_blocks.0.before_proj", embedded(w, "vace_patch_embedding", control)) + x
        for number, (target, scale) in enumerate(hints.items()):
            c = block(w, f"vace_blocks.{number}", *rest, c, six, rope, context, seen)
            added[target] = scale * linear(w, f"vace_blocks.{number}.after_proj", c)
    for n in range(layers):
        x = block(w, f"blocks.{n}", *rest, x, six, rope, context, seen)
        x = x + added.get(n, 0)

    shift, scale = (w["head.modulation"] + time.unsqueeze(1)).unbind(1)
    y = linear(w, "head.head", standardise(x, eps) * (1 + scale) + shift)
    y = y.view(frames, rows, columns, 2, 2, -1)  # within a token: row, column, channel
    out = torch.empty(y.shape[-1], frames, height, width, dtype=torch.float64)
    for r in range(2):
        for c in range(2):
            out[:, :, r::2, c::2] = y[:, :, :, r, c].permute(3, 0, 1, 2)
    return out


def wan(
    weights: Mapping[str, Tensor], heads: int, latents: Tensor, timestep: Tensor | Sequence[float],
    text: Sequence[Tensor], image: Tensor | None = None, control: Tensor | None = None,
    hints: Mapping[int, float] | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """``weights`` under their official names. Latents [B, C, F, h, w] with any condition behind them, timesteps [B] or
    [B, L], B times [rows, D] of text; CLIP features [B, n, D'], VACE's input [B, 96, F, h, w]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    results = []
    for i, (x, rows) in enumerate(zip(latents.double(), text, strict=True)):
        times = torch.as_tensor(timestep[i], dtype=torch.float64).reshape(-1).tolist()
        seen, steered = (None if extra is None else extra[i].double() for extra in (image, control))
        results.append(one(w, heads, layers, eps, x, times, rows.double(), seen, steered, hints or {}))
    return torch.stack(results)


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
