"""Train the text encoder and the transformer of ``shapes`` together, on latents that the finished VAE made.

The model sees 512 rows of text of which all but a few are zero and equal. Equal keys can be folded: one key with
``log(count)`` added to its logit stands for all of them, exactly. That makes a training step several times cheaper.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from checkpoint import Phase, schedule
from ditkit.models.wan import Text, WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE
from ditkit.shapes.draw import draw, plain_caption, sample_scene
from optimizer import Optimizer
from vae import to_pixels
from wordings import other_caption

TEXT_DIM = 128
ROWS = 24  # the longest caption has fewer tokens; the last row stands for all further zero rows
CONFIG = WanConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=TEXT_DIM)
TRAIN_SHIFT = 3.0  # more weight on high noise, where the text decides
DROP_TEXT = 0.1


def umt5_config(vocab_size: int) -> UMT5Config:
    return UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def train_tokenizer(folder: Path, captions: list[str]):
    """A Unigram tokenizer with Wan's special tokens: pad 0, end 1, begin 2, unknown 3.

    The pieces are the words of the captions at their frequencies, and single characters for all else. (The Unigram
    trainer of ``tokenizers`` prunes whole words from a vocabulary as small as this one.)"""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marked = (" " + caption for caption in captions)
    words = Counter(w for c in marked for w in re.findall("\u2581?\\w+|[^\\w\\s]", c.replace(" ", " \u2581")))
    total = sum(words.values())
    pieces = {word: math.log(count / total) for word, count in sorted(words.items())}
    characters = ["\u2581", *map(chr, range(33, 127))]
    pieces |= {c: math.log(0.1 / total) for c in characters if c not in pieces}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces.items()], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([piece for piece, _ in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        model_max_length=512, padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(folder)
    about = folder / "tokenizer_config.json"  # newer releases write a class name that older ones do not know
    config = json.loads(about.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    about.write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


class Captions:
    """Two hundred thousand wordings, tokenised once; ``ids[scene]`` is [wordings, ROWS] with zeros as padding."""

    def __init__(self, scenes, tokenizer, wordings: int = 12, seed: int = 5):
        rng = np.random.default_rng(seed)
        plain = wordings // 3
        texts = [[plain_caption(s)] * plain + [other_caption(s, rng) for _ in range(wordings - plain)] for s in scenes]
        self.ids = torch.zeros(len(scenes), wordings, ROWS, dtype=torch.int32)
        for i, group in enumerate(texts):
            for j, encoding in enumerate(tokenizer.encode_batch(group)):
                if len(encoding.ids) >= ROWS:
                    raise ValueError(f"a caption of {len(encoding.ids)} tokens; ROWS is {ROWS}: {group[j]!r}")
                self.ids[i, j, : len(encoding.ids)] = torch.tensor(encoding.ids)

    def draw(self, index: Tensor) -> Tensor:
        ids = self.ids[index, torch.randint(self.ids.shape[1], index.shape)].long()
        empty = torch.zeros(ROWS, dtype=torch.long)
        empty[0] = 1
        return torch.where(torch.rand(len(index), 1) < DROP_TEXT, empty, ids)


@torch.no_grad()
def make_latents(vae: WanVAE, folder: Path, count: int, device: str, compiled: bool, seed: int = 7, batch: int = 8):
    """Scenes and their raw latents (not normalised), in shards so that it can be stopped; float16 [n, z, F, h, w]."""
    scenes = [sample_scene(np.random.default_rng([seed, i])) for i in range(count)]
    moments = torch.compile(vae.moments) if compiled else vae.moments
    shards, size = [], 512
    for start in range(0, count, size):
        file = folder / f"latents-{start:06d}.pt"
        if not file.exists():
            parts = []
            for i in range(start, min(start + size, count), batch):
                video = to_pixels(np.stack([draw(s) for s in scenes[i : i + batch]])).to(device)
                with torch.autocast(device, torch.bfloat16):
                    parts.append(moments(video)[0].float().cpu())
            torch.save(torch.cat(parts).half(), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            print(f"latents {start + size}/{count}", flush=True)
        shards.append(torch.load(file, weights_only=True).float())
    return scenes, torch.cat(shards)


def statistics(latents: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; a channel that hardly moves is not blown up to unit size."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp_min(0.3 * float(std.max()))
    return tuple(round(float(m), 5) for m in mean), tuple(round(float(s), 5) for s in std)


def folded_attend(bias: Tensor):
    def attend(q, k, v, site):
        mask = bias.to(q.dtype) if site.kind == "cross" else None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


class Both(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.text_encoder = UMT5EncoderModel(umt5_config(vocab_size))
        self.transformer = WanTransformer(CONFIG)
        with torch.no_grad():
            for block in self.transformer.blocks:
                block.modulation.normal_(0, 0.02)
            nn.init.zeros_(self.transformer.head.head.weight)
            nn.init.zeros_(self.transformer.head.head.bias)
            nn.init.normal_(self.text_encoder.shared.weight, std=1.0)


def loss_function(model: Both, device: str):
    bias = torch.zeros(1, 1, 1, ROWS, device=device)
    bias[..., -1] = math.log(CONFIG.text_len - ROWS + 1)
    attend = folded_attend(bias)

    def loss(x0: Tensor, noise: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            text = Text(model.transformer.text_embedding(rows), None)
            velocity = model.transformer((1 - s) * x0 + s * noise, 1000 * sigma, text, attend=attend)
        return (velocity.float() - (noise - x0)).square().mean((1, 2, 3, 4))

    return loss


def embed(model: Both, ids: Tensor, device: str) -> Tensor:
    mask = (ids != 0).long()
    with torch.autocast(device, torch.bfloat16):
        rows = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return rows.float() * mask.unsqueeze(-1)


def train(folder: Path, latents: Tensor, captions: Captions, vocab_size: int, steps: int, batch: int, lr: float,
          device: str, compiled: bool) -> Both:  # fmt: skip
    torch.manual_seed(3)
    model = Both(vocab_size).to(device)
    average = copy.deepcopy(model).requires_grad_(False)

    def is_matrix(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and "shared" not in name and "relative" not in name and "head.head" not in name

    opt = Optimizer(model.named_parameters(), lr, weight_decay=0.01, matrices=is_matrix)
    phase = Phase(folder, "transformer", steps, {"model": model, "average": average, "opt": opt}, seed=4)
    loss_of = loss_function(model, device)
    if compiled:
        loss_of = torch.compile(loss_of)
    sums, counts = np.zeros(4), np.zeros(4)
    for step in phase:
        index = torch.randint(len(latents), (batch,))
        u = (torch.rand(batch) + torch.arange(batch)) / batch  # stratified
        sigma = (TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)).to(device)
        x0 = latents[index].to(device)
        rows = embed(model, captions.draw(index).to(device), device)
        each = loss_of(x0, torch.randn(x0.shape).to(device), sigma, rows)
        each.mean().backward()
        norm = opt.step(schedule(step, steps, warmup=200, cooldown=0.5))
        decay = min(0.999, (step + 1) / (step + 50))
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
