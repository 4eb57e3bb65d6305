"""A real ``ditkit host`` whose text encoder is MLX's, and a client that computes with torch: the Mac and the CUDA box,
on one machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import ditkit

HOST = [
    "host", "--stages", "encode_text", "--backend", "mlx", "--dtypes", "text_encoder=bfloat16", "--port", "0",
    "--model", "shapes", "--threads", "1",
]  # fmt: skip
ASKED = {"prompt": "a red circle moving left on a black background", "seed": 3, "steps": 2}


@pytest.fixture(scope="module")
def address():
    """Of the host; it stops when the tests are done."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DITKIT_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ditkit", *HOST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield re.search(r"http\S+", process.stdout.readline())[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def there(address):
    """A clip by way of the host: the pipe that made it, and the result."""
    pipe = ditkit.load("shapes", placement={"encode_text": address})
    yield pipe, pipe(**ASKED)
    pipe.places.close()


def test_it_is_bit_equal_to_mlx_in_this_process(there):
    result = there[1]
    here = ditkit.load("shapes", backends={"text_encoder": "mlx"}, dtypes={"text_encoder": "bfloat16"})(**ASKED)
    assert torch.equal(result.state["prompt_embeds"], here.state["prompt_embeds"])
    assert np.array_equal(result.video, here.video)
    assert result.state.fingerprints == here.state.fingerprints
    assert result.state["weights"] == here.state["weights"]


def test_it_is_not_what_torch_computes_and_says_so(there):
    result = there[1]
    pipe = ditkit.load("shapes", dtypes={"text_encoder": "bfloat16"})
    torchs = pipe.run(pipe.begin(pipe.model.request(ASKED)), until="encode_text")
    assert result.state["weights"]["text_encoder"] != torchs.state["weights"]["text_encoder"]
    assert result.state.fingerprints["prompt_embeds"] != torchs.state.fingerprints["prompt_embeds"]
    assert result.state["weights"]["tokenizer"] == torchs.state["weights"]["tokenizer"]


def test_rows_travel_trimmed_in_their_own_dtype_and_no_encoder_is_loaded_here(there):
    pipe, result = there
    rows = result.state["prompt_embeds"]
    assert rows.dtype == torch.bfloat16
    assert len(rows) == sum(result.state["prompt_lengths"])
    assert "text_encoder" not in pipe.components.describe()
    tokens = len(rows) + sum(result.state.get("negative_prompt_lengths", ()))
    (trip,) = [trip for trip in result.receipt["travelled"] if trip["stage"] == "encode_text"]
    assert trip["received"] < 2 * tokens * rows.shape[1] + 20_000


def test_the_host_says_what_computes(there, address):
    pipe, _ = there
    assert pipe.places.describe()[address]["parts"]["text_encoder"]["backend"].startswith("mlx (mlx 0.")
