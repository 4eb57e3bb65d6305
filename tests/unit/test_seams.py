"""The six seams: a neutral wrapper changes no bit, a changing one changes the result, and taking it out restores it."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import ditkit
from ditkit.contracts import Seams, Swap
from ditkit.errors import SetupError
from ditkit.schedulers import make

PROMPT, SEED = "a red circle moving left", 3


class Same:
    """Wrappers at their neutral setting: something is plugged in and does nothing."""

    @staticmethod
    def predict(inner):
        return lambda x, step: inner(x, step)

    @staticmethod
    def run_blocks(inner):
        return lambda blocks, x, ctx: inner(blocks, x, ctx)

    @staticmethod
    def one_by_one(inner):
        """Neutral too, and nearer to what caches and block swaps do: the blocks are run by the wrapper itself."""

        def run(blocks, x, ctx):
            for block in blocks:
                x = block(x, ctx)
            return x

        return run

    @staticmethod
    def attend(inner):
        return lambda q, k, v, site: inner(q, k, v, site)

    @staticmethod
    def module(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module)


@dataclass(frozen=True)
class Delegate:
    """A scheduler that asks another one for everything."""

    inner: object

    @property
    def name(self):
        return self.inner.name

    @property
    def needs_noise(self):
        return self.inner.needs_noise

    def sigmas(self, steps, shift, convention):
        return self.inner.sigmas(steps, shift, convention)

    def solve(self, x, velocity, step, history, noise=None):
        return self.inner.solve(x, velocity, step, history, noise)


def is_ffn(name: str, module: nn.Module) -> bool:
    return name.endswith(".ffn")


def skip_the_last(inner):
    return lambda blocks, x, ctx: inner(list(blocks)[:-1], x, ctx)


def ignore_cross(inner):
    return lambda q, k, v, site: inner(q, k, v, site) * (0 if site.kind == "cross" else 1)


NEUTRAL = {
    "A predict": Seams(predict=(Same.predict,)),
    "A predict, twice": Seams(predict=(Same.predict, Same.predict)),
    "B run_blocks": Seams(run_blocks=(Same.run_blocks,)),
    "B run_blocks, one by one": Seams(run_blocks=(Same.one_by_one,)),
    "C swaps": Seams(swaps=(Swap("copy", is_ffn, Same.module),)),
    "C swaps, itself": Seams(swaps=(Swap("itself", lambda name, module: isinstance(module, nn.Linear), lambda m: m),)),
    "D attend": Seams(attend=(Same.attend,)),
    "E scheduler": Seams(scheduler=make("unipc")),
    "E scheduler, delegated": Seams(scheduler=Delegate(make("unipc"))),
    "all": Seams((Same.predict,), (Same.run_blocks,), (Same.attend,), (Swap("c", is_ffn, Same.module),), make("unipc")),
}
CHANGING = {
    "A predict": Seams(predict=(lambda inner: lambda x, step: inner(x, step) * 1.01,)),
    "B run_blocks": Seams(run_blocks=(skip_the_last,)),
    "C swaps": Seams(swaps=(Swap("none", is_ffn, lambda m: nn.Sequential(m, nn.Dropout(1.0).train())),)),
    "D attend": Seams(attend=(ignore_cross,)),
    "E scheduler": Seams(scheduler=make("euler")),
}


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


def plugged(pipe, seams: Seams):
    """The same loaded model with other seams. Swaps are applied when a model is built, so they need their own."""
    if seams.swaps:
        return ditkit.load(pipe.setup.model, seams=seams)
    return ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, seams)


def latents(pipe, **request) -> torch.Tensor:
    return pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": SEED, **request})), until="denoise").state[
        "latents"
    ]


@pytest.fixture(scope="module")
def bare(pipe) -> torch.Tensor:
    return latents(pipe)


@pytest.mark.parametrize("seam", NEUTRAL)
def test_neutral_is_identical(pipe, bare, seam):
    assert torch.equal(latents(plugged(pipe, NEUTRAL[seam])), bare)


@pytest.mark.slow
@pytest.mark.parametrize("seam", CHANGING)
def test_a_change_changes_and_its_removal_restores(pipe, bare, seam):
    changed = plugged(pipe, CHANGING[seam])
    first = latents(changed)
    assert (first - bare).abs().max() > 1e-3
    assert torch.equal(latents(pipe), bare)
    assert torch.equal(latents(changed), first)
    assert torch.equal(latents(pipe), bare)


def test_neutral_stays_identical_without_guidance_and_in_bfloat16(tiny_model):
    for setup, request in (({}, {"guidance_scale": 1.0}), ({"dtype": "bfloat16"}, {"steps": 2})):
        pipe = ditkit.load(tiny_model, **setup)
        expected = latents(pipe, **request)
        for name in ("A predict", "B run_blocks, one by one", "D attend"):
            assert torch.equal(latents(plugged(pipe, NEUTRAL[name]), **request), expected), name


# --- what each seam is told


def test_the_first_wrapper_is_the_outermost(pipe):
    order = []

    def named(name):
        def wrapper(inner):
            def call(*args):
                order.append(name)
                return inner(*args)

            return call

        return wrapper

    both = (named("outer"), named("inner"))
    for seams in (Seams(predict=both), Seams(run_blocks=both), Seams(attend=both)):
        order.clear()
        latents(plugged(pipe, seams), steps=1)
        assert order[:2] == ["outer", "inner"]
        assert order == ["outer", "inner"] * (len(order) // 2)


def test_predict_is_told_the_step(pipe):
    steps = []

    def watch(inner):
        def call(x, step):
            assert x.dtype == torch.float32
            assert x.shape == (1, 16, 2, 4, 4)
            velocity = inner(x, step)
            assert (velocity.shape, velocity.dtype) == (x.shape, x.dtype)
            steps.append(step)
            return velocity

        return call

    chosen = plugged(pipe, Seams(predict=(watch,)))
    latents(chosen)
    assert steps == pipe.steps(pipe.model.request({"prompt": PROMPT}))  # the step table is what runs
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert {s.count for s in steps} == {4}
    assert {s.guidance_scale for s in steps} == {5.0}
    assert [s.sigma_next for s in steps] == [*(s.sigma for s in steps[1:]), 0.0]
    assert all(s.timestep == int(1000 * s.sigma) for s in steps)


def test_predict_can_ask_for_one_branch(pipe):
    """A guidance of one's own around the built-in one, the same formula: equal to the last bit."""

    def guidance(inner):
        def call(x, step):
            one = replace(step, guidance_scale=1.0)
            cond, uncond = (inner(x, replace(one, branch=branch)) for branch in ("cond", "uncond"))
            return uncond + step.guidance_scale * (cond - uncond)

        return call

    assert torch.equal(latents(plugged(pipe, Seams(predict=(guidance,)))), latents(pipe))


def test_blocks_and_attention_are_told_where_they_are(pipe):
    sites, grids = [], []

    def watch_blocks(inner):
        def call(blocks, x, ctx):
            assert x.shape[1] == 2 * 2 * 2  # tokens
            assert len(blocks) == 2
            grids.append(ctx.grid)
            out = inner(blocks, x, ctx)
            assert out.shape == x.shape
            return out

        return call

    def watch_attention(inner):
        def call(q, k, v, site):
            assert k.shape == v.shape
            assert q.shape == (1, 8, 2, 32)
            assert k.shape[1] == (8 if site.kind == "self" else 512)
            sites.append((site.block, site.kind, site.grid))
            return inner(q, k, v, site)

        return call

    latents(plugged(pipe, Seams(run_blocks=(watch_blocks,), attend=(watch_attention,))), steps=1)
    assert grids == [(2, 2, 2)] * 2  # both branches
    assert sites == [(block, kind, (2, 2, 2)) for block in (0, 1) for kind in ("self", "cross")] * 2


def test_the_scheduler_decides_steps_and_noise(pipe):
    class Counting(Delegate):
        def sigmas(self, steps, shift, convention):
            asked.append((steps, shift, convention))
            return [0.9, 0.5, 0.0]

        def solve(self, x, velocity, step, history, noise=None):
            noises.append(noise)
            return super().solve(x, velocity, step, history, noise)

    asked, noises = [], []
    chosen = plugged(pipe, Seams(scheduler=Counting(make("dpm++_sde"))))
    state = chosen.run(chosen.begin(pipe.model.request({"prompt": PROMPT, "shift": 3.0})), until="denoise").state
    assert asked == [(4, 3.0, "wan")]
    torch.testing.assert_close(state["sigmas"], [0.9, 0.5, 0.0])
    assert state["step"] == 2
    assert [n.shape for n in noises] == [(1, 16, 2, 4, 4)] * 2
    assert not torch.equal(noises[0], noises[1])


# --- C: swaps


def test_a_swap_that_matches_nothing_is_an_error(pipe):
    for match in (lambda name, module: False, lambda name, module: name == "blocks.7.ffn"):
        broken = plugged(pipe, Seams(swaps=(Swap("lora", match, Same.module),)))
        with pytest.raises(SetupError, match="swap 'lora': it matches no module"):
            latents(broken)
    one_of_two = (Swap("good", is_ffn, Same.module), Swap("bad", lambda name, module: False, Same.module))
    with pytest.raises(SetupError, match="swap 'bad'"):
        latents(plugged(pipe, Seams(swaps=one_of_two)))


def test_swaps_are_on_the_receipt_and_in_the_fingerprint(pipe):
    swapped = plugged(pipe, NEUTRAL["C swaps"])
    latents(swapped, steps=1)
    assert swapped.components.describe()["transformer"]["swaps"] == ["copy"]
    assert swapped.components["transformer"].fingerprint != pipe.components["transformer"].fingerprint
    assert swapped.components["vae"].fingerprint == pipe.components["vae"].fingerprint


def test_a_swap_sees_every_module_once_and_replaces_exactly_its_own(pipe):
    seen = []

    def match(name, module):
        seen.append(name)
        return name == "blocks.1.cross_attn.q"

    swapped = plugged(pipe, Seams(swaps=(Swap("q", match, Same.module),))).components["transformer"]
    assert sorted(seen) == sorted(name for name, _ in swapped.named_modules() if name)
    plain = dict(pipe.components["transformer"].named_modules())
    assert {name for name, _ in swapped.named_modules()} == set(plain)


# --- F: events


def test_listening_changes_no_bit(pipe, bare):
    heard = []
    request = pipe.model.request({"prompt": PROMPT, "seed": SEED})
    result = pipe.run(pipe.begin(request), listeners=[heard.append])
    assert torch.equal(result.state["latents"], bare)
    names = [e.name for e in heard]
    per_step = ["step.start", "prediction", "step.end"]
    denoise = ["stage.start", *per_step * 4, "stage.end"]
    rest = [n for n in names if not n.startswith("load.")]
    assert rest == ["stage.start", "stage.end", *denoise, "stage.start", "frames", "frames", "stage.end"]
    assert [e["stage"] for e in heard if e.name == "stage.end"] == ["encode_text", "denoise", "decode_latents"]
    frames = torch.cat([e["frames"] for e in heard if e.name == "frames"])
    assert torch.equal(frames, result.state["video"][0])
    seconds = [e.seconds for e in heard]
    assert seconds == sorted(seconds)


def test_an_event_is_read_only(pipe):
    def meddle(event):
        with pytest.raises(TypeError):
            event.values["extra"] = 1
        with pytest.raises(AttributeError):
            event.name = "other"
        met.append(event.name)

    met = []
    pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "steps": 1})), until="denoise", listeners=[meddle])
    assert "prediction" in met


def test_what_a_listener_raises_reaches_the_caller(pipe, bare):
    def fail(event):
        if event.name == "prediction":
            raise RuntimeError("from the listener")

    with pytest.raises(RuntimeError, match="from the listener"):
        pipe(PROMPT, seed=SEED, listeners=[fail])
    assert torch.equal(latents(pipe), bare)
