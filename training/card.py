"""The model card of ``shapes``: what it is, how it was trained, how good it is; measured when it is written."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import ditkit
from ditkit.lab.quality import TARGETS, Quality, quality
from ditkit.shapes.draw import BACKGROUNDS, COLORS, DIRECTIONS, MOTIONS, SHAPES

CARD = """---
license: apache-2.0
---
# shapes: a tiny Wan 2.1

One coloured shape moves over a plain background, as the prompt says. Colours: {colors}. Shapes: {shapes}. Motions:
{motions}. Backgrounds: {backgrounds}. 64 x 64 pixels, 13 frames. Plain wording is always understood:

    a red circle moving left on a black background

and many others are ("On a dark background, a blue ball glides to the left."). It exists so that code for Wan can
be tried, tested and measured on a laptop: the architecture is Wan 2.1's, part by part, and diffusers' `WanPipeline`
loads the folder.

| part | size | parameters |
|---|---|---|
| transformer | width {dim}, {heads} heads, {layers} layers, feed-forward {ffn} | {p_transformer:,} |
| VAE | base {base}, 16 channels, 8 x 8 x 4 compression | {p_vae:,} |
| text encoder | UMT5, width {text_dim}, {text_layers} layers | {p_text:,} |
| tokenizer | Unigram, {vocab} pieces | |

All weights are float32; {megabytes:.1f} MB in all.

## Measured

`ditkit bench quality`: {clips} prompts and seeds that training never saw, default settings ({steps} steps, guidance
{guidance}), colour, shape and motion read from the pixels.

| | right | to reach | by value |
|---|---|---|---|
{rows}
| VAE round trip | {psnr:.1f} dB | 28 dB | unseen clips, 8-bit frames |

{extra}

## Training

`make train-shapes` draws the clips, trains and exports; seeded, resumable. {machine}.
First the VAE on single frames, then on clips, then text encoder and transformer together on {scenes} encoded clips
(velocity loss, Muon and AdamW, one caption in ten left empty). One line of the log in {every}:

```
{log}
```

## Limits

One shape, no text, no camera, nothing real. Motions are straight and even. Other sizes and lengths run, but it was
trained on 64 x 64 and 13 frames alone. Shapes that are asked for in words it has never seen become any shape.
"""


def sentence(words) -> str:
    words = list(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def table(q: Quality) -> str:
    lines = []
    for name, rate in q.rates.items():
        target = f"{TARGETS[name]:.0%}" if name in TARGETS else ""
        values = ", ".join(f"{value} {r:.0%}" for value, r in q.by_value[name].items())
        lines.append(f"| {name} | {rate:.1%} | {target} | {values} |")
    return "\n".join(lines)


def write(out: Path, work: Path, scenes: int, clips: int = 144) -> None:
    pipe = ditkit.load(out)
    main = quality(pipe, clips)
    still = quality(pipe, 36, tuple(m for m in MOTIONS if m not in DIRECTIONS))
    extra = (
        f"The motions beside the four directions ({still.clips} more runs): motion {still.rates['motion']:.1%}, "
        f"colour {still.rates['color']:.1%}, shape {still.rates['shape']:.1%}."
    )
    t, v = pipe.components["transformer"], pipe.components["vae"]
    text = pipe.components["text_encoder"]
    log = (work / "log.txt").read_text().splitlines()
    every = max(1, len(log) // 30)
    request = pipe.model.request({"prompt": "x"})
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    card = CARD.format(
        colors=sentence(COLORS), shapes=sentence(SHAPES), motions=sentence(MOTIONS), backgrounds=sentence(BACKGROUNDS),
        dim=t.config.dim, heads=t.config.num_heads, layers=t.config.num_layers, ffn=t.config.ffn_dim,
        p_transformer=count(t), p_vae=count(v), p_text=count(text.model), base=v.config.dim,
        text_dim=text.dim, text_layers=len(text.model.encoder.block), vocab=text.vocab_size,
        megabytes=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
        clips=clips, steps=request.steps, guidance=request.guidance_scale, rows=table(main), psnr=main.round_trip,
        extra=extra, scenes=scenes, every=every, log="\n".join(log[::-1][::every][::-1]),
        machine=f"The packaged weights were made with torch {torch.__version__} on {platform.machine()}, two CPU cores",
    )  # fmt: skip
    (out / "README.md").write_text(card)
    print(table(main), f"round trip {main.round_trip:.1f} dB", extra, *main.failures, sep="\n")
