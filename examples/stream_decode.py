"""The VAE alone: frames while they are decoded, from latents that arrive one at a time, with bounded memory."""

import argparse

import torch

import ditkit
from ditkit.media import to_uint8

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()

pipe = ditkit.load(args.model)
request = pipe.model.request({"prompt": "a yellow square moving up on a gray background", "seed": 5})
latents = pipe.run(pipe.begin(request), until="denoise").state["latents"]  # [1, 16, F, h, w], normalised
vae = pipe.components["vae"]  # loaded now, when it is first asked for

cache = {}  # the past frames of each temporal layer; yours, so two streams can share one VAE
frames = []
with torch.inference_mode():
    for i in range(latents.shape[2]):
        for chunk in vae.decode(latents[:, :, i : i + 1], cache=cache):
            frames.append(chunk)
            print(f"latent frame {i} -> {chunk.shape[2]} pixel frames {to_uint8(chunk[0]).shape}")
    whole = next(vae.decode(latents, frames_per_chunk=latents.shape[2]))

gap = (torch.cat(frames, 2) - whole).abs().max().item()
print(f"streamed and decoded at once differ by at most {gap:.1e} (pixels are in [-1, 1])")
