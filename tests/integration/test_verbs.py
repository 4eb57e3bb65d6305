"""What plugs do with frames and rows, without knowing the network: windows, a rollout with a key/value cache, a split.

The dense reference is the same network in one pass. Source of the two spikes: a cache of keys and values over chunks of
frames (Self-Forcing), uneven all-to-all over heads (DeepSpeed-Ulysses)."""

import copy
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.remembering import Windows

import ditkit
from ditkit import Seams
from ditkit.models.wan import run_in_order
from ditkit.nn.attention import sdpa

TASKS = ("t2v", "i2v", "flf2v", "ti2v", "vace", "i2v_a14b")
PICTURE = np.tile(np.arange(48, dtype=np.uint8)[:, None, None], (1, 48, 3)) * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {task: tiny.write(tmp_path_factory.mktemp(task) / "model", task) for task in TASKS}


def request(task: str) -> dict:
    pictures = {"i2v": ("image",), "i2v_a14b": ("image",), "flf2v": ("image", "last_image"), "ti2v": ("image",)}
    given = dict.fromkeys(pictures.get(task, ()), PICTURE)
    if task == "vace":
        given["reference_images"] = [PICTURE]
    side = 64 if task == "ti2v" else 48
    size = {"width": side, "height": side, "frames": 13, "size_from": "request"}
    return {"prompt": "a red circle", "steps": 3, **size, **given}


def latents(pipe, task: str) -> torch.Tensor:
    values, pixels = ditkit.pictures.take(request(task))
    return pipe.run(pipe.begin(pipe.model.request(values), pixels), until="denoise").state["latents"]


# --- context windows at seam A


@pytest.mark.parametrize("task", TASKS)
def test_one_window_over_all_frames_changes_no_bit(folders, task):
    pipe = ditkit.load(folders[task])
    windowed = ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, Seams(predict=(Windows(99),)))
    assert torch.equal(latents(windowed, task), latents(pipe, task))


@pytest.mark.parametrize("task", TASKS)
def test_two_windows_run_for_every_task(folders, task):
    pipe = ditkit.load(folders[task])
    windowed = ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, Seams(predict=(Windows(2, 1),)))
    found = latents(windowed, task)
    assert found.shape == latents(pipe, task).shape
    assert not torch.equal(found, latents(pipe, task))


def test_a_window_is_a_run_of_its_own_frames(folders):
    """Two windows that do not touch, of image-to-video: each is conditioned on what belongs to its frames."""
    pipe, seen = ditkit.load(folders["i2v"]), {}
    values, pixels = ditkit.pictures.take(request("i2v"))
    state = pipe.run(pipe.begin(pipe.model.request(values), pixels), until="encode_condition").state
    transformer, step = pipe.components["transformer"], pipe.steps(pipe.model.request(values))[0]
    x = torch.randn(1, 16, 4, 6, 6, generator=torch.Generator().manual_seed(0))

    def watch(predict):
        def call(x_, step_):
            for start in (0, 2):
                one = replace(step_, guidance_scale=1.0).window(start, start + 2)
                seen[start] = predict(x_[:, :, start : start + 2], one)
            return predict(x_, step_)

        return call

    state = state.with_fields({"latents": x})
    ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, Seams(predict=(watch,))).run(
        state, until="denoise", stop_at_step=1
    )
    with torch.inference_mode():
        for start in (0, 2):
            rows = state["prompt_embeds"].split(state["prompt_lengths"])
            whole = torch.cat((x, state["condition"]), 1)[:, :, start : start + 2]
            text = transformer.prepare_text(rows, image=state["image_embeds"])
            wanted = transformer(whole, torch.tensor([step.timestep], dtype=torch.float64), text)
            assert torch.equal(seen[start], wanted)


def test_a_window_that_is_not_named_is_one_sentence(folders):
    def blind(predict):
        return lambda x, step: predict(x[:, :, :2], step)

    pipe = ditkit.load(folders["i2v"], seams=Seams(predict=(blind,)))
    with pytest.raises(ValueError, match=r"\(2, 6, 6\) were given with a condition of size \(4, 6, 6\).*Step.window"):
        latents(pipe, "i2v")


# --- weight slots at seam B


class Slots:
    """The weights of each block are copied into one of two modules that are used again and again."""

    fingerprint = "slots"

    def __call__(self, run_blocks):
        slots = []

        def through(index, block):
            def call(x, ctx):
                slot = slots[index % 2]
                with torch.no_grad():
                    for mine, theirs in zip(slot.parameters(), block.parameters(), strict=True):
                        mine.copy_(theirs)
                for mine, theirs in zip(slot.modules(), block.modules(), strict=True):
                    if hasattr(theirs, "block"):
                        mine.block = theirs.block
                return slot(x, ctx)

            return call

        def run(blocks, x, ctx):
            slots.extend([] if slots else [copy.deepcopy(blocks[0]) for _ in range(2)])
            return run_blocks([through(i, block) for i, block in enumerate(blocks)], x, ctx)

        return run


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("cached", [True, False])
def test_reused_weight_slots_change_no_bit(folders, task, cached):
    plain = ditkit.load(folders[task])
    slotted = ditkit.load(folders[task], cache_text_kv=cached, seams=Seams(run_blocks=(Slots(),)))
    assert torch.equal(latents(slotted, task), latents(plain, task))


def test_text_keys_are_found_by_number_and_kind(folders):
    transformer = ditkit.load(folders["i2v"]).components["transformer"]
    config = transformer.config
    image = torch.zeros(1, config.image_tokens or 5, config.image_dim)
    text = transformer.prepare_text([torch.ones(3, config.text_dim)], image=image).text
    assert {*text.keys_values} == {(i, False, k) for i in range(config.num_layers) for k in ("cross", "image")}


# --- a rollout with a key/value cache: seams B and D


def test_chunks_with_a_cache_are_one_pass_with_a_block_causal_mask(folders):
    transformer, chunk = ditkit.load(folders["t2v"]).components["transformer"], 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 6, 4, 4, generator=generator)
    times, cache = torch.full((1, 6), 500.0, dtype=torch.float64), {}

    def masked(q, k, v, site):
        if site.kind != "self":
            return sdpa(q, k, v, site)
        frame = torch.arange(site.grid[0]).repeat_interleave(site.grid[1] * site.grid[2]) // chunk
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame[None]).transpose(1, 2)

    def cached(q, k, v, site):
        if site.kind == "self":
            before = cache.get(site.block, (k[:, :0], v[:, :0]))
            k, v = cache[site.block] = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
        return sdpa(q, k, v, site)

    with torch.inference_mode():
        text = transformer.prepare_text([torch.randn(5, transformer.config.text_dim, generator=generator)])
        whole = transformer(x, times, text, attend=masked)
        for shift, close in ((True, True), (False, False)):
            cache.clear()
            parts = [
                transformer(
                    x[:, :, at : at + chunk], times[:, at : at + chunk], text, attend=cached,
                    run_blocks=lambda blocks, x, ctx, by=at * shift: run_in_order(blocks, x, ctx.shifted(by)),
                )
                for at in range(0, 6, chunk)
            ]  # fmt: skip
            assert torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=1e-5) == close


# --- a sequence split over ranks, uneven: seams B and D


class Ranks:
    """All-to-all between threads that stand for the ranks of a group."""

    def __init__(self, count: int):
        self.count, self.barrier, self.boxes = count, threading.Barrier(count), {}

    def exchange(self, rank: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        self.boxes[rank] = parts
        self.barrier.wait()
        got = [self.boxes[other][rank] for other in range(self.count)]
        self.barrier.wait()
        return got


def shares(total: int, count: int) -> list[int]:
    return [total // count + (i < total % count) for i in range(count)]


@dataclass(frozen=True)
class Split:
    ranks: Ranks
    rank: int
    fingerprint = "a sequence split"

    def __call__(self, run_blocks):
        def run(blocks, x, ctx):
            counts = shares(x.shape[1], self.ranks.count)
            start = sum(counts[: self.rank])
            own = slice(start, start + counts[self.rank])
            part = run_blocks(blocks, x[:, own], ctx.rows(own))
            return torch.cat(self.ranks.exchange(self.rank, [part] * self.ranks.count), 1)

        return run


@dataclass(frozen=True)
class Ulysses:
    """Tokens of all ranks for a share of the heads, and back."""

    ranks: Ranks
    rank: int
    fingerprint = "ulysses"

    def __call__(self, attend):
        def call(q, k, v, site):
            if site.kind != "self":
                return attend(q, k, v, site)
            tokens, heads = shares(np.prod(site.grid), self.ranks.count), shares(q.shape[2], self.ranks.count)
            there = [torch.cat(self.ranks.exchange(self.rank, [*t.split(heads, 2)]), 1) for t in (q, k, v)]
            return torch.cat(self.ranks.exchange(self.rank, [*attend(*there, site).split(tokens, 1)]), 2)

        return call


@pytest.mark.parametrize("task", ["t2v", "ti2v", "vace"])
def test_a_split_over_uneven_ranks_is_the_whole(folders, task):
    pipe, count, found, faults = ditkit.load(folders[task]), 2, {}, []
    ranks = Ranks(count)

    def work(rank):
        try:
            seams = Seams(run_blocks=(Split(ranks, rank),), attend=(Ulysses(ranks, rank),))
            found[rank] = latents(ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, seams), task)
        except BaseException as e:
            faults.append(e)
            ranks.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    plain = latents(pipe, task)
    for rank in range(count):
        torch.testing.assert_close(found[rank], plain, rtol=0, atol=5e-5)


def test_rows_of_rows_and_what_they_are(folders):
    transformer, seen = ditkit.load(folders["ti2v"]).components["transformer"], {}

    def watch(blocks, x, ctx):
        seen.update(ctx=ctx, count=x.shape[1])
        return run_in_order(blocks, x, ctx)

    x = torch.zeros(1, transformer.latent_channels, 3, 4, 4)
    with torch.inference_mode():
        text = replace(transformer.prepare_text([torch.ones(2, transformer.config.text_dim)]), clean_frames=1)
        transformer(x, torch.tensor([500.0]), text, run_blocks=watch)
    ctx = seen["ctx"]
    assert ctx.tokens == {"video": slice(0, seen["count"])}
    once, twice = ctx.rows(slice(5, 9)), ctx.rows(slice(2, 11)).rows(slice(3, 7))
    assert once.tokens == twice.tokens == {"video": slice(0, 4)}
    for a, b, c in zip(once.rope, twice.rope, ctx.rope, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c[5:9])
    assert torch.equal(once.modulation.token, ctx.modulation.token[:, 5:9])
    assert torch.equal(ctx.shifted(2).shifted(1).rope[0], ctx.shifted(3).rope[0])
    assert torch.equal(ctx.shifted(3).rows(slice(5, 9)).rope[0], once.shifted(3).rope[0])
