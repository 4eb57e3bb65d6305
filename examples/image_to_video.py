"""A picture goes on moving: the first frame decides what is seen, the prompt what happens to it."""

import argparse
from dataclasses import replace

import numpy as np

import ditkit
from ditkit.media import contact_sheet
from ditkit.shapes.draw import draw, sample_scene

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes-i2v")
args = parser.parse_args()

scene = sample_scene(np.random.default_rng(4), motion="left", background="gray")
red, blue = (draw(replace(scene, color=color))[0] for color in ("red", "blue"))  # uint8 [64, 64, 3]; or a file's path

pipe = ditkit.load(args.model)
print(" -> ".join(pipe.stages.names))
clips = {}
for name, picture in (("red", red), ("blue", blue)):
    result = clips[name] = pipe("moving left", image=picture, seed=1)
    contact_sheet(result.video, f"outputs/from-{name}.png", title=f"from a {name} picture", caption="seed 1", fps=8)
    gap = np.abs(result.video[0].astype(int) - picture).mean()
    print(f"from the {name} picture: its first frame differs from it by {gap:.1f} of 255 levels on average")

gap = np.abs(clips["red"].video.astype(int) - clips["blue"].video).mean()
print(f"the two clips, from one seed, differ by {gap:.1f}")
state = clips["red"].state
print("CLIP rows", list(state["image_embeds"].shape), " mask and latents", list(state["condition"].shape))
