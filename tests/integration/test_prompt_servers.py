"""Real servers on tiny models made here: ``transformers serve`` with a model that sees pictures, ``mlx_lm.server`` with
one that does not. The models babble; what is tested is what was asked, what was told, and that a seed repeats it."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import chat_models
import numpy as np
import pytest
from shell import alone

from ditkit.contracts import PromptExpander, Wish
from ditkit.errors import PlaceError
from ditkit.prompting.server import ServerExpander

BIN = Path(sys.executable).parent
PICTURE = np.linspace(0, 255, 40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


def wish(prompt="a red circle", *, pictures=(), temperature=1.0, seed=7, max_tokens=1500):
    return Wish("Say it at length.", prompt, pictures, temperature, seed, max_tokens)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Both, started side by side: name -> (address, model). Each is a process of its own, ended with the module."""
    importlib.metadata.version("mlx-lm")  # where the oracles are not installed, neither of the servers is
    root = tmp_path_factory.mktemp("servers")
    (root / "hf" / "hub").mkdir(parents=True)
    seeing, text = chat_models.write_seeing_model(root / "seeing"), chat_models.write_text_model(root / "text")
    ports = free_ports(2)
    commands = {
        "transformers": [BIN / "transformers", "serve", seeing, "--port", ports[0], "--device", "cpu",
                         "--dtype", "float32"],
        "mlx": [BIN / "mlx_lm.server", "--model", text, "--port", ports[1]],
    }  # fmt: skip
    environment = {**alone(), "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    started = []
    try:
        for name, command in commands.items():
            with (root / f"{name}.log").open("wb") as log:
                words = [str(word) for word in command]
                started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=root))
        for process, port, name in zip(started, ports, commands, strict=True):
            wait_for(process, f"http://127.0.0.1:{port}/health", root / f"{name}.log")
        yield {
            name: (f"http://127.0.0.1:{port}/v1", str(model))
            for name, port, model in zip(commands, ports, (seeing, text), strict=True)
        }
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """These servers do not tell which port they took, so they cannot be left to choose one."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.fixture(params=["transformers", "mlx"])
def expander(request, servers):
    address, model = servers[request.param]
    return ServerExpander(address, model, timeout=60, retries=0)


def test_a_seed_repeats_an_answer_and_another_does_not(expander):
    assert isinstance(expander, PromptExpander)
    first, again, other = expander(wish()), expander(wish()), expander(wish(seed=8))
    assert first == again
    assert first.raw != other.raw


def test_the_facts_of_an_answer(expander):
    answer = expander(wish(seed=3))
    assert answer.model == expander.model
    assert answer.told_model.startswith(expander.model)  # transformers adds the revision
    assert answer.finish == "stop"
    assert answer.raw
    assert 0 < answer.tokens <= 1500
    assert answer.prompt_tokens > 10


def test_an_answer_ends_at_the_number_of_tokens(expander):
    answer = expander(wish(seed=3, max_tokens=2))
    assert (answer.finish, answer.tokens) == ("length", 2)


def test_the_prompt_and_the_instructions_are_sent(expander):
    short = expander(wish("a"))
    long = expander(wish("a circle " * 20))
    assert long.prompt_tokens > short.prompt_tokens + 20


def test_the_first_model_of_the_list_is_taken(servers):
    address, model = servers["mlx"]
    expander = ServerExpander(address, retries=0)
    assert expander(wish()).model == model
    assert expander.fingerprint == ServerExpander(address, model).fingerprint


def test_a_server_that_lists_no_model_needs_a_name(servers):
    """Which versions of `transformers serve` list a model, and when, differs; one that does has its first one taken."""
    url = servers["transformers"][0]
    listed = [model["id"] for model in json.load(urllib.request.urlopen(f"{url}/models"))["data"]]
    expander = ServerExpander(url, retries=0)
    if listed:
        assert expander(wish()).model == listed[0]
    else:
        with pytest.raises(PlaceError, match=r"it lists no models\. Name one with expander_model"):
            expander(wish())


def test_a_picture_is_seen(servers):
    expander = ServerExpander(*servers["transformers"], retries=0)
    blind = expander(wish())
    seen, again = expander(wish(pictures=(PICTURE,))), expander(wish(pictures=(PICTURE,)))
    both = expander(wish(pictures=(PICTURE, 255 - PICTURE)))
    other = expander(wish(pictures=(255 - PICTURE,)))
    assert seen == again
    assert blind.prompt_tokens < seen.prompt_tokens < both.prompt_tokens
    assert seen.raw != other.raw


def test_a_model_that_reads_text_alone_says_so(servers):
    with pytest.raises(PlaceError, match="Take a model that sees pictures, or a template that shows none"):
        ServerExpander(*servers["mlx"], retries=0)(wish(pictures=(PICTURE,)))


def test_another_model_than_the_servers_is_an_error_that_names_it(servers):
    with pytest.raises(PlaceError, match="nobody/none"):
        ServerExpander(servers["transformers"][0], "nobody/none", retries=0)(wish())


def test_an_address_without_v1_is_explained(servers):
    address, model = servers["transformers"]
    with pytest.raises(PlaceError, match=r"answered 404.*ends in /v1"):
        ServerExpander(address.removesuffix("/v1"), model, retries=0)(wish())
