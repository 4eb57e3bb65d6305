"""Prompts to text rows: clean, tokenise, encode each on its real length, keep only the real rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditkit.execution.stage import BaseStage, Context


@dataclass(frozen=True)
class EncodeText(BaseStage):
    """``cfg``: whether a guidance scale other than 1 means a second pass, with the negative prompt."""

    cfg: bool = True

    name = "encode_text"
    reads = ("prompt", "negative_prompt", "request")
    optional = ("expanded_prompt",)
    writes = ("prompt_embeds", "prompt_lengths")
    may_write = ("negative_prompt_embeds", "negative_prompt_lengths")
    components = ("tokenizer", "text_encoder")
    together = True

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        rows, lengths = self.encode(inputs.get("expanded_prompt", inputs["prompt"]), "prompt", ctx)
        written = {"prompt_embeds": rows, "prompt_lengths": lengths}
        if self.cfg and ctx.settings.guided:  # without guidance nobody looks at the negative prompt
            rows, lengths = self.encode(inputs["negative_prompt"], "negative_prompt", ctx)
            written |= {"negative_prompt_embeds": rows, "negative_prompt_lengths": lengths}
        return written

    def encode(self, prompts: list[str], what: str, ctx: Context) -> tuple[torch.Tensor, list[int]]:
        """Each prompt alone, so that none depends on its neighbours; equal prompts once. [sum of lengths, D]."""
        ids, cut = ctx.components["tokenizer"](prompts, ctx.settings.max_sequence_length)
        for prompt, tokens in zip(prompts, cut, strict=True):
            if tokens:
                ctx.events.emit("prompt.truncated", field=what, prompt=prompt, tokens=tokens)
        done: dict[tuple[int, ...], torch.Tensor] = {}
        for one in ids:
            if tuple(one) not in done:
                done[tuple(one)] = ctx.components["text_encoder"](one)
        return torch.cat([done[tuple(one)] for one in ids]).cpu(), [len(one) for one in ids]
