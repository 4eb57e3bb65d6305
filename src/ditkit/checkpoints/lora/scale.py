"""What the product of a LoRA's factors is multiplied with: alpha over the rank, or over its root.

Alpha stands in the file beside the factors, or in the settings that peft and diffusers write, or nowhere; then the
factor is 1. Whether the rank or its root divides it (rs-LoRA, arXiv:2312.03732) stands in the settings only.
Leaves out: the strength that a person gives, which multiplies the whole change.
Sources: peft ``LoraConfig``; diffusers ``loaders/lora_base.py`` (``lora_adapter_metadata``); LyCORIS ``modules/``."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditkit import limits
from ditkit.checkpoints.files.text import json_object, read_json
from ditkit.checkpoints.kinds.configs import is_number
from ditkit.checkpoints.lora.patterns import CORRECT, Patterns
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError
from ditkit.reading import file_at

CONFIG = "adapter_config.json"  # peft's own name
METADATA = "lora_adapter_metadata"  # diffusers' own name
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")  # starts of training that change the base weights too
PEFT_KINDS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Scale:
    """``config``: peft's settings, checked; {} where there are none. ``ranks`` and ``alphas``: what they say of single
    modules. ``root``: alpha is divided by the root of the rank."""

    path: str
    config: Mapping[str, Any]
    ranks: Patterns
    alphas: Patterns

    @property
    def root(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def of(self, name: str, rank: int | None, alpha: float | None) -> float:
        """Of the module ``name`` (as the file spells it). ``alpha``: what stands beside the factors. ``rank``: None
        when nothing is factored; LyCORIS then gives alpha no meaning, and peft takes the rank of its settings."""
        told = self.ranks.of(name, self.config.get("r"))
        if rank is not None and told is not None and told != rank:
            found = f"its settings give {name} the rank {told}, and its factors have {rank}"
            do = "Use the settings that belong to the file, or move those away"
            raise LoadError(f"reading the LoRA {self.path}", found, do)
        rank = rank if rank is not None else told
        if alpha is None:
            usual = self.config.get("lora_alpha")
            alpha = self.alphas.of(name, self.config.get("alpha") if usual is None else usual)
        if alpha is None or rank is None:
            if self.root and rank is not None:
                asked = f"reading the LoRA {self.path} as rs-LoRA"
                raise LoadError(asked, f"it has no alpha for {name}", "Write alpha into its settings")
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.root else rank)

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
        asked = f"reading {METADATA} of {source.path}"
        told = source.metadata[METADATA]
        if not isinstance(told, str):
            raise LoadError(asked, "its shards differ in it", "Use shards of one LoRA")
        try:
            config = _of_component(json_object(told, asked), expert)
        except ValueError as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(asked, str(error), "Save the file again") from None
    elif segments & {"lora_A", "lora_B", "base_model"}:
        file = (source.path if os.path.isdir(source.path) else source.path.parent) / CONFIG
        if file_at(file, asked):
            asked, config = f"{asked} ({file})", read_json(file)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind not in (None, *PEFT_KINDS):
        raise LoadError(asked, f"it is of the kind {kind!r:.200}", f"Use one among {', '.join(PEFT_KINDS)}")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise LoadError(asked, f"it began as {start}, which changed the base weights too", "Convert it to plain LoRA")
    for switch in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(switch) or False, bool):
            raise LoadError(asked, f"{switch} is {config[switch]!r:.200}, not true or false", CORRECT)
    if config.get("fan_in_fan_out") or config.get("layer_replication"):
        raise LoadError(asked, "it sets fan_in_fan_out or layer_replication", "Use a LoRA of plain linear layers")
    if config.get("use_dora") and not segments & {"lora_magnitude_vector", "dora_scale"}:
        raise LoadError(asked, "they say DoRA and the file has no magnitudes", "Save the file again, with them")
    for key, check in (("r", _check_rank), ("lora_alpha", _check_alpha), ("alpha", _check_alpha)):
        if config.get(key) is not None:
            check(key, config[key], asked)
    ranks = Patterns.read("rank_pattern", config.get("rank_pattern"), _check_rank, asked)
    alphas = Patterns.read("alpha_pattern", config.get("alpha_pattern"), _check_alpha, asked)
    return Scale(str(source.path), config, ranks, alphas)


def _check_rank(key: str, value: Any, asked: str) -> None:
    if type(value) is not int or not 0 < value < limits.NUMBER:
        raise LoadError(asked, f"{key} is {value!r:.200}, not a whole number above 0", CORRECT)


def _check_alpha(key: str, value: Any, asked: str) -> None:
    if not is_number(value):
        raise LoadError(asked, f"{key} is {value!r:.200}, not a finite number", CORRECT)


def _of_component(raw: Mapping[str, Any], expert: str) -> dict[str, Any]:
    """diffusers prefixes each setting with its component. A file for one expert may be used for the other."""
    found = {key.partition(".")[0] for key in raw if "." in key}
    if not found:
        return dict(raw)
    if expert not in found and len(found) > 1:
        raise ValueError(f"it has settings for {', '.join(sorted(found))}, and none for {expert}")
    prefix = f"{expert if expert in found else found.pop()}."
    return {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
