"""Tensors of torch as arrays of MLX and back, bit for bit; and linear layers of packed weights.

Both directions copy. numpy, which stands between the two, has no bfloat16: it travels as 16-bit words. Arrays are
computed before they are handed on: since MLX 0.31 one that is still to be computed is bound to the thread that made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditkit.errors import MissingDependency

try:
    import mlx.core as mx
except ImportError:
    raise MissingDependency("computing with MLX", "mlx is not installed", 'Run: pip install "ditkit[mlx]"') from None

GROUP = 64
"""Weights of a row that share a scale and an offset when they are packed: MLX's own default."""


def to_mlx(tensor: Tensor) -> mx.array:
    """float32, float16 or bfloat16 of any shape, on the CPU."""
    if tensor.dtype != torch.bfloat16:
        return mx.array(tensor.detach().numpy())
    array = mx.array(tensor.detach().contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    mx.eval(array)
    return array


def to_torch(array: mx.array) -> Tensor:
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
        """In which it computes."""
        return self.scales.dtype

    def apply(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=GROUP, bits=self.bits
        )
