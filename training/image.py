"""Train ``shapes-i2v``: an image encoder, and the transformer of ``shapes`` taught to go on from a first frame.

The VAE, the text encoder and the tokenizer are those of ``shapes``, frozen and shared. The transformer begins as that
of ``shapes``, with zeros where its new inputs come in, so the first step computes what ``shapes`` does. What the
prompt says is the motion; shape, colour and place are in the image. One caption in four is a full sentence about the
clip, so that both ways of asking are understood.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from checkpoint import Phase, schedule
from ditkit.models.wan import Text, WanTransformer
from ditkit.models.wan_vae import WanVAE
from ditkit.shapes.draw import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    SHAPES,
    draw,
    plain_caption,
    sample_scene,
)
from optimizer import Optimizer
from transformer import CONFIG, DROP_TEXT, ROWS, TRAIN_SHIFT, folded_attend
from vae import to_pixels
from wordings import other_caption, other_motion

CLIP = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64,
    "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_CONFIG = replace(CONFIG, in_dim=36, image_dim=CLIP["hidden_size"])


def clip_input(frames: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] -> normalised [B, 3, 64, 64], the size that the encoder takes."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(-1, 1, 1)) / torch.tensor(CLIP_STD).view(-1, 1, 1)


class Reader(nn.Module):
    """The encoder with a head that names what is in the picture. Only the encoder is kept."""

    def __init__(self):
        super().__init__()
        self.encoder = CLIPVisionModel(CLIPVisionConfig(**CLIP))
        self.head = nn.Linear(CLIP["hidden_size"], len(SHAPES) + len(COLORS) + len(BACKGROUNDS) + 3)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.head(rows.mean(1))


def train_encoder(folder: Path, steps: int, device: str, compiled: bool, batch: int = 128) -> Reader:
    """Shape, colour and background as classes; place and size as numbers. Read from the layer that Wan reads."""
    torch.manual_seed(11)
    reader = Reader().to(device)

    def is_matrix(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and "head" not in name and "position" not in name

    unused = ("post_layernorm", f".layers.{CLIP['num_hidden_layers'] - 1}.")  # Wan reads the layer before the last
    used = ((n, p) for n, p in reader.named_parameters() if not any(part in n for part in unused))
    opt = Optimizer(used, 2e-3, weight_decay=0.01, matrices=is_matrix)
    phase = Phase(folder, "clip", steps, {"model": reader, "opt": opt}, seed=12)
    if phase.step >= phase.steps:
        return reader
    rng = np.random.default_rng(13)
    scenes = [sample_scene(rng) for _ in range(12288)]
    frames = np.stack([draw(s)[int(rng.integers(FRAMES))] for s in scenes])
    sizes = len(SHAPES), len(COLORS), len(BACKGROUNDS)
    classes = torch.tensor(
        [[SHAPES.index(s.shape), list(COLORS).index(s.color), list(BACKGROUNDS).index(s.background)] for s in scenes]
    )
    inside = (frames.astype(np.int32) - frames[:, :1, :1].astype(np.int32)).__abs__().sum(-1) > 60
    grid = np.mgrid[0:64, 0:64] / 32 - 1
    area = inside.sum((1, 2)) + 1e-6
    place = torch.tensor(np.stack([(inside * g).sum((1, 2)) / area for g in grid] + [np.sqrt(area) / 32], 1)).float()
    reader_of = torch.compile(reader) if compiled else reader
    hits, seen = np.zeros(3), 0
    for step in phase:
        index = torch.randint(len(frames), (batch,))
        with torch.autocast(device, torch.bfloat16):
            out = reader_of(clip_input(frames[index.numpy()]).to(device))
        *logits, numbers = out.float().split((*sizes, 3), -1)
        target = classes[index].to(device)
        loss = sum(F.cross_entropy(one, target[:, i]) for i, one in enumerate(logits))
        loss = loss + 4 * F.mse_loss(numbers, place[index].to(device))
        loss.backward()
        norm = opt.step(schedule(step, steps))
        hits += [float((one.argmax(-1) == target[:, i]).sum()) for i, one in enumerate(logits)]
        seen += batch
        if step % 100 == 99:
            shape, color, background = hits / seen
            phase.report(loss=float(loss), shape=shape, color=color, background=background, norm=norm)
            hits, seen = np.zeros(3), 0
    return reader


@torch.no_grad()
def features(reader: Reader, frames: np.ndarray, device: str) -> Tensor:
    """[n, tokens, width]: all tokens of the layer before the last, in float16."""
    out = []
    for start in range(0, len(frames), 256):
        pixels = clip_input(frames[start : start + 256]).to(device)
        out.append(reader.encoder(pixels, output_hidden_states=True).hidden_states[-2].half().cpu())
    return torch.cat(out)


@torch.no_grad()
def make_conditions(vae: WanVAE, folder: Path, scenes: list, device: str, compiled: bool, batch: int = 8) -> Tensor:
    """Raw latents of [first frame, mid grey, mid grey, ...] for each scene, in shards; [n, z, F, h, w]."""
    moments = torch.compile(vae.moments) if compiled else vae.moments
    shards, size = [], 512
    for start in range(0, len(scenes), size):
        file = folder / f"conditions-{start:06d}.pt"
        if not file.exists():
            parts = []
            for i in range(start, min(start + size, len(scenes)), batch):
                video = to_pixels(np.stack([draw(s) for s in scenes[i : i + batch]]))
                video[:, :, 1:] = 0
                with torch.autocast(device, torch.bfloat16):
                    parts.append(moments(video.to(device))[0].float().cpu())
            torch.save(torch.cat(parts).half(), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            print(f"conditions {start + size}/{len(scenes)}", flush=True)
        shards.append(torch.load(file, weights_only=True).float())
    return torch.cat(shards)


@torch.no_grad()
def caption_rows(encoder: UMT5EncoderModel, tokenizer, scenes: list, wordings: int = 8, seed: int = 15) -> Tensor:
    """The frozen encoder's rows of each wording, zeros behind them; float16 [scenes, wordings, ROWS, width]."""
    rng = np.random.default_rng(seed)
    groups = []
    for scene in scenes:
        few = [other_motion(scene, rng) for _ in range(wordings - 2)]
        groups.append([*few, plain_caption(scene), other_caption(scene, rng)])
    texts = sorted({text for group in groups for text in group} | {""})
    known = {}
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(some)]
        if max(map(len, ids)) >= ROWS:
            raise ValueError(f"a caption of {max(map(len, ids))} tokens; ROWS is {ROWS}")
        padded = torch.tensor([one + [0] * (ROWS - len(one)) for one in ids])
        mask = (padded != 0).long()
        rows = encoder(input_ids=padded, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        known.update(zip(some, rows.half(), strict=True))
    return torch.stack([torch.stack([known[text] for text in group]) for group in groups]), known[""]


def begin(weights: dict) -> WanTransformer:
    """The transformer of ``shapes`` with new inputs that say nothing yet."""
    model = WanTransformer(IMAGE_CONFIG)
    own = model.state_dict()
    for name, tensor in weights.items():
        if name == "patch_embedding.weight":
            own[name].zero_()
            own[name][:, : tensor.shape[1]] = tensor
        else:
            own[name].copy_(tensor)
    for block in range(IMAGE_CONFIG.num_layers):
        path = f"blocks.{block}.cross_attn."
        own[path + "k_img.weight"].copy_(own[path + "k.weight"])
        for leaf in ("k_img.bias", "v_img.weight", "v_img.bias"):
            own[path + leaf].zero_()
    model.load_state_dict(own)
    return model


def with_mask(latents: Tensor) -> Tensor:
    """4 mask channels before the latents: ones at latent frame 0."""
    mask = torch.zeros(len(latents), 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat((mask, latents), 1)


def train(folder: Path, weights: dict, latents: Tensor, conditions: Tensor, images: Tensor, rows: Tensor, empty: Tensor,
          steps: int, batch: int, lr: float, device: str, compiled: bool) -> WanTransformer:  # fmt: skip
    """``latents`` and ``conditions`` normalised; ``images`` features of first frames; ``rows`` of the captions."""
    torch.manual_seed(16)
    model = begin(weights).to(device)
    average = copy.deepcopy(model).requires_grad_(False)

    def is_matrix(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and "head.head" not in name

    opt = Optimizer(model.named_parameters(), lr, weight_decay=0.01, matrices=is_matrix)
    phase = Phase(folder, "i2v", steps, {"model": model, "average": average, "opt": opt}, seed=17)
    bias = torch.zeros(1, 1, 1, ROWS, device=device)
    bias[..., -1] = math.log(IMAGE_CONFIG.text_len - ROWS + 1)
    attend = folded_attend(bias)

    def loss_of(x0: Tensor, y: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, image: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            rows = Text(model.text_embedding(text), None, model.img_emb(image, torch.float32))
            x = torch.cat(((1 - s) * x0 + s * noise, y), 1)
            velocity = model(x, 1000 * sigma, rows, attend=attend)
        return (velocity.float() - (noise - x0)).square().mean((1, 2, 3, 4))

    if compiled:
        loss_of = torch.compile(loss_of)
    sums, counts = np.zeros(4), np.zeros(4)
    for step in phase:
        index = torch.randint(len(latents), (batch,))
        u = (torch.rand(batch) + torch.arange(batch)) / batch  # stratified
        sigma = (TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)).to(device)
        x0, y = latents[index].to(device), with_mask(conditions[index]).to(device)
        text = rows[index, torch.randint(rows.shape[1], index.shape)]
        text = torch.where(torch.rand(batch, 1, 1) < DROP_TEXT, empty, text).float().to(device)
        each = loss_of(x0, y, torch.randn(x0.shape).to(device), sigma, text, images[index].float().to(device))
        each.mean().backward()
        norm = opt.step(schedule(step, steps, warmup=200, cooldown=0.5))
        decay = min(0.998, (step + 1) / (step + 50))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        bucket = (sigma.cpu() * 4).long().clamp_max(3).numpy()
        np.add.at(sums, bucket, each.detach().cpu().numpy())
        np.add.at(counts, bucket, 1)
        if step % 100 == 99:
            means = sums / np.maximum(counts, 1)
            phase.report(loss=sums.sum() / counts.sum(), **{f"sigma_{i}": m for i, m in enumerate(means)}, norm=norm)
            sums[:], counts[:] = 0, 0
    return average
