"""Opening a model: what is damaged or does not fit together is said before anything is computed."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.assembly import Model
from ditkit.checkpoints.files.stored import file_sample
from ditkit.errors import LoadError, StateError

WEIGHTS = {
    "transformer": ("diffusion_pytorch_model.safetensors", "blocks.1.ffn.net.2.bias", "blocks.1.ffn.2.bias"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", "decoder.head.2.bias"),
    "text_encoder": (
        "model.safetensors",
        "encoder.final_layer_norm.weight",
        "encoder.final_layer_norm.weight",
    ),
}


@pytest.fixture
def copied(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, part: str, value: float) -> None:
    """One number of one tensor gets another value; everything else stays."""
    file, name, _ = WEIGHTS[part]
    tensors = load_file(folder / part / file)
    tensors[name][1] = value
    save_file(tensors, folder / part / file)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copied, part, value):
    change(copied, part, value)
    with pytest.raises(LoadError, match=f"{WEIGHTS[part][2]} holds infinite or undefined numbers"):
        ditkit.load(copied).components[part]


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("text_encoder", "d_model", 48, "d_model is 48 in the config and 32 in shared.weight"),
        ("transformer", "in_channels", 36, "in_channels is 36 in the config and 16 in patch_embedding.weight"),
        ("transformer", "out_channels", 32, "out_channels is 32 in the config and 16 in proj_out.weight"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_at_once(copied, part, key, value, said):
    file = copied / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(LoadError, match=said):
        ditkit.load(copied)


ROWS = "factors = [" + "[1, 2, 3]," * 16 + "]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[preview]\n", "16 rows of 3 numbers"),
        (f"[preview]\n{ROWS}", "bias, 3 numbers"),
        (f"[preview]\n{ROWS}bias = [1, 2]\n", "bias, 3 numbers"),
        (f"[preview]\n{ROWS}bias = [1, 2, nan]\n", "bias, 3 numbers"),
        (f"[preview]\n{ROWS}bias = [1, 2, true]\n", "bias, 3 numbers"),
        (f"[preview]\n{ROWS}bias = [1, 2, 3]\nscale = 2\n", "does not consist of"),
        ("[preview]\nfactors = [[1, 2, 3]]\nbias = [1, 2, 3]\n", "16 rows of 3 numbers"),
        ("defaults = 3\n", "defaults is 3, not a table"),
        ("[[preview]]\n", "not a table"),
        ("[defaults]\nstps = 4\n", "did you mean 'steps'"),
        ("[defaults]\nsteps = 'four'\n", "steps='four'"),
        ("[defaults]\nwidth = 30\n", "width=30"),
        ("[defaults]\nframes = 6\n", "frames=6"),
        ("[defaults]\nprompt = ['a', 'b']\nseed = [1, 2, 3]\n", "the lengths differ"),
        ("[default]\n", "unknown table 'default'"),
        ("x = 1 2\n", "not valid TOML"),
        (f"x = {'[' * 5000}{']' * 5000}\n", "within each other"),
    ],
)
def test_damaged_notes_are_refused_with_the_name_of_the_file(copied, text, said):
    (copied / "ditkit.toml").write_text(text)
    with pytest.raises(LoadError) as error:
        ditkit.load(copied)
    assert said in str(error.value)
    assert str(copied / "ditkit.toml") in str(error.value)


def test_notes_that_are_right_are_used(copied):
    (copied / "ditkit.toml").write_text(f"[defaults]\nguidance_scale = 3\n[preview]\n{ROWS}bias = [1, 2.5, 3]\n")
    model = ditkit.load(copied).model
    assert model.request({"prompt": "a", "width": 32, "height": 32, "frames": 5}).guidance_scale == 3.0
    assert model.latents_rgb == (((1, 2, 3),) * 16, (1, 2.5, 3))


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_json_that_is_nested_too_deeply(copied, file):
    (copied / file).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(LoadError, match=f"{file}: it is not valid JSON .more than 64 tables or lists"):
        ditkit.load(copied)


def test_a_header_that_is_nested_too_deeply(copied):
    file = copied / "vae" / WEIGHTS["vae"][0]
    header = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(LoadError, match=f"{file.name}: its header cannot be understood"):
        ditkit.load(copied).components["vae"]


def test_the_name_of_a_model(copied, monkeypatch):
    assert ditkit.load(copied / "model_index.json").model.path == copied  # an index is a manifest
    monkeypatch.chdir(copied)
    for name in ("", "~nobody-of-that-name/model", "x\0y", "x" * 5000):
        with pytest.raises(LoadError, match=r"no folder, no file and no model of that name|the control character 0x00"):
            Model.open(name)
    monkeypatch.setenv("HOME", str(copied.parent))
    assert Model.open(f"~/{copied.name}").path == copied


def test_a_state_belongs_to_the_weights_not_to_their_place(tiny_model, copied):
    begun = ditkit.load(tiny_model)
    state = begun.begin(begun.model.request({"prompt": "a red circle"}))
    assert ditkit.load(copied).run(state, until="encode_text").state["model"] == state["model"]
    encoded = begun.run(state, until="encode_text").state
    for part in WEIGHTS:
        other = Path(shutil.copytree(copied, copied.with_name(part)))
        change(other, part, 0.5)
        if part == "vae":  # nothing came from it yet
            assert ditkit.load(other).run(encoded, until="encode_text").state.equal(encoded)
            continue
        with pytest.raises(StateError, match=f"begun with another model, .*, which has another {part}"):
            ditkit.load(other).run(encoded, until="encode_text")
    with (copied / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(StateError, match=r"begun with another model, .* which has another tokenizer"):
        ditkit.load(copied).run(encoded, until="encode_text")


def test_samples_of_a_file_cover_both_ends_and_its_size(tmp_path):
    file, data = tmp_path / "x", bytearray(1_000_000)
    seen = set()
    for place in (None, 0, 16_383, 500_000, 999_999):
        changed = bytearray(data)
        if place is not None:
            changed[place] = 1
        file.write_bytes(changed)
        seen.add(file_sample(file))
    for size in (0, 5, 999_999):
        file.write_bytes(data[:size])
        seen.add(file_sample(file))
    assert len(seen) == 8


def test_a_part_without_weights(copied):
    (copied / "vae" / WEIGHTS["vae"][0]).unlink()
    with pytest.raises(LoadError, match=r"it holds no \.safetensors file"):
        ditkit.load(copied)
