"""What the product of a LoRA's factors is multiplied with: alpha over the rank, or over its root.

Alpha stands in the file beside the factors, or in the settings that peft and diffusers write, or nowhere; then the
factor is 1. Whether the rank or its root divides it (rs-LoRA, arXiv:2312.03732) stands in the settings only.
Leaves out: the strength that a person gives, which multiplies the whole change.
Sources: peft ``LoraConfig``; diffusers ``loaders/lora_base.py`` (``lora_adapter_metadata``); LyCORIS ``modules/``."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

CONFIG = "adapter_config.json"  # peft's own name
METADATA = "lora_adapter_metadata"  # diffusers' own name
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")  # starts of training that change the base weights too
PEFT_KINDS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Scale:
    """``config``: peft's settings, {} where there are none. ``root``: alpha is divided by the root of the rank."""

    path: str
    config: Mapping[str, Any]

    @property
    def root(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def of(self, name: str, rank: int | None, alpha: float | None) -> float:
        """Of the module ``name`` (as the file spells it). ``alpha``: what stands beside the factors. ``rank``: None
        when nothing is factored; LyCORIS then gives alpha no meaning, and peft takes the rank of its settings."""
        told = self._pattern("rank_pattern", name, self.config.get("r"))
        if rank is not None and isinstance(told, int) and told != rank:
            found = f"its settings give {name} the rank {told}, and its factors have {rank}"
            do = "Use the settings that belong to the file, or move those away"
            raise LoadError(f"reading the LoRA {self.path}", found, do)
        rank = rank if rank is not None else told
        if alpha is None:
            alpha = self._pattern("alpha_pattern", name, self.config.get("lora_alpha", self.config.get("alpha")))
        if alpha is None or rank is None:
            if self.root and rank is not None:
                asked = f"reading the LoRA {self.path} as rs-LoRA"
                raise LoadError(asked, f"it has no alpha for {name}", "Write alpha into its settings")
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.root else rank)

    def _pattern(self, table: str, name: str, default: Any) -> Any:
        """peft's rule: the first pattern that is the end of the name, at a dot."""
        patterns = self.config.get(table) or {}
        return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", name)), default)

    @property
    def text(self) -> str:
        below = "root of the rank" if self.root else "rank"
        if self.config:
            return f"alpha of the settings, over the {below}"
        return f"alpha of each pair over the {below}, 1 where there is none"


def read_scale(source: TensorSource, expert: str) -> Scale:
    """By peft's settings: those in the file itself, or those beside a file in peft's spelling. Raises LoadError for
    settings that cannot be understood, or that ask for more than adding."""
    asked = f"reading the settings of the LoRA {source.path}"
    config: dict[str, Any] = {}
    segments = {segment for name in source.tensors for segment in name.split(".")}
    if METADATA in source.metadata:
        try:
            config = _of_component(json.loads(source.metadata[METADATA]), expert)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(asked, f"{METADATA} in the file is damaged ({error})", "Save the file again") from None
    elif segments & {"lora_A", "lora_B", "base_model"}:
        file = (source.path if source.path.is_dir() else source.path.parent) / CONFIG
        config = read_json(file) if file.is_file() else {}
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind not in (None, *PEFT_KINDS):
        raise LoadError(asked, f"it is of the kind {kind}", f"Use one among {', '.join(PEFT_KINDS)}")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise LoadError(asked, f"it began as {start}, which changed the base weights too", "Convert it to plain LoRA")
    if config.get("fan_in_fan_out") or config.get("layer_replication"):
        raise LoadError(asked, "it sets fan_in_fan_out or layer_replication", "Use a LoRA of plain linear layers")
    if config.get("use_dora") and not segments & {"lora_magnitude_vector", "dora_scale"}:
        raise LoadError(asked, "they say DoRA and the file has no magnitudes", "Save the file again, with them")
    return Scale(str(source.path), config)


def _of_component(raw: Mapping[str, Any], expert: str) -> dict[str, Any]:
    """diffusers prefixes each setting with its component. A file for one expert may be used for the other."""
    found = {key.partition(".")[0] for key in raw if "." in key}
    if not found:
        return dict(raw)
    if expert not in found and len(found) > 1:
        raise ValueError(f"it has settings for {', '.join(sorted(found))}, and none for {expert}")
    prefix = f"{expert if expert in found else found.pop()}."
    return {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
