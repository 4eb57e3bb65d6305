"""One denoising run on two machines: the first steps at one host, the rest at another, the frames made here."""

import argparse
import contextlib
import subprocess
import sys

import numpy as np

import ditkit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()
PROMPT = "a white triangle moving down on a maroon background"


@contextlib.contextmanager
def host(*stages):
    command = [sys.executable, "-m", "ditkit", "host", "--stages", ",".join(stages), "--port", "0"]
    with subprocess.Popen([*command, "--model", args.model], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


with host("encode_text", "denoise") as first, host("denoise") as second:
    here = ditkit.load(args.model)
    step = here.model.request({}).steps // 2
    placement = {"encode_text": first, "denoise": first, f"denoise@{step}": second}
    pipe = ditkit.load(args.model, placement=placement)
    moved = pipe(PROMPT, seed=5)
    pipe.places.close()

for stage, places in moved.receipt["places"].items():
    print(f"{stage:16}{' then '.join(places)}")
assert np.array_equal(moved.video, here(PROMPT, seed=5).video)
print("every pixel is as from one machine")
