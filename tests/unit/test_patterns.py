"""``rank_pattern`` and ``alpha_pattern`` of LoRAs: what peft finds, without its expressions."""

import re
import time

import pytest

from ditkit.checkpoints.lora.patterns import Patterns
from ditkit.errors import LoadError

NAMES = ["blocks.0.self_attn.q", "blocks.1.self_attn.q", "blocks.10.cross_attn.k_img", "ffn.0", "head.head", "q",
         "transformer.blocks.1.ffn.2", "xblocks.1.self_attn.q"]  # fmt: skip


def read(told):
    return Patterns.read("rank_pattern", told, lambda key, value, asked: None, "reading x")


def peft(told, name, default=None):
    """peft's ``get_pattern_key``."""
    return next((value for key, value in told.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@pytest.mark.parametrize("told", [
    {}, {"q": 1}, {"self_attn.q": 1, "q": 2}, {"q": 2, "self_attn.q": 1}, {"blocks.0.self_attn.q": 3, "ffn.0": 4},
    {"^blocks.1.self_attn.q": 1}, {"^q": 1, "q$": 2}, {r"blocks\.1\.self_attn\.q": 1}, {r"blocks.\d+.self_attn.q": 1},
    {"blocks.[0-9]+.self_attn.(q|k)": 1, "head": 2}, {r"^blocks\..*": 1}, {".*k_img": 1, "q": 2}, {"(q|ffn.0)": 1},
    {"self_attn.q|head": 1}, {"(?:blocks).*": 7}, {r"blocks\.[^.]*\.self_attn\.\w+": 1}, {"^.*": 5, "q": 6},
    {"ffn.*": 1, r"ffn\.0": 2}, {"x*blocks.1.self_attn.q": 1},
])  # fmt: skip
def test_the_same_as_peft(told):
    for name in NAMES:
        assert read(told).of(name, None) == peft(told, name), name


@pytest.mark.parametrize("pattern", [
    "((.*)*)*!", "(?:(?:.|.)*)+!", "[", "*.q", "(a", "a{2}", r"\1", "(?=a)b", "(a|b)" * 20, "a" * 300 + ".*", "(.*)+",
    r"\D", "[a-z]+", "a!",
])  # fmt: skip
def test_what_is_more_than_names_is_refused_at_once(pattern):
    begun = time.perf_counter()
    with pytest.raises(LoadError, match=r"reading x: rank_pattern has .* more than names with wildcards"):
        read({pattern: 4})
    assert time.perf_counter() - begun < 1


def test_wildcards_take_no_time():
    name, begun = "a" * 5000, time.perf_counter()
    assert read({".*a.*a.*a.*a.*a.*z": 1}).of(name, None) is None
    assert read({".*a.*a.*a.*a.*a.*": 1}).of(name, None) == 1
    assert time.perf_counter() - begun < 5


def test_a_table_is_a_table():
    for told in (["q"], "q", 5, True):
        with pytest.raises(LoadError, match=r"rank_pattern is .*, not a table"):
            read(told)
    assert read(None).of("q", 8) == 8
    with pytest.raises(LoadError, match="too many wildcards"):
        read({f"a{n}.*": 1 for n in range(300)})
