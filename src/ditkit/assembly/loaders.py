"""Loaders: what builds each kind of part on the meta device and fills it from its files.

A loader is a function ``load(part, how)`` that gives the component: an object with a settable ``identify``. A kind of
network names its own in its row, as ``module:function``; where ``load_module`` is not enough, ``filled`` does most of
it. Leaves out: when a part is loaded, and its identity (components.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditkit.assembly.model import vocabulary
from ditkit.checkpoints.model.part import Part
from ditkit.contracts import Swap
from ditkit.errors import SetupError
from ditkit.registry import resolve

if TYPE_CHECKING:
    import torch

    from ditkit.checkpoints.load import Device
    from ditkit.nn.layers import Loaded


@dataclass(frozen=True)
class LoadOptions:
    """How a part is loaded: its weights as ``dtype`` (a transformer's as the policy ``dtype_policy`` says), to compute
    on ``device`` with ``backend``. ``swaps``: those for this component (seam C). ``device_of``: name of a tensor -> its
    device, where they do not all lie on ``device``; ``meta`` is one that is not read now.

    A loader honours all of them or raises SetupError. The part's ``source`` is final: LoRAs are merged into it."""

    dtype: torch.dtype
    device: str = "cpu"
    swaps: tuple[Swap, ...] = ()
    device_of: Callable[[str], Device] | None = None
    dtype_policy: str = "wan"
    backend: str = "torch"

    @property
    def place(self) -> dict[str, Any]:
        """The keywords of a ``load`` of one of our models."""
        return {"dtype": self.dtype, "device": self.device, "device_of": self.device_of, "swaps": self.swaps}


def load_tokenizer(part: Part, how: LoadOptions) -> Any:
    from ditkit.models.text import WanTokenizer

    return WanTokenizer(vocabulary(part).parent)


def load_umt5(part: Part, how: LoadOptions) -> Any:
    from ditkit.models.encoders import UMT5TextEncoder
    from ditkit.models.umt5 import UMT5Config

    assert part.source is not None
    config = UMT5Config(**part.config)
    if how.backend == "torch":
        return UMT5TextEncoder.load(config, part.source, **how.place)
    from ditkit.mlx.umt5 import MLXTextEncoder

    if how.swaps or how.device_of:
        found = f"{', '.join(swap.name for swap in how.swaps) or 'device_of'} is for modules of torch"
        raise SetupError(f"loading the {part.component} with {how.backend}", found, "Leave it out, or use torch")
    return MLXTextEncoder.load(config, part.source, how.dtype, how.device, how.backend)


def load_clip(part: Part, how: LoadOptions) -> Any:
    from ditkit.models.clip import CLIPConfig
    from ditkit.models.encoders import CLIPImageEncoder

    assert part.source is not None
    return CLIPImageEncoder.load(CLIPConfig(**part.config), part.source, **how.place)


def load_wan(part: Part, how: LoadOptions) -> Any:
    from ditkit.models.wan import WanConfig, WanTransformer
    from ditkit.nn.dtype_policy import dtype_policy

    policy = dtype_policy(how.dtype_policy, how.dtype)
    return filled(lambda: WanTransformer(WanConfig(**part.config), policy), part, how, policy.weight_dtype)


def load_module(part: Part, how: LoadOptions) -> Any:
    """The module that the row of its kind names."""
    return filled(lambda: resolve(part.row.module)(part.row.config(part.config)), part, how)


def load_taehv(part: Part, how: LoadOptions) -> Any:
    from ditkit.models.taehv import TAEHV, TAEHVConfig

    assert part.source is not None
    return TAEHV.load(TAEHVConfig(**part.config), part.source, **how.place)


def filled(
    make: Callable[[], Loaded], part: Part, how: LoadOptions, dtype_of: Callable[[str], torch.dtype] | None = None
) -> Loaded:
    """What ``make`` builds, without data until it is filled from ``part``, whose names are those of its parameters.
    ``dtype_of``: name of a tensor -> its dtype; None for ``how.dtype``. Raises LoadError, SetupError."""
    import torch

    from ditkit.checkpoints.load import load_into

    assert part.source is not None
    with torch.device("meta"):
        module = make().eval().requires_grad_(False)
    load_into(
        module, part.source, dtype_of=dtype_of or (lambda name: how.dtype), device_of=how.device_of or how.device,
        swaps=how.swaps, check_finite=True,
    )  # fmt: skip
    module.loaded(how.device, how.dtype)
    return module
