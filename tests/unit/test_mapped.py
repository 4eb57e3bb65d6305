"""A source seen through a key table: what is cut, joined and reshaped, and what is refused."""

import pytest
import torch
from held import Held, shapes

from ditkit.checkpoints.kinds.clip import clip_keys
from ditkit.checkpoints.kinds.umt5 import umt5_keys
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.views.key_table import KeyTable, Rule
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.errors import LoadError

TABLE = KeyTable.of(
    [("a", "x")],
    Rule(("fused",), ("q", "k", "v")),
    Rule(("gate", "up"), ("both",)),
    Rule(("row",), ("flat",), ones=2),
    aliases={"x2": "x"},
    ignored_native=("beside.", "note"),
    ignored_other=("buffer",),
)


def native() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"up": (2, 5), "a": (3,), "fused": (6, 4), "gate": (2, 5), "row": (1, 1, 7)}
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()}


def test_each_operation_against_plain_torch():
    n = native()
    there = dict(Mapped(Held(n), TABLE, "other"))
    q, k, v = n["fused"].chunk(3)
    expected = {"x": n["a"], "q": q, "k": k, "v": v, "both": torch.cat([n["gate"], n["up"]])}
    expected |= {"flat": n["row"][0, 0]}
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[name], expected[name]) for name in expected)
    assert all(tensor.is_contiguous() for tensor in there.values())


def test_the_way_back_is_bit_equal():
    n = native()
    back = dict(Mapped(Mapped(Held(n), TABLE, "other"), TABLE, "native"))
    assert back.keys() == n.keys()
    assert all(torch.equal(back[name], n[name]) for name in n)


@pytest.mark.parametrize("to", ["native", "other"])
def test_facts_are_those_of_the_data_and_need_none(to):
    source = Held(native() if to == "other" else dict(Mapped(Held(native()), TABLE, "other")))
    mapped = Mapped(source, TABLE, to)
    told = shapes(mapped)
    assert not source.read
    assert told == {name: tuple(tensor.shape) for name, tensor in mapped}
    assert {facts.dtype for facts in mapped.tensors.values()} == {"F32"}


def test_one_group_at_a_time_is_read():
    source = Held(native())
    for name, tensor in Mapped(source, TABLE, "other"):
        expected = {"both": {"gate", "up"}, "x": {"a"}, "flat": {"row"}, "tall": {"wide"}}.get(name, {"fused"})
        assert set(source.read) == expected
        source.read.clear()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, "a share holds on to the whole"


def test_what_is_ignored_is_listed_and_what_is_unknown_too():
    mapped = Mapped(Held(native() | {"beside.b": torch.zeros(1), "note": torch.zeros(1)}), TABLE, "other")
    assert mapped.ignored == ("beside.b", "note")
    assert mapped.require_known() is mapped
    mapped = Mapped(Held(native() | {"fuse": torch.zeros(1), "notes": torch.zeros(1)}), TABLE, "other")
    assert mapped.unknown == ("fuse", "notes")
    assert {"fuse", "notes"} < mapped.tensors.keys()
    with pytest.raises(LoadError, match=r"2 tensors are unknown \(fuse, notes\) \(did you mean 'fused'\?\)"):
        mapped.require_known()


def test_unknown_tensors_fail_a_load():
    module = torch.nn.Linear(2, 2)
    table = KeyTable.of([("w", "weight"), ("b", "bias")])
    tensors = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    load_into(module, Mapped(Held(tensors), table, "other"))
    assert module.weight.sum() == 4
    with pytest.raises(LoadError, match="1 tensors are unknown to the model"):
        load_into(module, Mapped(Held(tensors | {"c": torch.ones(1)}), table, "other"))


def test_a_mixture_of_layouts_is_refused():
    with pytest.raises(LoadError, match=r"1 tensors are there in both layouts \(x\)"):
        Mapped(Held(native() | {"x": torch.zeros(3)}), TABLE, "other")


@pytest.mark.parametrize("spelling", [("x",), ("x2",), ("x", "x2"), ("x2", "x")])
def test_a_second_name_counts_as_the_first(spelling):
    value = torch.arange(3.0)
    mapped = Mapped(Held(dict.fromkeys(spelling, value)), TABLE, "native")
    assert [name for name, _ in mapped] == ["a"]
    assert torch.equal(mapped["a"], value)


def test_two_names_must_hold_the_same():
    mapped = Mapped(Held({"x": torch.zeros(3), "x2": torch.ones(3)}), TABLE, "native")
    with pytest.raises(LoadError, match="x2 differs from x"):
        mapped["a"]


@pytest.mark.parametrize(("to", "tensors", "message"), [
    ("other", {"gate": (2, 2)}, "both is made of gate, up, and there is no up"),
    ("other", {"gate": (2, 2), "up": (2, 3)}, "gate, up differ in type or shape"),
    ("other", {"fused": (4, 3)}, r"fused has the shape \[4, 3\] and cannot be cut into 3"),
    ("other", {"row": (1, 2, 7)}, r"row has the shape \[1, 2, 7\], not 2 leading axes of 1"),
    ("native", {"q": (2, 2), "k": (2, 2)}, "fused is made of k, q, v, and there is no v"),
])  # fmt: skip
def test_shapes_that_do_not_fit_a_rule(to, tensors, message):
    with pytest.raises(LoadError, match=message):
        Mapped(Held({name: torch.zeros(shape) for name, shape in tensors.items()}), TABLE, to)


def test_a_group_of_two_types_is_never_joined_silently():
    with pytest.raises(LoadError, match="differ in type"):
        Mapped(Held({"gate": torch.zeros(2), "up": torch.zeros(2).bfloat16()}), TABLE, "other")


def test_one_layout_alone_without_what_is_ignored():
    tensors = {"x2": torch.ones(3), "q": torch.ones(2, 4), "buffer": torch.zeros(1), "other": torch.zeros(1)}
    mapped = Mapped(Held(tensors), TABLE, "other", of="other")
    assert (list(mapped.tensors), mapped.ignored, mapped.unknown) == (["x", "q", "other"], ("buffer",), ("other",))
    mapped = Mapped(Held(native() | {"note": torch.zeros(1)}), TABLE, "native", of="native")
    assert mapped.tensors.keys() == native().keys()
    assert mapped.ignored == ("note",)


def test_rules_do_one_thing():
    with pytest.raises(ValueError, match="does one thing"):
        Rule(("a", "b"), ("c",), ones=1)
    with pytest.raises(ValueError, match="does one thing"):
        Rule(("a", "b"), ("c", "d"))
    with pytest.raises(TypeError, match="more than rename"):
        dict(clip_keys(1).to_other)
    with pytest.raises(ValueError, match="twice"):
        KeyTable.of([("a", "x"), ("b", "x")])


def test_it_stands_for_the_files_below():
    source = Held({"token_embedding.weight": torch.zeros(2, 2)}, {"note": "1"})
    mapped = Mapped(source, umt5_keys(1), "other")
    told = (mapped.path, mapped.files, mapped.metadata, mapped.sha256, mapped.fingerprint, mapped.sketch)
    assert told == (source.path, (), {"note": "1"}, {}, "fingerprint", "sketch")


def test_fused_projections_are_rows_one_after_the_other():
    g = torch.Generator().manual_seed(1)
    table = KeyTable.of([], Rule(("k.weight", "v.weight"), ("to_kv.weight",)))
    n = {name: torch.randn(4, 4, generator=g) for name in ("k.weight", "v.weight")}
    fused = dict(Mapped(Held(n), table, "other").require_known())
    assert torch.equal(fused["to_kv.weight"], torch.cat([*n.values()]))
    back = dict(Mapped(Held(fused), table, "native"))
    assert back.keys() == n.keys()
    assert all(torch.equal(back[name], n[name]) for name in n)
