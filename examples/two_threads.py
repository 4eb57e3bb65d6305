"""One loaded model, two threads: each gets exactly what it would get alone."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import ditkit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="shapes")
args = parser.parse_args()

pipe = ditkit.load(args.model)
jobs = [
    {"prompt": "a red circle moving left on a black background", "seed": 1},
    {"prompt": "a blue square moving up on a gray background", "seed": 2, "scheduler": "dpm++"},
]
alone = [pipe(**job).video for job in jobs]
with ThreadPoolExecutor(2) as pool:
    together = list(pool.map(lambda job: pipe(**job).video, jobs))

for job, a, b in zip(jobs, alone, together, strict=True):
    print(f"{job['prompt']!r}: {'the same, bit for bit' if np.array_equal(a, b) else 'different'}")
    assert np.array_equal(a, b)
