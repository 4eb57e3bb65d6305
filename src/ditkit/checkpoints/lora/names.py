"""What the keys of a LoRA file mean: which tensor of a transformer, and which part of its change.

Trainers and converters name one and the same thing in many ways. A key is a prefix, the name of a module, and a role
(``lora_A``, ``alpha``, ``diff_b``). Roles and prefixes are tables; a module's name is looked up among all names that
its kind has in its native and its diffusers spelling, with dots or underscores. Nothing is replaced inside a name.
Leaves out: shapes, scales and the arithmetic (read.py, deltas.py).
Sources: peft ``save_and_load.py``; musubi-tuner ``lora_wan.py``; LyCORIS ``modules/``; ComfyUI ``comfy/lora.py``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ditkit.checkpoints.kinds.kind import LoraTargets
from ditkit.contracts import EXPERTS

MOST_BLOCKS = 500  # of a network that a file may speak of; far above any that exists

ROLES: Mapping[str, str] = MappingProxyType(
    {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha",
     "diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b", "diff_m": "diff_m",
     "lora_magnitude_vector": "magnitude", "dora_scale": "dora_scale"}
    | {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
    | {name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}
)  # fmt: skip
"""A segment of a key -> the role of its tensor. ``up_bias`` is made of ``lora_B.bias``."""

REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_R", "boft_R", "boft_s", "rescale"), "OFT rotations")
    | dict.fromkeys(("set_weight", "reshape_weight"), "weights to be replaced or reshaped (Control-LoRA)")
    | dict.fromkeys(("q_loras", "k_loras", "v_loras"), "Stand-In's routed LoRAs")
    | dict.fromkeys(("dwpose_embedding", "randomref_embedding_pose"), "UniAnimate's pose encoder")
    | {"lora_mid": "the middle factor of a Tucker LoRA", "on_input": "IA3 scales", "diff_kv": "IA3 scales",
       "lora_embedding_A": "a LoRA of an embedding", "lora_embedding_B": "a LoRA of an embedding",
       "vera_lambda_b": "VeRA vectors", "vera_lambda_d": "VeRA vectors"}
)  # fmt: skip
"""A segment of a key -> what it belongs to, which needs more than adding to weights."""


PREFIXES: Mapping[str, str] = MappingProxyType({
    "base_model.model.": "peft", "pipe.dit.": "diffsynth", "model.diffusion_model.": "comfy",
    "diffusion_model.": "comfy", "transformer_2.": "diffusers", "transformer.": "diffusers", "model.": "wrapped",
    "module.": "wrapped", "_orig_mod.": "wrapped", "lora_unet__": "videox", "lora_unet_": "kohya",
    "lora_transformer_": "onetrainer", "lycoris_": "lycoris",
})  # fmt: skip
"""What may stand before a module's name -> the family of the file. After one without a dot at its end, the rest has
underscores for dots."""
OTHER_NETWORKS = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoders.")


@dataclass(frozen=True)
class Names:
    """All module and parameter names of the family, in both spellings -> the native ones. Read-only."""

    dotted: Mapping[str, str]
    flat: Mapping[str, str]

    @classmethod
    def of(cls, targets: LoraTargets, blocks: int) -> Names:
        """For networks of up to so many blocks, with every branch that exists. Of a tensor that the other layout cuts
        or joins only the native name is known."""
        dotted: dict[str, str] = {}
        for rule in targets.names(blocks).rules:
            for native in rule.native:
                other, owner = rule.other[0] if rule.renames else native, native.rpartition(".")[0] or native
                dotted |= {other: native, native: native, owner: owner}
                if other.endswith((".weight", ".bias")):
                    dotted[other.rpartition(".")[0]] = owner
        return cls(MappingProxyType(dotted), MappingProxyType({n.replace(".", "_"): v for n, v in dotted.items()}))


@dataclass(frozen=True)
class Key:
    """One key, taken apart. ``module`` is the native name (of a module, or of a parameter that is none's weight), None
    when the family has no such thing; ``spelled`` is what stands there. ``families``: of its prefixes, outermost first.
    ``expert`` is what a prefix says, ``adapter`` the name that peft gave the adapter; both mostly None."""

    text: str
    role: str
    spelled: str
    module: str | None
    families: tuple[str, ...]
    expert: str | None = None
    adapter: str | None = None


def read_key(text: str, names: Names) -> Key | None:
    """None for a key that has no role of ``ROLES``."""
    parts = text.split(".")
    place = next((i for i, part in enumerate(parts) if part in ROLES), None)
    if not place:  # none, or nothing stands before it
        return None
    role, tail = ROLES[parts[place]], parts[place + 1 :]
    if tail and tail[-1] in ("weight", "bias"):
        role = "up_bias" if (role, tail[-1]) == ("up", "bias") else role
        if tail.pop() == "bias" and role != "up_bias":
            return None
    if len(tail) > 1:
        return None
    module, spelled, families, expert = _resolve(".".join(parts[:place]), names)
    return Key(text, role, spelled, module, families, expert, tail[0] if tail else None)


def _resolve(name: str, names: Names) -> tuple[str | None, str, tuple[str, ...], str | None]:
    """(native name or None, the name without prefixes, families, expert)."""
    families: list[str] = []
    expert = None
    while name not in names.dotted:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None, name, tuple(families), expert
        families.append(PREFIXES[prefix])
        name = name.removeprefix(prefix)
        expert = prefix[:-1] if prefix[:-1] in EXPERTS else expert
        if not prefix.endswith("."):  # some converters leave a part of the dots
            return names.flat.get(name.replace(".", "_")), name, tuple(families), expert
    return names.dotted[name], name, tuple(families), expert


def refused(text: str) -> str | None:
    """What a key belongs to that cannot be added to weights; None for all others."""
    return next((REFUSED[part] for part in text.split(".") if part in REFUSED), None)


def blocks_in(names: Iterable[str], targets: LoraTargets) -> int:
    """How many blocks a network with these names has: by the highest number, at least 1."""
    pattern = re.compile(rf"(?:^|[._]){targets.blocks}[._](\d{{1,6}})[._]")
    found = [int(n) for name in names for n in pattern.findall(name)]
    return min(max(found, default=0) + 1, MOST_BLOCKS)
