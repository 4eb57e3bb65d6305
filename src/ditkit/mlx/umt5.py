"""The UMT5 text encoder of Wan in MLX: token ids of one prompt -> one row of features a token.

The same network, files and names of tensors as in ``models/encoders.py``, and the same order of operations and casts
as in transformers, so that they agree to rounding. On Apple silicon MLX computes on the GPU, on Linux on the CPU. A
prompt runs at its real length. Leaves out: files and layouts (checkpoints), and the other encoders.

Legend: L tokens, D text width, H heads, d head width. Source of the sizes: Wan2.1 ``wan/modules/t5.py`` (umt5-xxl)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES, umt5_keys
from ditkit.checkpoints.load import fit, identify_weights, read, two_names_differ
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import MissingDependency, SetupError
from ditkit.mlx import BITS, exact_name
from ditkit.models.encoders import check_ids
from ditkit.models.umt5 import UMT5Config, buckets_of

try:
    import mlx.core as mx
except ImportError:
    raise MissingDependency("computing with MLX", "mlx is not installed", 'Run: pip install "ditkit[mlx]"') from None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 64  # weights of a row that share a scale and an offset when they are packed: MLX's own default

_turn = threading.Lock()
"""MLX makes no promise about threads that compute at the same time; encoders share one device anyway."""


def to_mlx(tensor: Tensor) -> mx.array:
    """A copy, bit for bit, of float32, float16 or bfloat16 of any shape on the CPU. numpy, which stands between the
    two, has no bfloat16: it travels as 16-bit words.

    It is computed before it is handed on: since MLX 0.31 an array that is still to be computed is bound to the thread
    that made it."""
    if tensor.dtype != torch.bfloat16:
        return mx.array(tensor.detach().numpy())
    array = mx.array(tensor.detach().contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    mx.eval(array)
    return array


def to_torch(array: mx.array) -> Tensor:
    """The same the other way."""
    if array.dtype != mx.bfloat16:
        return torch.from_numpy(np.array(array))
    return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """A weight [out, in] as integers of ``bits`` bits, with a scale and an offset for each 64 numbers of a row."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int

    @classmethod
    def of(cls, weight: mx.array, bits: int) -> Packed:
        """``in`` must be a multiple of 64."""
        packed = mx.quantize(weight, group_size=GROUP, bits=bits)
        mx.eval(*packed)
        return cls(*packed, bits=bits)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes

    @property
    def dtype(self) -> mx.Dtype:
        return self.scales.dtype

    def apply(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=GROUP, bits=self.bits
        )


def shapes(sizes: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder under transformers' name, once."""
    wide, inner = sizes.d_model, sizes.num_heads * sizes.d_kv
    of_layer = {
        "shared": (sizes.vocab_size, wide), **dict.fromkeys("qkv", (inner, wide)), "o": (wide, inner),
        "relative_attention_bias": (sizes.relative_attention_num_buckets, sizes.num_heads),
        "wi_0": (sizes.d_ff, wide), "wi_1": (sizes.d_ff, wide), "wo": (wide, sizes.d_ff),
        "layer_norm": (wide,), "final_layer_norm": (wide,),
    }  # fmt: skip
    return {name: of_layer[name.split(".")[-2]] for name in umt5_keys(sizes.num_layers).to_other.values()}


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer: those are packed; the embedding, the norms and the tables of
    relative positions are not."""
    return name.split(".")[-2] in ("q", "k", "v", "o", "wi_0", "wi_1", "wo")


class Network:
    """The encoder as a function of its weights."""

    def __init__(self, sizes: UMT5Config, weights: Mapping[str, mx.array | Packed]):
        self.sizes, self.weights = sizes, weights

    def __call__(self, ids: Sequence[int]) -> mx.array:
        """[L] -> [L, D]; still to be computed."""
        sizes, places = self.sizes, torch.arange(len(ids))
        buckets, reach = sizes.relative_attention_num_buckets, sizes.relative_attention_max_distance
        rows = mx.array(buckets_of(places[None] - places[:, None], buckets, reach).numpy())
        x = self.table("shared")[mx.array(list(ids))]
        for n in range(sizes.num_layers):
            block = f"encoder.block.{n}"
            x = _inside(x + self.attention(f"{block}.layer.0", self.norm(f"{block}.layer.0.layer_norm", x), rows))
            x = _inside(x + self.feed_forward(f"{block}.layer.1", self.norm(f"{block}.layer.1.layer_norm", x)))
        return self.norm("encoder.final_layer_norm", x)

    def linear(self, name: str, x: mx.array) -> mx.array:
        """In the dtype of the weight, which is wider than x in one place (``wo`` with float16)."""
        weight = self.weights[f"{name}.weight"]
        x = x.astype(weight.dtype)
        return weight.apply(x) if isinstance(weight, Packed) else x @ weight.T

    def table(self, name: str) -> mx.array:
        """A weight that is never packed."""
        weight = self.weights[f"{name}.weight"]
        assert not isinstance(weight, Packed), name
        return weight

    def norm(self, name: str, x: mx.array) -> mx.array:
        """Scale without mean or offset. The mean of squares is float32; the rest has the dtype of the weight."""
        weight = self.table(name)
        wide = x.astype(mx.float32)
        wide = wide * mx.rsqrt((wide * wide).mean(-1, keepdims=True) + self.sizes.layer_norm_epsilon)
        return weight * wide.astype(weight.dtype)

    def attention(self, layer: str, x: mx.array, rows: mx.array) -> mx.array:
        """No 1/sqrt(d); a bias for each head and distance, from the block's own table. ``rows``: [L, L]."""
        name = f"{layer}.SelfAttention"
        q, k, v = (self.heads(self.linear(f"{name}.{part}", x)) for part in "qkv")
        bias = self.table(f"{name}.relative_attention_bias")[rows].transpose(2, 0, 1)
        shares = mx.softmax((q @ k.swapaxes(-1, -2) + bias).astype(mx.float32), axis=-1).astype(v.dtype)
        return self.linear(f"{name}.o", (shares @ v).swapaxes(0, 1).reshape(len(x), -1))

    def heads(self, x: mx.array) -> mx.array:
        """[L, H d] -> [H, L, d]."""
        return x.reshape(len(x), self.sizes.num_heads, self.sizes.d_kv).swapaxes(0, 1)

    def feed_forward(self, layer: str, x: mx.array) -> mx.array:
        name = f"{layer}.DenseReluDense"
        return self.linear(f"{name}.wo", _gelu(self.linear(f"{name}.wi_0", x)) * self.linear(f"{name}.wi_1", x))


def _gelu(x: mx.array) -> mx.array:
    """Its form with tanh. In float32: MLX gives Python's numbers the array's dtype, and 0.044715 suffers from it."""
    wide = x.astype(mx.float32)
    wide = 0.5 * wide * (1.0 + mx.tanh(math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide))))
    return wide.astype(x.dtype)


def _inside(x: mx.array) -> mx.array:
    """float16 only: infinities come back into its range, as transformers has it (``UMT5Block``)."""
    if x.dtype != mx.float16:
        return x
    largest = mx.finfo(mx.float16).max
    limit = mx.where(mx.isinf(x).any(), largest - 1000, largest).astype(mx.float16)
    return mx.clip(x, -limit, limit)


class MLXTextEncoder:
    """Satisfies ``contracts.TextEncoder``. Threads may share an encoder; they take turns."""

    def __init__(self, network: Network, dtype: torch.dtype, where: str, identify: Callable[[], str]):
        self.network, self.dtype, self.where, self.identify = network, dtype, where, identify
        self.vocab_size, self.dim = network.sizes.vocab_size, network.sizes.d_model

    @classmethod
    def load(
        cls, config: UMT5Config, source: TensorSource, dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
        backend: str = "mlx",
    ) -> MLXTextEncoder:  # fmt: skip
        """``dtype`` and the exception of float16 as for ``UMT5TextEncoder.load``. ``device``: cpu, or
        MLX's GPU (mps, cuda:0). ``backend``: a key of ``BITS``; with bits, linear layers are packed from ``dtype``.

        Tensors come one by one: memory holds the weights and one tensor more. Raises LoadError, SetupError."""
        asked = f"loading the text encoder with {backend} from {source.path}"
        if dtype not in DTYPES:
            found = f"MLX computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
            raise SetupError(asked, found, "Set dtypes.text_encoder to one of them")
        with _turn, mx.stream(_device(device)):
            weights = _load(asked, config, source, dtype, BITS[backend])
        identify = identify_weights(source, dtype, config, (), exact_name(backend))
        return cls(Network(config, weights), dtype, device, identify)

    @property
    def fingerprint(self) -> str:
        """Stands for the weights, the sizes, the dtype, the bits and MLX's version. At first it reads all files."""
        return self.identify()

    @property
    def facts(self) -> dict[str, Any]:
        """What is known only once it is loaded."""
        return {"weight_bytes": sum(weight.nbytes for weight in self.network.weights.values())}

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Ids of one prompt, unpadded -> [len(ids), D] in the encoder's dtype, on the CPU.

        Raises RequestError for no ids at all, LoadError for ids that the embedding does not have."""
        check_ids(ids, self.vocab_size)
        with _turn, mx.stream(_device(self.where)):
            rows = self.network(ids)
            mx.eval(rows)
            return to_torch(rows)


def _device(name: str) -> mx.Device:
    return mx.Device(mx.cpu if name == "cpu" else mx.gpu)


def _load(
    asked: str, config: UMT5Config, source: TensorSource, dtype: torch.dtype, bits: int | None
) -> dict[str, mx.array | Packed]:
    wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes(config).items()}
    if odd := [name for name, tensor in wanted.items() if bits and is_linear(name) and tensor.shape[1] % GROUP]:
        found = f"{odd[0]} has rows of {wanted[odd[0]].shape[1]} numbers, and they are packed by {GROUP}"
        raise SetupError(asked, found, "Use the backend mlx")
    target = fit(asked, wanted, source, UMT5_ALIASES)
    weights: dict[str, mx.array | Packed] = {}
    for key in source.tensors:
        name = target[key]
        wide = dtype == torch.float16 and name.endswith(".wo.weight")
        array = to_mlx(read(asked, source, key, torch.float32 if wide else dtype))
        if name not in weights:
            weights[name] = Packed.of(array, bits) if bits and is_linear(name) else array
            continue
        first = weights[name]
        if isinstance(first, Packed) or not mx.array_equal(first, array).item():  # two names: only of the embedding
            raise two_names_differ(asked, key, name)
    mx.clear_cache()
    return weights
