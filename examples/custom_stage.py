"""A stage of your own, with a field of its own: how much each frame differs from the one before."""

import argparse

import ditkit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()


class MeasureMotion(ditkit.BaseStage):
    name = "measure_motion"
    reads = ("video",)
    writes = ("motion",)
    fields = (ditkit.Field("motion", "tensor", "float32", "B T", "levels", name, "mean change since the last frame"),)

    def run(self, inputs, ctx):
        video = inputs["video"].float()  # [B, T, H, W, 3]
        change = video.diff(dim=1, prepend=video[:, :1]).abs().mean((2, 3, 4))
        return {"motion": change}


pipe = ditkit.load(args.model, debug=True)  # debug: dtype and shape of every field are checked on the way
pipe.stages = pipe.stages.insert(MeasureMotion(), after="decode_latents")
result = pipe("a white circle moving down on a black background", seed=1)

print(" -> ".join(pipe.stages.names))
for frame, change in enumerate(result.state["motion"][0].tolist()):
    print(f"frame {frame:2}  {change:6.2f}  {'#' * round(change)}")
