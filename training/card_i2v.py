"""The model card of ``shapes-i2v``: what it is, how it was trained, how good it is; measured when it is written."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

import ditkit
from ditkit.lab.quality import SUBJECT, SUBJECT_TARGET, ImageQuality, held_out, image_quality
from ditkit.shapes.draw import MOTIONS, draw, motion_caption

CARD = """---
license: apache-2.0
---
# shapes-i2v: a tiny Wan 2.1 that goes on from a picture

The image-to-video sibling of `shapes`: the first frame decides shape, colour, place and background, the prompt the
motion:

    ditkit generate "moving left" --model shapes-i2v --image picture.png

{motions}. 64 x 64 pixels, 13 frames. The architecture is Wan 2.1 I2V's: 36 input channels (noise, mask, latents of
the picture), a CLIP image encoder and image cross-attention in every block.

| part | size | parameters |
|---|---|---|
| transformer | as in `shapes`, with the image branch | {p_transformer:,} |
| image encoder | CLIP, width {clip_width}, {clip_layers} layers, patch {clip_patch} | {p_clip:,} |
| VAE, text encoder, tokenizer | those of `shapes`, by `ditkit.toml` | shared |

Weights are float16; {megabytes:.1f} MB in all, without the shared parts. `ditkit convert` writes a folder of its own
that diffusers' `WanImageToVideoPipeline` loads.

## Measured

`ditkit bench quality --model shapes-i2v`: {clips} pictures that training never saw, default settings ({steps} steps,
guidance {guidance}).
The subject is kept when colour, shape and background are all those of the picture.

| | rate |
|---|---|
| subject kept (to reach: {target:.0%}) | {subject:.1%} |
{rows}
| first frame against the picture | {first_frame:.1f} dB |

{without}

## Training

`make train-shapes` trains it after `shapes`: the image encoder learns to name what is in a frame ({clip_steps}
steps), then the transformer of `shapes`, with zeros where the new inputs come in, goes on from first frames.
{machine}.
One line of the log in {every}:

```
{log}
```

## Limits

One shape, nothing real, one size. A picture of something else gives something that moves and no more. Motions beyond
those that leave the frame were never seen: a shape at the left edge cannot go further left.
"""


def changed_by_image(pipe, count: int = 12) -> float:
    """Mean difference of two clips of one prompt and seed from two pictures, in levels of 255."""
    gaps = []
    scenes = [scene for scene, _ in held_out(2 * count, MOTIONS)]
    for i in range(count):
        words, pair = motion_caption(scenes[2 * i]), scenes[2 * i : 2 * i + 2]
        one, other = (pipe(words, image=draw(s)[0], seed=i).video for s in pair)
        gaps.append(np.abs(one.astype(float) - other).mean())
    return float(np.mean(gaps))


def compare(with_clip: ImageQuality, bare: ImageQuality) -> str:
    """What the CLIP features do, as it was measured."""
    worse = bare.subject < with_clip.subject - 0.05 or bare.first_frame < with_clip.first_frame - 0.5
    what = "Without CLIP features it is worse" if worse else "Without CLIP features it is not measurably worse"
    return (
        f"{what}: subject kept {bare.subject:.1%} (with them {with_clip.subject:.1%}), motion "
        f"{bare.rates['motion']:.1%} ({with_clip.rates['motion']:.1%}), first frame {bare.first_frame:.1f} dB "
        f"({with_clip.first_frame:.1f} dB) on the same {bare.clips} pictures and seeds."
    )


def write(out: Path, work: Path, clips: int = 60) -> None:
    pipe = ditkit.load(out)
    main = image_quality(pipe, clips)
    gap = changed_by_image(pipe)
    bare = ditkit.load(out, share_with=pipe)
    bare.pipeline = bare.pipeline.remove("encode_image")
    blind = image_quality(bare, clips)
    transformer, clip = pipe.components["transformer"], pipe.components["image_encoder"]
    log = [line for line in (work / "log.txt").read_text().splitlines() if line.startswith(("clip ", "i2v "))]
    every = max(1, len(log) // 24)
    request = pipe.model.request({"prompt": "x", "image": "x.png"})
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    config = pipe.model.parts["image_encoder"].config
    rows = "\n".join(f"| {name}{' (part of the subject)' if name in SUBJECT else ''} | {rate:.1%} |"
                     for name, rate in main.rates.items())  # fmt: skip
    without = compare(main, blind) + f" Another picture changes a clip by {gap:.0f} of 255 levels on average."
    own = [f for f in out.rglob("*") if f.is_file()]
    card = CARD.format(
        motions="Motions: " + ", ".join(MOTIONS), p_transformer=count(transformer), p_clip=count(clip.model),
        clip_width=config["hidden_size"], clip_layers=config["num_hidden_layers"], clip_patch=config["patch_size"],
        megabytes=sum(f.stat().st_size for f in own) / 1e6, clips=clips, steps=request.steps,
        guidance=request.guidance_scale, target=SUBJECT_TARGET, subject=main.subject, rows=rows,
        first_frame=main.first_frame, without=without, every=every, log="\n".join(log[::-1][::every][::-1]),
        clip_steps=sum(1 for line in log if line.startswith("clip ")) * 100,
        machine=f"The packaged weights were made with torch {torch.__version__} on {platform.machine()}, one CPU core",
    )  # fmt: skip
    (out / "README.md").write_text(card)
    print(f"subject {main.subject:.1%}", main.rates, without, *main.failures, sep="\n")
