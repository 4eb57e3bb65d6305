"""Something small at each of the six seams. What they do is explained in guides/your-own-part.md."""

import argparse
from dataclasses import replace

from torch import nn

import ditkit
from ditkit.schedulers import make

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()
calls = []


def guidance_in_the_middle(predict):  # A: no second pass at the noisy and at the clean end
    return lambda x, step: predict(x, step if 0.2 < step.sigma < 0.9 else replace(step, guidance_scale=1))


def without_the_last_block(run_blocks):  # B: what happens if it is not there?
    return lambda blocks, x, ctx: run_blocks([*blocks[:-1], lambda x, ctx: x], x, ctx)


def counting(attend):  # D
    return lambda q, k, v, site: calls.append(site.kind) or attend(q, k, v, site)


relu = ditkit.Swap("relu", lambda name, module: isinstance(module, nn.GELU), lambda module: nn.ReLU())  # C
seams = ditkit.Seams((guidance_in_the_middle,), (without_the_last_block,), (counting,), (relu,), make("dpm++"))  # E


def listen(event):  # F
    if event.name == "step.end":
        print(f"step {event['step'].index:2}  sigma {event['step'].sigma:.3f}  {event['elapsed']:.3f} s")


result = ditkit.load(args.model, seams=seams, listeners=[listen])("a red circle moving left on a black background")
print(f"{calls.count('self')} self- and {calls.count('cross')} cross-attention calls; swaps: {seams.swaps[0].name}")
