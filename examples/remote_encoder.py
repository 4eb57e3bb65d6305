"""The text encoder runs at a host behind HTTP, as it would on another machine; the clip is the same, bit for bit."""

import argparse
import subprocess
import sys

import numpy as np

import ditkit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()
PROMPT = "a yellow square moving up on a teal background"

# On the other machine this would be: ditkit host --stages encode_text --host 0.0.0.0 --port 8700
command = [sys.executable, "-m", "ditkit", "host", "--stages", "encode_text", "--port", "0", "--model", args.model]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
    try:
        address = host.stdout.readline().split()[0]  # it says where it listens, and what it offers
        print(f"the text encoder is at {address}")

        here = ditkit.load(args.model)(PROMPT, seed=3)
        pipe = ditkit.load(args.model, placement={"encode_text": address})
        there = pipe(PROMPT, seed=3)
        pipe.places.close()
    finally:
        host.terminate()

assert np.array_equal(here.video, there.video)
assert here.state.fingerprints == there.state.fingerprints
trip = there.receipt["travelled"][0]
print(f"{trip['sent']} bytes went there, {trip['received']} came back, {1000 * trip['seconds']:.1f} ms on the way")
print(f"loaded here: {', '.join(pipe.components.describe())}; every pixel is the same")
