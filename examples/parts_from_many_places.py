"""One model out of many places: parts in two layouts, one manifest, a lock, and one copy of what two models share."""

import argparse
from pathlib import Path

import numpy as np

import ditkit
from ditkit.assembly import MODELS
from ditkit.checkpoints.convert.convert import convert
from ditkit.cli.main import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes", help="a model of the package, or a folder in the diffusers layout")
args = parser.parse_args()

whole, home = Path(MODELS.get(args.model, args.model)).resolve(), Path("outputs/parts")
convert(whole / "transformer", home / "transformer", "native", overwrite=True)  # official names, the same numbers
convert(whole / "text_encoder", home / "text_encoder", "native", overwrite=True)  # a .pth file
(home / "ditkit.toml").write_text(f"""
[components]
transformer = "transformer"
text_encoder = "text_encoder/models_t5_umt5-xxl-enc-bf16.pth"
tokenizer = "{whole / "tokenizer"}"
vae = "{whole / "vae"}"
""")
main(["lock", str(home)])  # from now on these bytes, or an error

plain, mixed = ditkit.load(whole), ditkit.load(home)
print(*(f"{name} {part.layout}," for name, part in mixed.model.parts.items()))
job = {"width": 64, "height": 64, "frames": 13, "steps": 4, "shift": 3.0, "guidance_scale": 2.0, "seed": 7}
a, b = (pipe("a red circle moving left on a black background", **job).video for pipe in (plain, mixed))
print("the same clip, bit for bit:", np.array_equal(a, b))

other = ditkit.load(whole, share_with=mixed)  # the tokenizer and the VAE are the same files
print(ditkit.switch(mixed, other))
