"""State: immutable, plain, and the same to the last bit after a trip through a file."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import child
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ditkit.errors import OutputError, StateError
from ditkit.state import FIELDS, SCHEMA, State, digest

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def content(state: State) -> dict:
    out: dict = {"fingerprints": dict(state.fingerprints)}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            out[name] = bits(value)
        elif isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            out[name] = {k: bits(v) for k, v in value.items()}
        else:
            out[name] = value
    return out


def trip(state: State) -> State:
    return State.from_bytes(state.to_bytes())


def full() -> State:
    g = torch.Generator().manual_seed(0)
    return State(
        {
            "prompt": ['Ein Kreis – 圆 🟥 \\ "quoted" \x00\x7f \u2028', ""],
            "seed": [0, 2**63 - 1],
            "sigmas": [1.0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0],
            "request": {"a": None, "b": [True, {"ü": 1}], "c": {}, "d": []},
            "latents": torch.randn(2, 16, 2, 3, 5, generator=g),
            "half": torch.randn(7, generator=g).bfloat16(),
            "empty": torch.zeros(0, 4),
            "scalar": torch.tensor(0.1, dtype=torch.float64),
            "history": {"x0_1": torch.randn(2, 3, generator=g), "sigma_1": torch.tensor(0.3, dtype=torch.float64)},
            "nothing": {},
        },
        {"latents": "abc", "seed": "def"},
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = full()
    assert content(trip(state)) == content(state)
    path = state.save(tmp_path / "deep" / "ünï.safetensors")
    assert content(State.load(path)) == content(state)
    assert [p.name for p in path.parent.iterdir()] == ["ünï.safetensors"]
    assert state.to_bytes() == full().to_bytes() == State.load(path).to_bytes()  # equal States are equal files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape(dtype, shape):
    raw = np.random.default_rng(1).integers(
        0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=np.uint8
    )
    tensor = torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(shape)  # any bits: NaN, infinities, -0
    state = State({"t": tensor, "group": {"t": tensor.clone()}})
    found = trip(state)
    assert bits(found["t"]) == bits(found["group"]["t"]) == bits(tensor)
    assert digest(found["t"]) == digest(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2],
        lambda t: t[1:2].expand(5, -1, -1),
        lambda t: t.requires_grad_(),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.flip(0),
    ],
)
def test_the_layout_in_memory_does_not_matter(view):
    tensor = view(torch.arange(24.0).reshape(2, 3, 4))
    assert bits(trip(State({"t": tensor}))["t"]) == bits(tensor)
    assert digest(tensor) == digest(tensor.detach().clone(memory_format=torch.contiguous_format))


def test_tensors_that_share_memory_are_saved_as_well():
    """Rows of one tensor, or one tensor under two names: a stage may write either."""
    whole = torch.arange(12.0).reshape(3, 4)
    state = State({"a": whole, "b": whole, "c": whole[1:], "history": {"x": whole[0], "y": whole}})
    assert content(trip(state)) == content(state)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
names = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, json_values, max_size=4))
def test_any_plain_value_comes_back(fields):
    state = State(fields)
    assert dict(state) == fields
    assert dict(trip(state)) == fields


# --- immutable and plain


def test_a_state_cannot_be_changed():
    given = {"prompt": ["a"], "request": {"x": [1]}, "history": {"x": torch.ones(2)}}
    prints = {"prompt": "p"}
    state = State(given, prints)
    before = content(state)
    given["prompt"].append("b")
    given["request"]["x"][0] = 2
    given["history"]["y"] = torch.ones(1)
    prints["prompt"] = "q"
    state["prompt"].append("c")
    state["request"]["x"].append(3)
    state["history"].clear()
    state.fingerprints["prompt"] = "r"
    state.fingerprints.clear()
    assert content(state) == before
    with pytest.raises(TypeError):
        state["prompt"] = ["d"]
    with pytest.raises(TypeError):
        del state["prompt"]
    assert content(state) == before


def test_with_and_without_fields():
    state = State({"a": 1, "b": 2, "history": {"x": torch.ones(1)}}, {"a": "1", "b": "2", "gone": "3"})
    assert state.fingerprints == {"a": "1", "b": "2"}  # of fields that are there, and no others
    changed = state.with_fields({"b": 3, "c": 4}, {"c": "4"})
    assert (dict(changed) | {"history": 0}, changed.fingerprints) == (
        {"a": 1, "b": 3, "c": 4, "history": 0},
        {"a": "1", "c": "4"},
    )
    fewer = changed.without("a", "history", "never there")
    assert (dict(fewer), fewer.fingerprints) == ({"b": 3, "c": 4}, {"c": "4"})
    assert (state["a"], state["b"], len(state)) == (1, 2, 3)
    with pytest.raises(KeyError):
        fewer["a"]


IMPOSSIBLE = [
    object(), {1, 2}, b"bytes", float("nan"), float("inf"), np.float32(1), np.ones(2), 1j, print,
    [torch.ones(1)], {"a": torch.ones(1), "b": 1}, {"a": {"b": torch.ones(1)}},
]  # fmt: skip


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=lambda v: type(v).__name__)
def test_only_tensors_and_plain_values(value):
    with pytest.raises(StateError, match="field 'x'"):
        State({"x": value})
    with pytest.raises(StateError, match="field 'x'"):
        State().with_fields({"x": value})


@pytest.mark.parametrize(
    "fields",
    [{"a/b": torch.ones(1)}, {"a/b": 1}, {"": 1}, {"g": {"": torch.ones(1)}}, {3: 1}, {"a": {1: torch.ones(1)}}],
)
def test_names_that_a_file_could_not_keep_apart(fields):
    with pytest.raises(StateError, match="name"):
        State(fields)


def test_what_it_tells_about_itself():
    state = full()
    assert "latents=float32[2, 16, 2, 3, 5]" in repr(state)
    assert "history={x0_1: float32[2, 3], sigma_1: float64[]}" in repr(state)
    assert len(repr(state)) < 1000


# --- digests


def test_digests_tell_contents_apart():
    ones = torch.ones(4)
    tensors = [
        ones,
        ones.double(),
        ones.reshape(2, 2),
        ones * 2,
        ones.int(),
        torch.ones(5),
        torch.ones(()),
        torch.ones(0),
    ]
    tensors += [torch.zeros(4), -torch.zeros(4)]
    groups = [{"a": ones}, {"b": ones}, {"a": ones, "b": ones}]
    different = [*tensors, *groups, 1, 1.5, "1", [1], [[1]], {"a": 1}, None, True, "", {}, []]
    assert len({digest(v) for v in different}) == len(different)
    assert digest(ones, 1) != digest(1, ones)
    assert digest("ab", "c") != digest("a", "bc")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": ones, "b": 2 * ones}) == digest({"b": 2 * ones, "a": ones.clone()})


@pytest.mark.slow
def test_digests_are_those_of_every_process():
    code = "import torch; from ditkit.state import digest; print(digest('x', torch.arange(5.0), {'ü': [1, 2.5]}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == digest("x", torch.arange(5.0), {"ü": [1, 2.5]})


# --- files that cannot be read


def refused(path, *parts: str) -> None:
    with pytest.raises(StateError) as error:
        State.load(path)
    for part in (f"loading a State from {path}", *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
    assert error.value.exit_code == 2


def test_every_truncation_is_noticed(tmp_path):
    data, path = full().to_bytes(), tmp_path / "s.safetensors"
    for length in [*range(0, len(data), 97), 1, 7, 8, 9, len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path)


def test_every_flipped_bit_is_found():
    """In the length, the description, names, shapes, padding or tensors; one of each byte, then some of the tensors."""
    state = State({"prompt": ["a cat \u00e9"], "seed": [1], "latents": torch.arange(6.0).reshape(1, 6), "step": 3,
                   "history": {"x": torch.ones(2), "empty": torch.ones(0)}}, {"latents": "f" * 8})  # fmt: skip
    data = state.to_bytes(summed=True)
    assert State.from_bytes(data).equal(state)
    draw = random.Random(0)
    for at in range(len(data)):
        for bit in {0, 5, draw.randrange(8)}:  # 5 changes the case of a letter
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(StateError):
                State.from_bytes(damaged)


def test_a_flipped_bit_in_a_file_names_the_file(tmp_path):
    path = full().save(tmp_path / "s.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(path, "it is damaged: what it holds is not what was written (checksum)")


def test_a_state_without_a_checksum_is_read():
    """Earlier versions wrote none, and what is checked on its way has none."""
    assert State.from_bytes(full().to_bytes()).equal(full())
    assert "latents" in State.load(Path(__file__).parents[1] / "data" / "earlier" / "half.safetensors")


def test_a_library_that_writes_it_anew_does_not_damage_it(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = full().save(tmp_path / "s.safetensors")
    with safe_open(path, "pt") as f:
        save_file({name: f.get_tensor(name) for name in f.keys()}, path, f.metadata())  # noqa: SIM118
    assert State.load(path).equal(full())


def test_a_file_larger_than_the_memory_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    path.touch()
    os.truncate(path, 2**42)

    def work():
        resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
        State.load(path)

    with pytest.raises(StateError, match="it is larger than the memory"):
        child(work)


@pytest.mark.parametrize("kind", ["device", "itself", "pipe", "nothing"])
def test_what_is_no_ordinary_file_is_refused(tmp_path, kind):
    path = tmp_path / "s.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "itself": path, "nothing": tmp_path / "x"}[kind])
    with pytest.raises(StateError, match=f"loading a State from {path}: "):
        State.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    refused(path, "No such file")
    refused(tmp_path)
    path.write_bytes(b"no safetensors file at all, but long enough for a header")
    refused(path)
    path.write_bytes(full().to_bytes() + b"!")
    refused(path)
    save_file({"x": torch.ones(1)}, path)
    refused(path, "without a ditkit State in it")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("not json", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        (
            json.dumps({"schema": SCHEMA + 1, "plain": {}, "fingerprints": {}}),
            f"version {SCHEMA + 1}; this ditkit reads version {SCHEMA}",
        ),
        (json.dumps({"schema": "1", "plain": {}, "fingerprints": {}}), "version 1"),
        (json.dumps({"schema": SCHEMA, "plain": [], "fingerprints": {}}), "damaged"),
        (json.dumps({"schema": SCHEMA, "plain": {}}), "damaged"),
        (json.dumps({"schema": SCHEMA, "plain": {"x": 1}, "fingerprints": {}}), "damaged"),
        (json.dumps({"schema": SCHEMA, "plain": {"g": 1}, "fingerprints": {}}), "damaged"),
        (json.dumps({"schema": SCHEMA, "plain": {}, "fingerprints": {"x": 1}}), "damaged"),
    ],
)
def test_damaged_descriptions_are_refused(tmp_path, header, part):
    """The last ones name a tensor or a group a second time as a plain value, and give a fingerprint that is none."""
    path = tmp_path / "s.safetensors"
    path.write_bytes(save({"x": torch.ones(1), "g/a": torch.ones(1)}, {"ditkit.state": header}))
    refused(path, part)


def test_a_name_in_two_roles_is_refused(tmp_path):
    path, header = tmp_path / "s.safetensors", json.dumps({"schema": SCHEMA, "plain": {}, "fingerprints": {}})
    path.write_bytes(save({"g": torch.ones(1), "g/a": torch.ones(1)}, {"ditkit.state": header}))
    refused(path, "damaged")
    for name in ("/a", "g/", "/"):
        path.write_bytes(save({name: torch.ones(1)}, {"ditkit.state": header}))
        with pytest.raises(StateError):
            State.load(path)


def test_a_state_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="that is a folder"):
        full().save(tmp_path)
    path = full().save(tmp_path / "s.safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="saving the State"):
        full().save(tmp_path / "file" / "s.safetensors")

    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        State({"a": 1}).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s.safetensors"]


def test_the_file_is_an_ordinary_safetensors_file(tmp_path):
    from safetensors import safe_open

    path = full().save(tmp_path / "s.safetensors")
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == {"latents", "half", "empty", "scalar", "history/x0_1", "history/sigma_1"}
        header = json.loads(f.metadata()["ditkit.state"])
    assert header["plain"]["seed"] == [0, 2**63 - 1]
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"].keys() == {"ditkit.state", "ditkit.crc32"}


def test_the_field_table_is_complete():
    for name, field in FIELDS.items():
        assert field.name == name
        assert field.kind in ("tensor", "tensors", "plain")
        assert field.text
        assert field.written_by
        assert "/" not in name


def test_importing_state_leaves_torch_alone():
    code = "import sys, ditkit.state; ditkit.state.State({'prompt': ['a']}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
