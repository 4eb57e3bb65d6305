"""What a Wan transformer is conditioned on besides the noisy latents: one object for each branch of a run.

It is made of fields of the State, by the transformer itself, and can be narrowed to a range of frames. Leaves out:
where the fields come from (the ``encode_*`` stages), and what a block needs (``wan_block.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ditkit.errors import StateError

FIELDS = ("image_embeds", "condition", "clean_latents", "control")
"""Fields of a State that a Wan transformer may be conditioned on besides the text; each is there when it is needed."""


@dataclass(frozen=True)
class Text:
    """Text rows, embedded: ``rows`` [B, 512, dim]; and the image, where there is one: ``image`` [B, n, dim].

    ``keys_values``: (block, whether it is a control block, kind) -> keys and values [B, n, N, d] that its
    cross-attention made of the rows, for they are the same at every step; None makes them anew each time. Equal results
    either way."""

    rows: Tensor
    keys_values: Mapping[tuple[int, bool, str], tuple[Tensor, Tensor]] | None = None
    image: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """``condition`` [B, c, F, h, w] goes behind the channels of the latents; ``control`` [B, v, F, h, w] is VACE's
    control input, ``control_scale`` how much each hint counts; the first ``clean_frames`` frames of the latents are
    known and have timestep 0 (Wan2.2 ``textimage2video.py``)."""

    text: Text
    condition: Tensor | None = None
    control: Tensor | None = None
    control_scale: float | Sequence[float] = 1.0
    clean_frames: int = 0

    def frames(self, start: int, stop: int) -> Self:
        """What belongs to the latent frames from ``start`` to ``stop``; the text belongs to all of them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, start:stop]

        clean = min(max(self.clean_frames - start, 0), stop - start)
        return replace(self, condition=cut(self.condition), control=cut(self.control), clean_frames=clean)

    def latents(self, x: Tensor) -> Tensor:
        """``x`` [B, C, F, h, w] with the condition behind its channels. Raises ValueError where the frames differ."""
        if self.condition is None:
            return x
        if self.condition.shape[2:] != x.shape[2:]:
            sizes = f"{tuple(x.shape[2:])} were given with a condition of size {tuple(self.condition.shape[2:])}"
            raise ValueError(f"latents of size {sizes}; narrow it with Step.window where they are a part of the frames")
        return torch.cat((x, self.condition.to(x)), 1)

    def timesteps(self, timestep: Tensor, x: Tensor) -> Tensor:
        """``timestep`` [B] as it is, or with known frames as [B, F] with 0 at those."""
        if not self.clean_frames or timestep.dim() != 1:
            return timestep
        each = timestep[:, None].repeat(1, x.shape[2])
        each[:, : self.clean_frames] = 0
        return each


def text_rows(fields: Mapping[str, object], branch: str) -> Sequence[Tensor]:
    """The text rows of each sample for a branch: ``cond`` the prompt, ``uncond`` the negative prompt. What stands
    behind a colon (``cond:skip``) is for plugs. Raises StateError."""
    field = {"cond": "prompt", "uncond": "negative_prompt"}.get(branch.partition(":")[0])
    if field is None:
        raise StateError(f"a forward pass of the branch {branch!r}", "the branches are cond and uncond",
                         "Put a name of your own behind a colon: cond:NAME")  # fmt: skip
    if f"{field}_embeds" not in fields:
        asked = "guiding away from the negative prompt" if branch != "cond" else "denoising"
        do = "Run encode_text with this guidance scale, or set it to 1"
        raise StateError(asked, f"the State has no {field}_embeds", do)
    return fields[f"{field}_embeds"].split(fields[f"{field}_lengths"])  # type: ignore[attr-defined]


def fitting(fields: Mapping[str, Tensor], field: str, channels: int) -> Tensor | None:
    """The input ``field``, there exactly when the transformer has ``channels`` for it. Raises StateError."""
    given = fields.get(field)
    has = 0 if given is None else given.shape[1]
    if has != channels:
        do = "Use the model that it was made for" if has else f"Run the stage that writes {field!r} first"
        raise StateError(f"denoising with {field!r} of {has} channels", f"this transformer takes {channels}", do)
    return given
