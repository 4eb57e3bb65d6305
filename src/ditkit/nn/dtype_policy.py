"""Which tensors are wider than the compute dtype: the two conventions that exist for Wan, and plain float32.

Under bfloat16 the official code keeps the residual stream, the time projection, the modulation and the head in
float32; diffusers keeps the stream, the projection and the head in bfloat16 and errs about twice as much
(``tests/parity/test_transformer.py``; more with more blocks). With float32 or float64 as compute dtype all three agree
up to the timestep sinusoid."""

from dataclasses import dataclass

import torch

from ditkit.errors import SetupError, nearest
from ditkit.nn.layers import at_least_float32

# Parts of module paths, as the checkpoint spells them, whose weights stay in float32 under bf16. The official code
# holds all weights so; named here are those that it uses so, and not through a bf16 linear. img_emb.proj.0 and .4 are
# the layer norms around the linears of the image rows, emb_pos what is added before them.
_DIFFUSERS_WIDE = frozenset(("time_embedding", "modulation", "norm3", "img_emb.proj.0", "img_emb.proj.4"))
_WAN_WIDE = _DIFFUSERS_WIDE | {"time_projection", "norm_q", "norm_k", "norm_k_img", "head", "emb_pos"}


@dataclass(frozen=True)
class DtypePolicy:
    """``compute``: linears and attention; ``norm_dtype``: norms, modulation arithmetic, gates; ``residual_dtype``: the
    residual stream; ``projection``: time projection; ``head``: the last linear; ``sinusoid``: the timestep's angles."""

    name: str
    storage: torch.dtype
    compute: torch.dtype
    norm_dtype: torch.dtype
    residual_dtype: torch.dtype
    projection: torch.dtype
    head: torch.dtype
    sinusoid: torch.dtype
    wide_weights: frozenset[str]

    def weight_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the transformer parameter ``name`` is held. Whole path segments are compared."""
        whole = f".{name}."
        return self.norm_dtype if any(f".{part}." in whole for part in self.wide_weights) else self.storage


def dtype_policy(name: str, dtype: torch.dtype) -> DtypePolicy:
    """The policy ``name`` (wan, diffusers or float32) for weights of ``dtype``."""
    wide = at_least_float32(dtype)
    known = {
        "wan": (dtype, wide, wide, wide, wide, torch.float64, _WAN_WIDE),
        "diffusers": (dtype, wide, dtype, dtype, dtype, torch.float32, _DIFFUSERS_WIDE),
        "float32": (wide, wide, wide, wide, wide, torch.float64, _WAN_WIDE),  # only stored narrow
    }
    if name not in known:
        found = f"the known ones are {', '.join(known)}{nearest(name, known)}"
        raise SetupError(f"dtype_policy={name!r} was asked for", found, "Choose one")
    return DtypePolicy(name, dtype, *known[name])
