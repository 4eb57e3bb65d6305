"""The smallest input of each kind that once ended in an error which is none of ditkit's, in a hang, or in gigabytes.
Each is refused in one sentence that says what it is about, or is read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.targets.cache import _key, _result
from fuzz.watch import Refused, command, unclear
from safetensors.torch import save_file

import ditkit
from ditkit.checking import check_state
from ditkit.cli.main import main
from ditkit.errors import DitkitError
from ditkit.execution.stage import check_strides
from ditkit.reading import parse_json
from ditkit.runs import Run, listed
from ditkit.setup import Setup
from ditkit.state import State
from ditkit.store.cache import Cache

SIZE = {"width": 32, "height": 32, "frames": 5, "steps": 3}
SECONDS = 10


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def half(pipe):
    begun = pipe.begin(pipe.model.request({"prompt": "x", **SIZE}))
    return pipe.run(begun, stop_at_step=1).state


@pytest.fixture(scope="module")
def kept_run(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    Run.create(folder, pipe, "x", **SIZE).go(stop_at_step=1)
    return folder


@pytest.fixture
def at(tmp_path, monkeypatch):
    """The folder of one input; whoever takes too long is stopped."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DITKIT_")]:
        monkeypatch.delenv(name)

    def late(*_):
        pytest.fail(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(call, folder, named=True, saying=""):
    """``call`` ends in one sentence of ditkit's, which names a file of ``folder``."""
    with pytest.raises((DitkitError, Refused)) as caught:
        call()
    text = str(caught.value)
    assert unclear(text, folder, named) == "", text[:500]
    assert re.search(saying, text), text[:500]


# --- settings

DEEP = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    "line",
    [
        f"steps = {DEEP}",
        "steps = " + "9" * 5000,
        "timeout = " + "9" * 400,
        "width = 07:32:00",
        "height = 1979-05-27",
        "width = 'a'",
        "frames = {a = 1}",
        "negative_prompt = [1, {a = 2}]",
        "devices = {vae = 1979-05-27T07:32:00Z}",
        '"" = 1',
        f"debug = {[0] * 5000}",
        f"width = '{'x' * 100_000}'",
    ],
    ids=lambda line: line[:20],
)
def test_a_config(at, line):
    (at / "config.toml").write_text(f"{line}\n")
    refused(lambda: command("plan", "x", "--config", at / "config.toml"), at)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("sigmas", DEEP), ("steps", "9" * 5000), ("width", "07:32:00"), ("height", DEEP),
     ("frames", '{"a":' * 900 + "1" + "}" * 900),
     ("scheduler-options", DEEP)],
)  # fmt: skip
def test_a_flag(at, flag, value):
    refused(lambda: command("plan", "x", f"--{flag}", value), at, named=False, saying=flag.replace("-", "."))


@pytest.mark.parametrize("text", [f"name = {DEEP}\n", "version = " + "9" * 5000 + "\n", "name = 07:32:00\n"])
def test_a_template(at, text):
    (at / "template.toml").write_text(text)
    words = "x", "--expand-template", at / "template.toml", "--expander", "http://127.0.0.1:9/v1"
    refused(lambda: command("expand", *words), at)


def test_a_config_that_is_a_device_or_a_pipe(at):
    os.symlink("/dev/zero", at / "zero.toml")
    os.mkfifo(at / "pipe.toml")
    for name in ("zero.toml", "pipe.toml"):
        refused(lambda name=name: command("plan", "x", "--config", at / name), at)


# --- States


@pytest.mark.parametrize("key", ["", "\ud800", "\x00"])
def test_a_state_whose_request_has_a_key_that_is_none(at, half, key):
    refused(lambda: check_state(half.with_fields({"request": {**half["request"], key: 1}})), at, named=False)


def _without(key):
    return lambda half: {"request": {k: v for k, v in half["request"].items() if k != key}}


def _record_without(key):
    def fields(half):
        records = half["records"]
        del records["encode_text"][key]
        return {"records": records}

    return fields


@pytest.mark.parametrize(
    "change",
    [
        lambda half: {"request": {**half["request"], "steps": "x"}},
        _without("frames"), _without("height"), _without("guidance_scale"), _without("prompt"),
        lambda half: {"request": "x"}, lambda half: {"request": [1]},
        _record_without("inputs"), _record_without("settings"),
        lambda half: {"records": {"encode_text": 5}},
        lambda half: {"stages": 5}, lambda half: {"prompt": 5}, lambda half: {"prompt": []},
        lambda half: {"seed": ["a"]},
        lambda half: {"model": {"name": 5}}, lambda half: {"model": {}},
        lambda half: {"model": {"name": "x", "parts": 5}},
        lambda half: {"step": 1.5}, lambda half: {"sigmas": "x"},
    ],
)  # fmt: skip
def test_a_state_that_is_gone_on_from(at, tiny_model, half, change):
    half.with_fields(change(half)).save(at / "half.safetensors")
    words = "--from", at / "half.safetensors", "--model", tiny_model, "--out", at / "o.npz"
    refused(lambda: command("run", *words), at)


def test_a_state_of_deep_values(at, half):
    data = half.to_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = header["__metadata__"]["ditkit.state"]
    for deep in ("[" * 300 + "]" * 300, "[" * 100_000 + "]" * 100_000, "9" * 5000):
        header["__metadata__"] = {"ditkit.state": about.replace('"plain": {', f'"plain": {{"x": {deep}, ', 1)}
        text = json.dumps(header).encode()
        (at / "deep.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        refused(lambda: State.load(at / "deep.safetensors"), at)


# --- runs


def _changed(folder, kept, change):
    run = Path(shutil.copytree(kept, folder / "run", symlinks=True))
    about = json.loads((run / "run.json").read_text())
    change(about)
    (run / "run.json").write_text(json.dumps(about))
    return run


def _two_clips(about):
    about["clips"] = 2
    about["request"] |= {"prompt": ["a", "b"], "steps": "x"}


@pytest.mark.parametrize(
    "change",
    [
        _two_clips,
        lambda about: about["request"].pop("frames"),
        lambda about: about["request"].update(seed={}),
        lambda about: about.update(clips=10**9),
        lambda about: about.update(clips=0),
        lambda about: about.update(every=0),
        lambda about: about.update(steps=-1),
        lambda about: about["setup"].update(plugs=5),
        lambda about: about["setup"].update(nothing=1),
        lambda about: about["request"].update(prompt=["a", "b"], seed=[1, 2, 3]),
    ],
)
def test_a_run_whose_description_is_odd(at, kept_run, change):
    run = _changed(at, kept_run, change)
    refused(lambda: command("fork", run, "--set", "guidance_scale=3", "--run", at / "forked"), at)
    refused(lambda: command("run", "--resume", run), at)
    assert [each.progress for each in listed(at)] == ["damaged"]


def test_a_run_of_an_earlier_version_is_forked(at, kept_run):
    run = _changed(at, kept_run, lambda about: about["request"].pop("expand_max_tokens"))
    command("fork", run, "--set", "guidance_scale=3", "--run", at / "forked", "--out", at / "o.npz", "--no-sheet")


def test_a_kept_state_that_is_a_link_to_nothing(at, kept_run):
    run = _changed(at, kept_run, lambda about: None)
    os.symlink("nowhere", run / "states" / "run-000009.safetensors")
    command("run", "--resume", run, "--out", at / "o.npz", "--no-sheet")


def test_a_temporary_file_that_is_a_link_to_a_folder(at, kept_run, pipe):
    run = _changed(at, kept_run, lambda about: None)
    os.symlink("..", run / ".x.tmp")
    Run.open(run, pipe).go()
    assert (run / "run.json").exists()


@pytest.mark.parametrize("name", ["run.json", "states"])
def test_a_run_with_a_link_to_itself(at, kept_run, name):
    run = _changed(at, kept_run, lambda about: None)
    shutil.rmtree(run / name) if name == "states" else (run / name).unlink()
    os.symlink(name, run / name)
    refused(lambda: command("run", "--resume", run), at)
    assert [each.progress for each in listed(at)] == ["damaged"]


def test_one_folder_that_cannot_be_entered_hides_no_other_run(at, kept_run):
    _changed(at, kept_run, lambda about: None)
    os.symlink("loop", at / "loop")
    (at / "file").write_text("x")
    assert "step 1 of 3" in [each.progress for each in listed(at)]


# --- the cache


@pytest.fixture
def cache(at):
    found = Cache(at / "cache", 10**6)
    found.store(_key(1), _result(1))
    return found


def _rows(cache, text, *values):
    db = sqlite3.connect(cache.results.parent / "index.sqlite", isolation_level=None)
    db.execute(text, values)
    db.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [("size", "x"), ("size", -5), ("file", b"\xff"), ("file", "a\0b"), ("file", ""), ("file", "../../x"),
     ("about", "[" * 100_000),
     ("about", "9" * 5000), ("about", "5"), ("made", 1e308), ("made", "x"), ("machine", b"\xff"), ("sha256", 5),
     ("machine", "x" * 100_000)],
)  # fmt: skip
def test_a_row_of_the_cache(cache, column, value):
    _rows(cache, f"UPDATE entries SET {column} = ?", value)
    found, why = cache.find(_key(1))
    assert found is None or column in ("size", "machine", "made")
    assert len(why) <= 2000
    assert isinstance(cache.find(_key(2))[1], str)
    assert cache.store(_key(3), _result(3)) == "" or column == "about"
    cache.trim()
    assert cache.clear() >= 0


@pytest.mark.parametrize("end", ["", "-wal"])
def test_a_pipe_for_the_index_of_the_cache(at, end):
    (at / "cache" / "v1").mkdir(parents=True)
    os.mkfifo(at / "cache" / "v1" / f"index.sqlite{end}")
    found = Cache(at / "cache", 10**6)
    assert "no ordinary file" in found.fault
    assert found.find(_key(1))[0] is None
    assert found.clear() == 0


@pytest.mark.parametrize("file", [b"\xff", "a\0b", "../../x"])
def test_a_row_of_the_cache_whose_file_is_gone(cache, file):
    _rows(cache, "UPDATE entries SET file = ?", file)
    cache._drop(1, "of this test")
    assert cache.contents() == {}


def test_a_remembered_hash_that_is_none(at):
    from ditkit.store.hashes import Hashes

    file = at / "x"
    file.write_text("x")
    os.utime(file, (1, 1))
    one = Hashes()
    one.keep_in(at)
    right = one.of(file)
    for value in (b"\xff", 5, "x", "A" * 64):
        stamp = f"{file.stat().st_size} {file.stat().st_mtime_ns} {file.stat().st_ctime_ns} {file.stat().st_ino}"
        with sqlite3.connect(at / "hashes.sqlite") as db:
            db.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (str(file), stamp, value))
        db.close()
        other = Hashes()
        other.keep_in(at)
        assert other.of(file) == right


# --- models


@pytest.mark.parametrize("size", ["inf", "nan", "-1", "1.5", "'3'", "true", "9999999999999999999"])
def test_a_lock_of_odd_sizes(at, size):
    (at / "ditkit.toml").write_text('[components]\nvae = "x"\n')
    (at / "ditkit.lock").write_text(
        f'version = 1\n[components.vae]\nplace = "x"\n[components.vae.files]\n"a" = {{ size = {size}, sha256 = "x" }}\n'
    )
    refused(lambda: command("lock", "--check", at), at)


@pytest.mark.parametrize(
    "line", ["place = 5", "revision = 5", "files = 5", "files = {a = 5}", "files = {a = {size = 1}}"]
)
def test_a_lock_of_odd_values(at, line):
    (at / "ditkit.toml").write_text('[components]\nvae = "x"\n')
    whole = {"place": '"x"', "files": "{}"} | dict([line.split(" = ", 1)])
    lines = [f"{key} = {value}" for key, value in whole.items()]
    (at / "ditkit.lock").write_text("\n".join(["version = 1", "[components.vae]", *lines]))
    refused(lambda: command("lock", "--check", at), at)


def test_a_config_of_400_digits(at, tiny_model):
    model = Path(shutil.copytree(tiny_model / "text_encoder", at / "text_encoder"))
    about = json.loads((model / "config.json").read_text())
    text = json.dumps(about).replace(
        f'"layer_norm_epsilon": {about["layer_norm_epsilon"]}', '"layer_norm_epsilon": 1' + "0" * 400
    )
    (model / "config.json").write_text(text)
    refused(lambda: command("inspect", model), at)


def test_a_scheduler_that_is_a_file(at, tiny_model):
    model = Path(shutil.copytree(tiny_model, at / "model"))
    shutil.rmtree(model / "scheduler")
    (model / "scheduler").write_text("x")
    refused(lambda: command("plan", "x", "--model", model), at)


def test_a_checkpoint_with_encrypted_records(at):
    from ditkit.checkpoints.files.opening import open_source

    out = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, out)
    data = bytearray(out.getvalue())
    place = data.find(b"PK\1\2")
    while place >= 0:
        data[place + 8] |= 1
        place = data.find(b"PK\1\2", place + 4)
    (at / "weights.pth").write_bytes(data)
    refused(lambda: open_source(at / "weights.pth"), at)


@pytest.mark.parametrize("leaf", [{"w": torch.zeros(2)}, {"w": 1}])
def test_a_checkpoint_of_dictionaries_in_each_other(at, leaf):
    from ditkit.checkpoints.files.opening import open_source

    for _ in range(60):
        leaf = {"x": leaf, "y": leaf}
    torch.save(leaf, at / "weights.pth")
    refused(lambda: open_source(at / "weights.pth"), at)


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer.alpha_pattern": "x", "transformer.r": 4}, {"transformer.lora_alpha": "x", "transformer.r": 4},
        {"transformer.rank_pattern": {"[": 4}}, {"transformer.rank_pattern": {"((.*)*)*!": 4}}, {"transformer.r": [4]},
    ],
)  # fmt: skip
def test_a_lora_of_odd_settings(at, tiny_model, pipe, settings):
    from ditkit.assembly import Components

    name = "transformer.blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(64, 4)}
    save_file(factors, at / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    setup = Setup.of({"model": str(tiny_model), "loras": [str(at / "lora.safetensors")]})
    refused(lambda: Components(pipe.model, setup), at)


# --- clips and pictures


def _card(folder, **more):
    card = {"ditkit_clip": 1, "suffix": ".mp4", "fps": 16, "frames": 5, "frames_sha256": "x", **more}
    (folder / "card.json").write_text(json.dumps(card))
    return folder / "card.json"


@pytest.mark.parametrize(
    "more", [{}, {"manifest": "x"}, {"manifest": 5.0}, {"manifest": []}, {"manifest": {"manifest": []}}]
)
def test_a_card_without_a_manifest(at, more):
    from ditkit.replay import read

    refused(lambda: read(_card(at, **more)), at)


def test_a_manifest_with_half_a_character_or_without_a_setting(at, pipe):
    from ditkit.replay import read

    result = pipe("x", **{**SIZE, "steps": 1})
    result.save(at / "clip.npz")
    card = json.loads((at / "clip.json").read_text())
    (at / "clip.npz").unlink()
    for change in (lambda m: m["setup"].update({"\ud800": 1}), lambda m: m["request"].pop("frames")):
        other = json.loads(json.dumps(card))
        change(other["manifest"])
        (at / "clip.json").write_text(json.dumps(other))
        refused(lambda: read(at / "clip.json"), at)


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


FRAMES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("fps", [np.array([1, 2]), np.array("x"), np.array(None, dtype=object)])
def test_an_npz_whose_rate_is_none(at, fps):
    from ditkit.media import read_video

    refused(lambda: read_video(_npz(at / "clip.npz", video=FRAMES, fps=fps)), at)


def test_an_npz_that_is_an_npy(at):
    from ditkit.media import read_video

    with (at / "clip.npz").open("wb") as file:
        np.save(file, FRAMES)
    refused(lambda: read_video(at / "clip.npz"), at)


def test_an_npz_with_a_damaged_stream(at):
    from ditkit.media import read_video

    noise = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    np.savez_compressed(at / "clip.npz", video=noise, fps=1.0)
    data = bytearray((at / "clip.npz").read_bytes())
    data[200:260] = b"\xff" * 60
    (at / "clip.npz").write_bytes(data)
    refused(lambda: read_video(at / "clip.npz"), at)


def test_an_npz_that_claims_terabytes(at):
    from ditkit.media import read_video

    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(at / "clip.npz", "w") as archive:
        archive.writestr("video.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        archive.writestr("fps.npy", (at / "x").read_bytes() if (at / "x").exists() else b"")
    refused(lambda: read_video(at / "clip.npz"), at)


def test_an_mp4_of_an_unknown_codec(at):
    from ditkit.media import read_video, write_video

    write_video(at / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8), 16)
    data = bytearray((at / "clip.mp4").read_bytes())
    place = data.find(b"avc1", data.find(b"stsd"))
    data[place : place + 4] = b"zzzz"
    (at / "clip.mp4").write_bytes(data)
    refused(lambda: read_video(at / "clip.mp4"), at)


@pytest.mark.parametrize(
    "change", [(b'"fps":16', b'"fps":""'), (b'"fps":16', b'"fps":[]'), (b'"frames":2', b'"frames":9')]
)
def test_a_gif_whose_card_is_odd(at, change):
    from ditkit.media import read_video, write_video

    write_video(at / "clip.gif", FRAMES, 16)
    data = (at / "clip.gif").read_bytes()
    assert change[0] in data
    (at / "clip.gif").write_bytes(data.replace(*change))
    refused(lambda: read_video(at / "clip.gif"), at)


def test_a_gif_of_65535_pixels_each_way(at):
    from ditkit.media import read_video, write_video

    write_video(at / "clip.gif", FRAMES, 16)
    data = bytearray((at / "clip.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    (at / "clip.gif").write_bytes(data)
    refused(lambda: read_video(at / "clip.gif"), at)


def test_a_folder_of_frames_whose_rate_is_a_list(at, monkeypatch):
    from ditkit.media import card, read_video, write_video

    line = card.line
    monkeypatch.setattr(card, "line", lambda each: line({**each, "fps": []}))
    write_video(at / "clip.png", FRAMES, 16)
    refused(lambda: read_video(at / "clip"), at)


def test_a_tiff_without_dimensions(at):
    from PIL import Image

    from ditkit.media import read_image

    Image.new("RGB", (8, 8)).save(at / "a.tiff")
    data = bytearray((at / "a.tiff").read_bytes())
    (ifd,) = struct.unpack("<I", data[4:8])
    data[ifd + 2 : ifd + 4] = struct.pack("<H", 0xFFF0)  # the entry of the width under another tag
    (at / "a.tiff").write_bytes(data)
    refused(lambda: read_image(at / "a.tiff"), at)


# --- JSON, names and the command line


@pytest.mark.parametrize("text", ["[" + "[]," * 5_000_000 + "[]]", "[" + "[[[[[]]]]]," * 1_000_000 + "[]]"])
def test_more_values_than_fit(at, text):
    refused(lambda: parse_json(text, f"reading {at}"), at, saying="more than 4,194,304 values")


@pytest.mark.parametrize("make", [lambda name: ["run", "--from", name], lambda name: ["inspect", name],
                                  lambda name: ["generate", "x", "--model", name],
                                  lambda name: ["generate", "x", "--model", "shapes", "--vae", name],
                                  lambda name: ["generate", "x", "--model", "shapes", "--lora", name],
                                  lambda name: ["generate", "x", "--model", "shapes", "--out", name],
                                  lambda name: ["run", "--resume", name], lambda name: ["fork", name],
                                  lambda name: ["runs", name], lambda name: ["replay", name],
                                  lambda name: ["convert", name, "out"], lambda name: ["convert", "shapes", name],
                                  lambda name: ["lock", name],
                                  lambda name: ["cache", "show", "--cache", name]])  # fmt: skip
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "~nobody_at_all/x"])
def test_a_name_that_no_system_has(at, make, name):
    with contextlib.suppress(Refused):
        command(*make(name))


def test_a_mistake_at_the_command_line_is_short(capsys):
    assert main(["generate", f"--{'x' * 100_000}"]) == 2
    assert len(capsys.readouterr().err) < 3000


def test_an_error_of_a_state_names_its_file(at, half, tiny_model):
    half.with_fields({"request": {**half["request"], "height": 40}}).save(at / "half.safetensors")
    words = "--from", at / "half.safetensors", "--model", tiny_model, "--out", at / "o.npz"
    refused(lambda: command("run", *words), at, saying="half.safetensors")


def test_a_tensor_with_half_a_character_for_a_name(at, half):
    data = half.to_bytes().replace(b'"latents":', b'"\\ud800x":')
    refused(lambda: State.from_bytes(data, str(at)), at, saying="not a complete")


def test_a_shape_with_a_list_in_it(at, half):
    data = half.to_bytes().replace(b'"shape":[1,16,', b'"shape":[[16],')
    refused(lambda: State.from_bytes(data, str(at)), at, saying="no such shape")


def test_a_stride_for_each_side():
    with pytest.raises(ValueError, match="one stride"):
        check_strides((4, 8, 9))


# --- what a host says


def test_an_outcome_without_plugs(at):
    from ditkit.placement.job import state_to_outcome

    state = State({"outcome": {"settings": {}, "stopped": False, "seconds": 1.0, "cacheable": True}})
    with contextlib.suppress(DitkitError):  # a stage that never asked for the seams is no fault
        state_to_outcome(state)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tokenizer", {"kind": "tokenizer", "config": {}, "identity": "x", "notes": 5}),
        ("transformer", {"kind": "wan", "config": {"num_heads": 0}, "identity": "x"}),
        ("transformer", {"kind": "wan", "config": {"num_heads": "a"}, "identity": "x"}),
        ("transformer", {"kind": "wan", "config": {"patch_size": [1]}, "identity": "x"}),
        ("vae", 5),
    ],
)
def test_what_a_host_says_of_a_part(at, name, told):
    from ditkit.models.wan import WanConfig
    from ditkit.placement.remote_parts import part_of

    if isinstance(told, dict) and told["config"]:
        told = {**told, "config": {**asdict(WanConfig()), **told["config"]}}
    refused(lambda: part_of(name, told, "http://host:1"), at, named=False, saying="host:1")


# --- words


def test_a_prompt_with_a_byte_that_is_no_utf8(at, tiny_model):
    words = "caf\udce9", "--run", at / "kept", "--model", tiny_model
    refused(lambda: command("run", *words), at, named=False, saying="prompt|PROMPT|UTF-8")
    assert not (at / "kept").exists()
