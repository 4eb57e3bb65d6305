"""Stop in the middle of denoising, keep everything in one file, go on from it: the same bits as in one go."""

import argparse

import numpy as np

import ditkit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()
PROMPT = "a green triangle moving right on a navy background"

pipe = ditkit.load(args.model)
request = pipe.model.request({"prompt": PROMPT, "seed": 3})
whole = pipe.run(pipe.begin(request))

half = pipe.run(pipe.begin(request), stop_at_step=request.steps // 2)
file = half.state.save("outputs/half.safetensors")
print(f"{file}: {file.stat().st_size} bytes after step {half.state['step']} of {request.steps}")

# From here on nothing of the run above is needed. This could be another process, another day, another machine.
state = ditkit.State.load(file)
print(state)
rest = ditkit.load(args.model).run(state)

assert np.array_equal(rest.video, whole.video)
print(f"{len(rest.receipt['steps'])} steps were left; skipped: {rest.receipt['skipped']}; every pixel is the same")
