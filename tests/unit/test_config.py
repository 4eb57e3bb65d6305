"""Layers of settings: who wins, what a text means, what is refused and with which words."""

from __future__ import annotations

import pytest

from ditkit import config
from ditkit.config import FIELDS, Layer, from_text, settle, text_layer
from ditkit.errors import RequestError, SetupError
from ditkit.request import Request
from ditkit.setup import Setup


def typed(*pairs: str, literal: bool = False) -> Layer:
    split = [pair.partition("=") for pair in pairs]
    return text_layer((key, value, f"--set {key}", literal) for key, _, value in split)


def test_request_and_setup_share_no_name():
    assert not Request.model_fields.keys() & Setup.model_fields.keys()
    assert FIELDS.keys() == Request.model_fields.keys() | Setup.model_fields.keys()


def test_every_setting_says_where_its_default_comes_from():
    for key in FIELDS:
        ((origin, value),) = settle().explain(key)
        assert origin.startswith("default (")
        assert value == FIELDS[key].get_default()


def test_the_higher_layer_wins_and_all_are_told(tmp_path):
    (tmp_path / "c.toml").write_text("steps = 3\nwidth = 64\nguidance_scale = 2\n")
    layers = [
        Layer.of({"steps": 2, "width": 32, "height": 32}, "model tiny"),
        config.file_layer(tmp_path / "c.toml"),
        config.environment_layer({"DITKIT_STEPS": "4", "HOME": "/", "DITKIT_DTYPE": "float64"}),
        typed("steps=5"),
    ]
    settled = settle(*layers)
    request = settled.request()
    assert (request.steps, request.width, request.height, request.guidance_scale) == (5, 64, 32, 2.0)
    assert settled.setup().dtype == "float64"
    assert settled.explain("steps") == [
        ("default (Wan2.1 generate.py --sample_steps)", 50), ("model tiny", 2),
        (f"config file {tmp_path / 'c.toml'}", 3),
        ("environment DITKIT_STEPS", 4), ("--set steps", 5),
    ]  # fmt: skip
    assert settle(*layers[:2]).explain("steps")[-1][1] == 3


def test_a_table_replaces_and_an_entry_joins():
    below = Layer.of({"devices": {"vae": "cuda"}}, "file")
    assert settle(below, Layer.of({"devices": {"transformer": "cpu"}}, "file")).values["devices"] == {
        "transformer": "cpu"
    }
    joined = settle(below, typed("devices.transformer=cpu", "dtypes.vae=float32"))
    assert joined.values["devices"] == {"vae": "cuda", "transformer": "cpu"}
    assert joined.setup().dtypes == {"vae": "float32"}
    assert settle(below, typed("devices={}")).setup().devices == {}
    assert below.values == {"devices": {"vae": "cuda"}}, "a layer is left as it was"


@pytest.mark.parametrize(
    ("key", "text", "means"),
    [
        ("steps", "4", 4), ("guidance_scale", "3", 3), ("guidance_scale", "2.5", 2.5), 
        ("prompt", "a red circle", "a red circle"),
        ("prompt", "7", "7"), ("prompt", '"7"', "7"), ("prompt", '["a", "b"]', ["a", "b"]), ("seed", "[1, 2]", [1, 2]),
        ("sigmas", "[1.0, 0.5]", [1.0, 0.5]), ("sigmas", "none", None), ("threads", "None", None), ("threads", "2", 2),
        ("batched", "true", True), ("batched", "1", True), ("batched", "0", False), ("dtype", "float32", "float32"),
        ("scheduler_options", "{order = 2}", {"order": 2}), ("steps", "many", "many"),
        ("negative_prompt", "none", "none"),
        ("prompt", "a\nsteps = 3", "a\nsteps = 3"), ("batched", "yes", "yes"), ("steps", "2.0", 2.0),
    ],
)  # fmt: skip
def test_what_a_text_means(key, text, means):
    value = from_text(text, FIELDS[key].annotation)
    assert value == means
    assert type(value) is type(means)


def test_on_a_command_line_quotes_are_part_of_a_text():
    assert from_text('"7"', FIELDS["prompt"].annotation, literal=True) == '"7"'
    assert from_text("7", FIELDS["seed"].annotation, literal=True) == 7


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: typed("stpes=4"), ["--set stpes", "did you mean 'steps'"]),
        (lambda: typed("xyzzy=4"), ["no setting 'xyzzy'", "known ones are prompt"]),
        (lambda: typed("steps=4", "steps=5"), ["--set steps", "given before"]),
        (lambda: typed("devices.vae=cpu", "devices.vae=cuda"), ["given before"]),
        (lambda: typed("devices.vae=cpu", "devices={}"), ["given before"]),
        (lambda: typed("steps.x=4"), ["steps is not a table"]),
        (lambda: config.environment_layer({"DITKIT_STEP": "4"}), ["environment DITKIT_STEP", "did you mean 'steps'"]),
        (lambda: config.environment_layer({"DITKIT_": "4"}), ["environment DITKIT_", "no setting ''"]),
        (lambda: config.file_layer("nowhere.toml"), ["config file nowhere.toml", "no such file"]),
    ],
)
def test_what_is_refused(layer, words):
    with pytest.raises(SetupError) as error:
        layer()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 'many'", ["steps='many'", "c.toml", "integer"]),
        ("steps = true", ["steps=True", "c.toml", "integer"]),
        ("guidance_scale = nan", ["guidance_scale=nan", "c.toml", "finite"]),
        ("prompt = 3", ["prompt=3", "c.toml", "string"]),
        ("dtype = 'float31'", ["dtype='float31'", "c.toml", "float32"]),
        ("devices = {ave = 'cpu'}", ["devices", "c.toml", "no component 'ave'"]),
        ("sigmas = ['high']", ["sigmas", "c.toml", "number"]),
        ("threads = 0", ["threads=0", "c.toml", "greater than or equal to 1"]),
        ("step = 3", ["c.toml: step", "did you mean 'steps'"]),
        ("steps = ", ["c.toml", "not valid TOML"]),
    ],
)
def test_a_wrong_config_file_is_one_sentence_with_file_and_key(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)

    def use() -> None:
        settled = settle(config.file_layer(file))
        settled.setup()
        settled.request()

    with pytest.raises((SetupError, RequestError)) as error:
        use()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value).replace(str(error.value.found), "")


@pytest.mark.parametrize("values", [{"steps": 10_001}, {"steps": 10**12}, {"sigmas": [0.5] * 10_001}])
def test_a_run_has_an_end(values):
    with pytest.raises(RequestError, match=r"(equal to|at most) 10000"):
        Request.of(values)
