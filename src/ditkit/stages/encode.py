"""Prompts, pictures and control videos to what the transformer is conditioned on. Each alone, so that a clip equals its
single run. Leaves out: sizes, pixels and layouts (``conditioning``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning import images
from ditkit.conditioning.condition import Encode, control_context, image_condition, per_clip
from ditkit.errors import RequestError
from ditkit.execution.stage import BaseStage, Context, check_strides
from ditkit.pictures import CONTROL, check_control


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

    def encode(self, prompts: list[str], what: str, ctx: Context) -> tuple[Tensor, list[int]]:
        """Each prompt alone, so that none depends on its neighbours; equal prompts once. [sum of lengths, D]."""
        ids, cut = ctx.components["tokenizer"](prompts, ctx.settings.max_sequence_length)
        for prompt, tokens in zip(prompts, cut, strict=True):
            if tokens:
                ctx.events.emit("prompt.truncated", field=what, prompt=prompt, tokens=tokens)
        done: dict[tuple[int, ...], Tensor] = {}
        for one in ids:
            if tuple(one) not in done:
                done[tuple(one)] = ctx.components["text_encoder"](one)
        return torch.cat([done[tuple(one)] for one in ids]).cpu(), [len(one) for one in ids]


def _tools(ctx: Context) -> tuple[Encode, tuple[int, int], str]:
    """The VAE, which gives float32 on the CPU; (height, width); how pictures are resized."""
    vae, settings = ctx.components["vae"], ctx.settings
    size = settings.height, settings.width
    return lambda video: vae.encode(video.to(vae.device, vae.dtype)).float().cpu(), size, settings.image_processing


@dataclass(frozen=True)
class EncodeImage(BaseStage):
    """CLIP features of the original pictures, which the encoder itself resizes for its network: one picture gives
    [B, n, d], a first and a last one [B, 2n, d], the first one's rows first."""

    name = "encode_image"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("image_embeds",)
    components = ("image_encoder",)
    triggers = ("image",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        encoder, processing = ctx.components["image_encoder"], ctx.settings.image_processing
        pictures = [inputs[name] for name in ("image", "last_image") if name in inputs]
        features = [per_clip(lambda image: encoder.encode(image, processing), picture) for picture in pictures]
        return {"image_embeds": torch.cat(features, dim=1)}


@dataclass(frozen=True)
class EncodeCondition(BaseStage):
    """The condition of image-to-video [B, c, F, h, w]: t mask channels, then the latents of a first picture, and of a
    last one where there is one. ``strides`` are the VAE's, as (frames t, height, width)."""

    strides: tuple[int, int, int] = (4, 8, 8)

    name = "encode_condition"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("condition",)
    components = ("vae",)
    triggers = ("image",)

    def __post_init__(self) -> None:
        check_strides(self.strides)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        (encode, size, processing), frames = _tools(ctx), ctx.settings.frames

        def condition(image: Tensor, last_image: Tensor | None) -> Tensor:
            if last_image is not None and processing == "wan":  # diffusers squeezes it, whatever its shape
                last_image = images.resize_to_fit(last_image, *image.shape[1:3])
            first = images.resize_exact(image, *size, processing)
            last = None if last_image is None else images.resize_exact(last_image, *size, processing)
            return image_condition(encode, first, last, frames, self.strides[0])

        return {"condition": per_clip(condition, inputs["image"], inputs.get("last_image"))}


@dataclass(frozen=True)
class EncodeFirstFrame(BaseStage):
    """For a model that is told which frames are clean (Wan2.2 TI2V-5B): the picture as one frame [B, C, 1, h, w].
    ``wan`` covers and crops, ``diffusers`` squeezes."""

    name = "encode_first_frame"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("clean_latents",)
    components = ("vae",)
    triggers = ("image",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        if "last_image" in inputs:
            do = "Leave last_image out, or use a model with a condition, such as FLF2V-14B or Wan2.2 I2V-A14B"
            raise RequestError("a video that ends with last_image", "this model takes a first picture only", do)
        encode, size, processing = _tools(ctx)

        def clean(image: Tensor) -> Tensor:
            wan = processing == "wan"
            pixels = images.resize_and_crop(image, *size) if wan else images.resize_exact(image, *size, processing)
            return encode(pixels[:, :, None])

        return {"clean_latents": per_clip(clean, inputs["image"])}


@dataclass(frozen=True)
class EncodeControl(BaseStage):
    """The control input of VACE [B, v, N + F, h, w]: the N reference pictures are latent frames in front of the F of
    the video. It always runs: without a control video everything is to be made, from grey, and only the references (if
    any) count.

    ``strides`` are the VAE's, as (frames, height, width). ``image_processing`` is also whose order the references have:
    diffusers puts each before those that came earlier."""

    strides: tuple[int, int, int] = (4, 8, 8)

    name = "encode_control"
    reads = ("prompt", "request")  # of the prompts only the number
    optional = ("control_video", "control_mask", "reference_images")
    writes = ("control",)
    components = ("vae",)

    def __post_init__(self) -> None:
        check_strides(self.strides)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        (encode, size, processing), frames = _tools(ctx), ctx.settings.frames
        given = inputs.get("control_video"), inputs.get("control_mask"), inputs.get("reference_images")
        check_control({name: inputs[name].shape[1] for name in CONTROL if name in inputs}, frames)

        def control(_: Tensor, video: Tensor | None, mask: Tensor | None, references: Tensor | None) -> Tensor:
            grey = torch.zeros(3, frames, *size)
            pixels = grey if video is None else images.video_pixels(video[0], *size, processing)
            new = torch.ones(1, frames, *size) if mask is None else images.mask_pixels(mask[0], *size, processing)
            pictures = None if references is None else images.pad_on_white(references[0], *size, processing)
            if pictures is not None and processing == "diffusers":
                pictures = pictures.flip(0)
            return control_context(encode, pixels, new, pictures, self.strides)[None]

        return {"control": per_clip(control, torch.zeros(len(inputs["prompt"]), 0), *given)}
