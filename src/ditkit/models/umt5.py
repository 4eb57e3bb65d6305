"""The network of Wan's text encoder, UMT5, in plain torch: token ids -> one row of features a token.

Names of modules and tensors, order of operations and casts are those of transformers' ``UMT5EncoderModel`` with eager
attention, so files fit and the bits are equal; importing that class costs more than two seconds, which a short run
feels. Leaves out: the decoder, masks (a prompt runs at its real length), dropout, training.

Legend: B prompts, L tokens, D text width, H heads, d head width.
Sources: Wan2.1 ``wan/modules/t5.py`` (umt5-xxl); transformers ``modeling_umt5.py``."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UMT5Config:
    """Sizes under transformers' names; the defaults are umt5-xxl (5,680,910,336 parameters)."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def buckets_of(distance: Tensor, buckets: int, reach: int) -> Tensor:
    """Which row of the table a distance (key minus query, int64) has: T5's rule for both directions.

    Half of the rows are for keys ahead. Of each half, the first half counts single tokens, the rest grows with the
    logarithm up to ``reach``. In float32, as it was trained: the logarithm decides at the borders."""
    half, ahead = buckets // 2, (distance > 0).long() * (buckets // 2)
    exact, away = half // 2, distance.abs()
    grown = torch.log(away.clamp(min=1).float() / exact) / math.log(reach / exact) * (half - exact)
    return ahead + torch.where(away < exact, away, (exact + grown.long()).clamp(max=half - 1))


def _table(rows: int, width: int) -> nn.Embedding:
    """Without first values: to draw them on the meta device imports torch's compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class RMSNorm(nn.Module):
    """No mean, no shift; the square mean is float32 in every dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype != torch.float32 else x)


class SelfAttention(nn.Module):
    """Scores are not scaled; each block has its own table of relative positions."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = _table(config.relative_attention_num_buckets, config.num_heads)
        self.heads = config.num_heads, config.d_kv

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        """x [B, L, D], ``buckets`` int64 [L, L] -> [B, L, D]."""
        q, k, v = (linear(x).unflatten(-1, self.heads).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) + self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.wi_0(x)  # its GELU is spelt out: torch's own rounds otherwise in the last bit
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        x = gate * self.wi_1(x)
        wide = getattr(self.wo, "weight", None)  # float32 where all else is float16; a swapped layer may have none
        return self.wo(x.to(wide.dtype) if isinstance(wide, Tensor) and wide.is_floating_point() else x)


class _Layer(nn.Module):
    """x plus what comes after a norm, which has transformers' name for it."""

    def __init__(self, config: UMT5Config, name: str, inner: nn.Module):
        super().__init__()
        self.add_module(name, inner)
        self.layer_norm, self.inner = RMSNorm(config.d_model, config.layer_norm_epsilon), name

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return x + getattr(self, self.inner)(self.layer_norm(x), *more)


class Block(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        attention, feed = SelfAttention(config), GatedFeedForward(config)
        layers = [_Layer(config, "SelfAttention", attention), _Layer(config, "DenseReluDense", feed)]
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        attention, feed = self.layer
        return _limited(feed(_limited(attention(x, buckets))))


def _limited(x: Tensor) -> Tensor:
    """float16 kept finite as in transformers: 65504, the largest number, or a bit less once anything has left it."""
    if x.dtype != torch.float16:
        return x
    limit = torch.where(torch.isinf(x).any(), 64504.0, 65504.0)
    return torch.clamp(x, min=-limit, max=limit)


class Stack(nn.Module):
    def __init__(self, config: UMT5Config, embed_tokens: nn.Embedding):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class UMT5Encoder(nn.Module):
    """Token ids int64 [B, L] -> features [B, L, D] in the dtype of the weights."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.config = config
        self.shared = _table(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        config = self.config
        buckets = buckets_of(
            at - at[:, None], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        x = self.encoder.embed_tokens(ids)
        for block in self.encoder.block:
            x = block(x, buckets)
        return self.encoder.final_layer_norm(x)


def build_umt5(config: UMT5Config) -> UMT5Encoder:
    """The network on the meta device, in eval mode, without gradients."""
    with torch.device("meta"):
        return UMT5Encoder(config).eval().requires_grad_(False)
