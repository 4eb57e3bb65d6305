"""The UMT5 text encoder of Wan: token ids of one prompt -> one row of features a token.

The network is transformers' ``UMT5EncoderModel``, built empty and filled by our own strict loader; transformers is
imported only when an encoder is built. A prompt runs at its real length: padded keys are masked in the official code,
so they change no row that is kept. Leaves out: tokenizing (text.py) and padding (the transformer's own business).
Source of the sizes: Wan2.1 ``wan/modules/t5.py`` (umt5-xxl).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES
from ditkit.checkpoints.load import Device, identify_weights, load_into
from ditkit.checkpoints.views.source import TensorSource
from ditkit.contracts import Swap
from ditkit.errors import LoadError, RequestError


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


def build(config: UMT5Config) -> nn.Module:
    """transformers' encoder on the meta device, in eval mode, with plain (eager) attention."""
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    settings: dict[str, Any] = asdict(config) | {"feed_forward_proj": "gated-gelu", "attn_implementation": "eager"}
    theirs = TheirConfig(**settings)
    with torch.device("meta"):
        return UMT5EncoderModel(theirs).eval().requires_grad_(False)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for no ids at all, LoadError for ids that the embedding does not have."""
    if not len(ids):
        raise RequestError("encoding a prompt", "it has no tokens", "Give at least the end token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        found = f"the ids reach from {min(ids)} to {max(ids)} and it knows 0 to {vocab_size - 1}"
        raise LoadError("encoding a prompt with this text encoder", found, "Use the tokenizer of the same model")


class UMT5TextEncoder:
    """Satisfies ``contracts.TextEncoder``; ``model`` is a filled ``UMT5EncoderModel``. Threads may share an encoder."""

    def __init__(self, model: Any, identify: Callable[[], str], dtype: torch.dtype, device: Device):
        self.model, self.identify, self.dtype, self.device = model.eval(), identify, dtype, torch.device(device)
        self.vocab_size, self.dim = model.config.vocab_size, model.config.d_model

    @classmethod
    def load(
        cls,
        config: UMT5Config,
        source: TensorSource,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = "cpu",
        device_of: Callable[[str], Device] | None = None,
        swaps: Sequence[Swap] = (),
    ) -> UMT5TextEncoder:
        """``source`` has transformers' names. All weights get ``dtype``; only with float16 the last linear layer of
        each feed-forward, ``DenseReluDense.wo``, stays float32, as transformers itself does, because its sums leave the
        range of float16. Raises LoadError."""
        model = build(config)
        wide = {f"encoder.block.{n}.layer.1.DenseReluDense.wo.weight" for n in range(config.num_layers)}
        wide = wide if dtype == torch.float16 else set()
        load_into(
            model,
            source,
            dtype_of=lambda name: torch.float32 if name in wide else dtype,
            device_of=device_of or device,
            swaps=swaps,
            aliases=UMT5_ALIASES,
            check_finite=True,
        )
        return cls(model, identify_weights(source, dtype, config, swaps), dtype, device)

    @property
    def fingerprint(self) -> str:
        """Stands for the weights, the sizes and the dtype. Made when first asked for: it reads all files."""
        return self.identify()

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Ids of one prompt, unpadded -> [len(ids), D] in the encoder's dtype and on its device.

        Raises RequestError for no ids at all, LoadError for ids that the embedding does not have."""
        check_ids(ids, self.vocab_size)
        with torch.no_grad():
            batch = torch.tensor([list(ids)], dtype=torch.long, device=self.device)
            return self.model(input_ids=batch).last_hidden_state[0]
