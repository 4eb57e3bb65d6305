"""Threads that share one loaded model get what each would get alone, to the bit.

The yardstick is every clip made by itself, in the main thread, before any other thread exists."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

import ditkit
from ditkit.assembly import Components

ROUNDS = 3
CLIPS = {
    "one": {"prompt": "a red circle", "seed": 1},
    "two": {"prompt": "a green square moving left on gray", "seed": 2, "width": 48, "height": 16, "scheduler": "dpm++"},
    "three": {"prompt": "blue", "seed": 3, "frames": 9, "guidance_scale": 1.0, "scheduler": "euler", "height": 16},
    "four": {"prompt": "a red circle", "seed": 4, "steps": 3, "scheduler": "dpm++_sde", "width": 16, "shift": 3.0},
}


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads take turns every 50 microseconds, so that they really meet inside the model."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def together(jobs) -> list:
    """Each job in a thread of its own, all let go at the same moment; errors come back to the test."""
    gate = threading.Barrier(len(jobs))

    def start(job):
        gate.wait(30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(120) for future in [pool.submit(start, job) for job in jobs]]


def fields(result) -> dict[str, torch.Tensor]:
    return {name: result.state[name] for name in ("prompt_embeds", "latents", "video")}


def assert_same(found: dict, expected: dict, what: str) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{what}: {name} differs"


@pytest.mark.parametrize("pair", [("one", "two"), ("three", "four"), ("one", "one")])
def test_two_threads_with_one_pipe(tiny_model, pair):
    pipe = ditkit.load(tiny_model)
    alone = {name: fields(pipe(**CLIPS[name])) for name in set(pair)}

    def loop(name):
        return lambda: [fields(pipe(**CLIPS[name])) for _ in range(ROUNDS)]

    for name, results in zip(pair, together([loop(name) for name in pair]), strict=True):
        for i, found in enumerate(results):
            assert_same(found, alone[name], f"{name}, round {i}")
    for name in set(pair):
        assert_same(fields(pipe(**CLIPS[name])), alone[name], f"{name}, afterwards")


def test_two_threads_with_one_pipe_in_bfloat16(tiny_model):
    pipe = ditkit.load(tiny_model, dtype="bfloat16", cache_text_kv=False)
    alone = {name: fields(pipe(**CLIPS[name])) for name in ("one", "two")}
    for name, found in zip(alone, together([lambda n=name: fields(pipe(**CLIPS[n])) for name in alone]), strict=True):
        assert_same(found, alone[name], name)


def test_threads_listen_to_their_own_run_only(tiny_model):
    pipe = ditkit.load(tiny_model)
    pipe(**CLIPS["one"])
    heard: dict[str, list] = {"one": [], "four": []}

    def run(name):
        return lambda: pipe(**CLIPS[name], listeners=[heard[name].append])

    results = together([run(name) for name in heard])
    for (name, events), result in zip(heard.items(), results, strict=True):
        steps = [e["step"] for e in events if e.name == "step.end"]
        assert [s.index for s in steps] == list(range(CLIPS[name].get("steps", 4)))
        assert [s["timestep"] for s in result.receipt["steps"]] == [s.timestep for s in steps]


@torch.inference_mode()
def test_two_threads_with_one_vae():
    vae = tiny.vae()
    g = torch.Generator().manual_seed(5)
    given = [torch.randn(1, 16, 3, 2, 4, generator=g), torch.randn(1, 16, 4, 3, 2, generator=g)]
    videos = [torch.rand(1, 3, 9, 16, 32, generator=g), torch.rand(1, 3, 5, 32, 16, generator=g)]

    def job(i):
        @torch.inference_mode()
        def work():
            return [(torch.cat(list(vae.decode(given[i])), 2), vae.encode(videos[i])) for _ in range(5)]

        return work

    alone = [job(i)()[0] for i in range(2)]
    for expected, results in zip(alone, together([job(0), job(1)]), strict=True):
        for decoded, encoded in results:
            assert torch.equal(decoded, expected[0])
            assert torch.equal(encoded, expected[1])


@torch.inference_mode()
def test_two_decodings_interleaved_in_one_thread():
    """The memory of a stream belongs to its caller: two streams through one VAE, frame by frame in turn."""
    vae, g = tiny.vae(), torch.Generator().manual_seed(6)
    a, b = (torch.randn(1, 16, 3, 2, 2, generator=g) for _ in range(2))
    turns = list(zip(vae.decode(a), vae.decode(b), strict=True))
    for latents, frames in ((a, [t[0] for t in turns]), (b, [t[1] for t in turns])):
        assert torch.equal(torch.cat(frames, 2), torch.cat(list(vae.decode(latents)), 2))


def test_lazy_loading_happens_once(tiny_model, monkeypatch):
    loads: list[str] = []
    make = Components._make

    def counted(self, name):
        loads.append(name)
        return make(self, name)

    monkeypatch.setattr(Components, "_make", counted)
    expected = ditkit.load(tiny_model)(**CLIPS["one"])
    assert sorted(loads) == ["text_encoder", "tokenizer", "transformer", "vae"]

    loads.clear()
    pipe = ditkit.load(tiny_model)
    heard: list[list] = [[], []]
    results = together([lambda i=i: pipe(**CLIPS["one"], listeners=[heard[i].append]) for i in range(2)])
    assert sorted(loads) == ["text_encoder", "tokenizer", "transformer", "vae"]
    told = [e["component"] for events in heard for e in events if e.name == "load.end"]
    assert sorted(told) == ["text_encoder", "tokenizer", "transformer", "vae"]  # by the thread that loaded, once
    for result in results:
        assert_same(fields(result), fields(expected), "a freshly loaded pipe")
    assert all(pipe.components[name] is pipe.components[name] for name in pipe.components)
