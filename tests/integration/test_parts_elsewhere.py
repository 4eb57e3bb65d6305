"""Models of which some parts are on another machine: real hosts on loopback that have the files of their stages only.

The hosts run in threads of this process; that each has its own files and components is what matters here.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hosting import in_thread
from safetensors.torch import load_file, save_file

import ditkit
from ditkit import replay as replays
from ditkit.errors import LoadError, PlaceError, SetupError, StateError
from ditkit.placement.worker import load_all, worker_of
from ditkit.setup import Setup
from ditkit.trust import PLACES

SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 4, "seed": 3}
NOTES = "[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 4\n"
IMAGE = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)


@contextlib.contextmanager
def host(model: Path, *stages: str, **setup):
    """A host of these stages: its ``url``, and the ``components`` that it holds."""
    worker = worker_of(Setup.of({"model": str(model), **setup}), stages or None)
    load_all(worker)
    with in_thread(worker) as serving:
        yield SimpleNamespace(url=serving.url, components=worker.components)


def without(model: Path, folder: Path, *names: str) -> Path:
    """A copy of a model that lacks these files or folders."""
    shutil.copytree(model, folder)
    for name in names:
        there = folder / name
        shutil.rmtree(there) if there.is_dir() else there.unlink()
    return folder


def only(model: Path, folder: Path, *names: str) -> Path:
    """A folder with nothing but these files or folders of a model."""
    for name in names:
        there = model / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(there, folder / name) if there.is_dir() else shutil.copy(there, folder / name)
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tiny.write(tmp_path_factory.mktemp("native") / "model", "t2v", "native")
    (folder / "ditkit.toml").write_text(NOTES)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_model):
    pipe = ditkit.load(tiny_model)
    return pipe.run(pipe.begin(pipe.model.request({"prompt": "a red circle", **SMALL})))


def same(result, whole) -> None:
    """The identical State, but for what the model was called."""
    ours, theirs = result.state, whole.state
    assert ours["model"]["parts"] == theirs["model"]["parts"]
    assert ours.with_fields({"model": theirs["model"]}).equal(theirs)
    assert ours.fingerprints == theirs.fingerprints


# --- the text encoder lies at a host


@pytest.mark.parametrize("form", ["subfolders", "indexed"])
def test_a_machine_needs_only_the_files_of_its_stages(tiny_model, whole, tmp_path, form):
    index = ["model_index.json"] if form == "indexed" else []
    mac = only(tiny_model, tmp_path / "mac", "text_encoder", "tokenizer", *index)
    box = without(tiny_model, tmp_path / "box", "text_encoder", "tokenizer")
    with host(mac, "encode_text") as there:
        pipe = ditkit.load(box, placement={"encode_text": there.url})
        result = pipe("a red circle", **SMALL)
        assert set(there.components) == {"text_encoder", "tokenizer"}
    same(result, whole)
    assert set(pipe.components) == {"transformer", "vae"}
    assert set(pipe.model.elsewhere) == {"text_encoder", "tokenizer"}
    facts = result.receipt["components"]
    assert set(facts) == {"text_encoder", "tokenizer", "transformer", "vae"}
    assert facts["text_encoder"]["place"] == there.url
    local = whole.receipt["components"]["text_encoder"]
    assert {k: facts["text_encoder"][k] for k in local} == local
    assert result.manifests[0]["components"]["tokenizer"]["files"] == whole.receipt["components"]["tokenizer"]["files"]


def test_a_host_of_native_files_or_of_named_ones(native, tmp_path):
    pipe = ditkit.load(native)
    whole = pipe.run(pipe.begin(pipe.model.request({"prompt": "a red circle", **SMALL})))
    weights = "models_t5_umt5-xxl-enc-bf16.pth"
    mac = only(native, tmp_path / "mac", weights, "google")
    box = without(native, tmp_path / "box", weights, "google")
    parts = {"text_encoder": str(mac / weights), "tokenizer": str(mac / "google" / "umt5-xxl")}
    for given in ({"model": mac},
                  {"model": Path(parts["text_encoder"]), "components": {"tokenizer": parts["tokenizer"]}},
                  {"model": "shapes", "components": parts}):  # fmt: skip
        with host(given.pop("model"), "encode_text", **given) as there:
            same(ditkit.load(box, placement={"encode_text": there.url})("a red circle", **SMALL), whole)


def test_parts_that_do_not_fit_are_refused_before_anything_is_computed(tiny_model, tmp_path):
    wrong = tmp_path / "wrong"
    config = tiny.KINDS["umt5"].write_config("transformers", tiny.asdict(tiny.replace(tiny.TEXT, d_model=48)))
    encoder = tiny.text_encoder(config=tiny.replace(tiny.TEXT, d_model=48)).state_dict()
    tensors = {k: x for k, x in encoder.items() if k != "encoder.embed_tokens.weight"}
    tiny.folders.write_component(wrong / "text_encoder", config, tensors, weights_name="model.safetensors")
    tiny.write_tokenizer(wrong / "tokenizer")
    box = without(tiny_model, tmp_path / "box", "text_encoder", "tokenizer")
    with (
        host(wrong, "encode_text") as there,
        pytest.raises(LoadError, match=r"its text_encoder at http.* 48 \(d_model"),
    ):
        ditkit.load(box, placement={"encode_text": there.url})


def test_what_lies_nowhere_is_missed_at_once(tiny_model, tmp_path):
    mac = only(tiny_model, tmp_path / "mac", "text_encoder", "tokenizer")
    with pytest.raises(LoadError, match="it needs a Wan VAE"):
        worker_of(Setup(model=str(mac)), ["encode_text", "decode_latents"])
    with pytest.raises(LoadError, match="it holds no part of a model"):
        worker_of(Setup(model=str(mac)), ["denoise"])
    box = without(tiny_model, tmp_path / "box", "text_encoder", "tokenizer", "vae")
    with host(mac, "encode_text") as there:
        with pytest.raises(LoadError, match="it needs a Wan VAE"):
            ditkit.load(box, placement={"encode_text": there.url})
        with pytest.raises(LoadError, match="it needs a Wan VAE"):  # the host has none either
            ditkit.load(box, placement={"encode_text": there.url, "decode_latents": there.url})
    with pytest.raises(PlaceError, match=there.url):  # gone by now
        ditkit.load(box, placement={"encode_text": there.url})


def test_a_part_that_a_stage_here_calls_has_to_be_here(tmp_path):
    model = tiny.write(tmp_path / "i2v", "i2v")
    box = without(model, tmp_path / "box", "vae")
    refused = pytest.raises(SetupError, match=r"'encode_condition' on this machine: its vae lies at http")
    with host(model, "decode_latents") as there, refused:
        ditkit.load(box, placement={"decode_latents": there.url})


# --- a part that lies here and there


def test_another_text_encoder_at_the_host_is_refused_unless_it_is_meant(tiny_model, whole, tmp_path):
    other = only(tiny_model, tmp_path / "other", "text_encoder", "tokenizer")
    file = other / "text_encoder" / "model.safetensors"
    save_file({k: x * 1.5 for k, x in load_file(file).items()}, file, {"format": "pt"})
    with host(other, "encode_text") as there:
        pipe = ditkit.load(tiny_model, placement={"encode_text": there.url})
        with pytest.raises(PlaceError, match=r"its text_encoder is another one than the one here.*write parts = "):
            pipe("a red circle", **SMALL)
        meant = ditkit.load(tiny_model, placement={"encode_text": there.url}, components={"text_encoder": there.url})
        result = meant("a red circle", **SMALL)
        assert not torch.equal(result.state["prompt_embeds"], whole.state["prompt_embeds"])
        with pytest.raises(SetupError, match="no stage that calls it is placed there"):
            ditkit.load(tiny_model, components={"text_encoder": there.url})
        with pytest.raises(StateError, match=r"another text_encoder.*run it once more from encode_text"):
            ditkit.load(tiny_model).run(result.state, start="denoise")
        again = ditkit.load(tiny_model).run(result.state, start="encode_text")
    same(again, whole)


def test_the_same_part_here_and_there(tiny_model, whole):
    with host(tiny_model) as there:
        pipe = ditkit.load(tiny_model, placement={"encode_text": there.url, "decode_latents": there.url})
        same(pipe("a red circle", **SMALL), whole)
        assert set(pipe.components.holder.loaded) == {"transformer"}


# --- everything lies at a host


def test_a_model_at_a_host(tiny_model, whole, tmp_path):
    with host(tiny_model) as there:
        pipe = ditkit.load(there.url)
        assert (pipe.model.task, pipe.model.strides, pipe.model.patch) == ("t2v", (4, 8, 8), (1, 2, 2))
        local = ditkit.load(tiny_model).model
        assert (pipe.model.defaults_for({}), pipe.model.latents_rgb) == (local.defaults_for({}), local.latents_rgb)
        result = pipe("a red circle", seed=3)
        same(result, whole)
        assert not pipe.components
        clip = result.save(tmp_path / "clip.npz")[0]
        assert replays.replay(replays.read(clip), allow=PLACES).identical
        mine = ditkit.load(there.url, placement={"decode_latents": "here"}, components={"vae": str(tiny_model / "vae")})
        same(mine("a red circle", seed=3), whole)
        assert set(mine.components.holder.loaded) == {"vae"}
        with pytest.raises(SetupError, match="its vae lies at"):
            ditkit.load(there.url, placement={"decode_latents": "here"})
    with pytest.raises(PlaceError, match=there.url):
        replays.prepare(replays.read(clip), allow=PLACES)
    here = replays.prepare(replays.read(clip), str(tiny_model), here=True)
    assert replays.replay(replays.read(clip), here).identical


# --- two experts at two hosts


@pytest.fixture(scope="module", params=["t2v_a14b", "i2v_a14b"])
def experts(request, tmp_path_factory):
    """A model of two experts, a copy with neither, a host of each, and what one machine makes of it."""
    root = tmp_path_factory.mktemp(request.param)
    model = tiny.write(root / "model", request.param)
    high, low = only(model, root / "high", "transformer"), only(model, root / "low", "transformer_2")
    box = without(model, root / "box", "transformer", "transformer_2")
    pipe = ditkit.load(model)
    more = {"image": IMAGE} if request.param == "i2v_a14b" else {}
    values = {"prompt": "a red circle", **SMALL, "steps": 6, **more}
    with host(high, "denoise") as first, host(low, "denoise") as second:
        yield model, box, first, second, values, pipe(**values)


def test_neither_host_ever_has_both_experts(experts):
    _, box, first, second, values, whole = experts
    placement = {"denoise.transformer": first.url, "denoise.transformer_2": second.url}
    pipe = ditkit.load(box, placement=placement)
    result = pipe(**values)
    same(result, whole)
    assert set(first.components) == set(first.components.holder.loaded) == {"transformer"}
    assert set(second.components) == set(second.components.holder.loaded) == {"transformer_2"}
    assert not {"transformer", "transformer_2"} & set(pipe.components)
    assert result.receipt["places"]["denoise"] == [first.url, second.url]
    places = {n: f["place"] for n, f in result.receipt["components"].items() if "place" in f}
    assert places == {"transformer": first.url, "transformer_2": second.url}


def test_the_hand_over_may_be_named_as_a_step(experts):
    _, box, first, second, values, whole = experts
    k = next(s["index"] for s in whole.receipt["steps"] if s["expert"] == "transformer_2")
    assert 0 < k < 6
    same(ditkit.load(box, placement={"denoise": first.url, f"denoise@{k}": second.url})(**values), whole)
    wrong = ditkit.load(box, placement={"denoise": first.url, f"denoise@{k + 1}": second.url})
    heard = []
    with pytest.raises(PlaceError, match=f"at {first.url}: there is no transformer_2"):
        wrong(**values, listeners=[lambda event: heard.append(event.name)])
    assert "stage.start" not in heard


def test_one_expert_here_and_one_there(experts, tmp_path):
    model, _, first, second, values, whole = experts
    mine = without(model, tmp_path / "mine", "transformer_2")
    pipe = ditkit.load(mine, placement={"denoise.transformer_2": second.url})
    same(pipe(**values), whole)
    assert "transformer_2" not in pipe.components
    pipe = ditkit.load(model, placement={"denoise.transformer": first.url})
    same(pipe(**values), whole)
    assert "transformer" not in pipe.components.holder.loaded


def test_a_run_that_is_cut_by_a_file_loads_one_expert_on_each_side(experts, tmp_path):
    model, _, _, _, _, whole = experts
    k = next(s["index"] for s in whole.receipt["steps"] if s["expert"] == "transformer_2")
    first, second = ditkit.load(model), ditkit.load(model)
    state = whole.state.without("latents", "sigmas", "step", "history", "video")
    for name in ("stages", "records", "weights"):
        state = state.with_fields({name: type(state[name])()})
    half = first.run(state, stop_at_step=k).state
    assert "transformer_2" not in first.components.holder.loaded
    assert "transformer_2" not in half["weights"]
    half.save(tmp_path / "half.st")
    done = second.run(ditkit.State.load(tmp_path / "half.st")).state
    assert "transformer" not in second.components.holder.loaded
    straight = first.run(state).state
    assert done.equal(straight)
    assert done.fingerprints == straight.fingerprints
    assert torch.equal(done["video"], whole.state["video"])


def test_a_host_whose_expert_takes_no_step_is_not_asked(experts):
    model, _, first, _, values, _ = experts
    asked = {**values, "sigmas": [1.0, 0.97, 0.95]}
    del asked["steps"]
    gone = {"denoise.transformer": first.url, "denoise.transformer_2": "http://127.0.0.1:9"}
    result = ditkit.load(model, placement=gone)(**asked)
    assert result.receipt["places"]["denoise"] == [first.url]
    same(result, ditkit.load(model)(**asked))
