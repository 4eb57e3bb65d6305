"""A prompt to a clip and its contact sheet, and a look at what really ran.

python examples/generate.py "a blue square moving up on a gray background" --seed 3
"""

import argparse

import ditkit
from ditkit.media import contact_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a red circle moving left on a black background")
parser.add_argument("--model", default="shapes")
parser.add_argument("--seed", type=int, default=7)
args = parser.parse_args()

pipe = ditkit.load(args.model)
result = pipe(args.prompt, seed=args.seed)

result.save("outputs/generate.mp4")  # and outputs/generate.json, the same manifest in readable form
fps = result.state["request"]["fps"]
contact_sheet(result.video, "outputs/generate-sheet.png", title=args.prompt, caption=f"seed {args.seed}", fps=fps)

print(f"{result.video.shape} {result.video.dtype} in outputs/generate.mp4, outputs/generate-sheet.png")
for stage, seconds in result.receipt["stages"].items():
    print(f"{stage:15} {seconds:7.2f} s")
for name, facts in result.receipt["components"].items():
    print(f"{name:15} {facts['class']} in {facts['dtype']} on {facts['device']}")
