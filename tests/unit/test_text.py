"""Cleaning and tokenizing: equal to Wan's rules, and to transformers on the same tokenizer.json."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ditkit.contracts import Tokenizer as TokenizerContract
from ditkit.errors import LoadError
from ditkit.models.text import WanTokenizer, clean

SENTENCES = ["a red circle moving left on a black background", "a blue square, moving right!", "0123456789 up & down"]
PROMPTS = [
    "a red circle",
    "",
    "   ",
    "  a \t blue\n\nsquare  ",
    "&amp;amp; up &lt; down",
    "émoji 🙂 漢字 ﬁne",
    "a </s> b <extra_id_0> <pad> <s> c",
    "x" * 700,
    "a red circle moving left " * 300,
    "Ã©t\u00e9 \u201cquoted\u201d it\u2019s",
]


def save_tokenizer(folder: Path, ends: bool = True, normalize: bool = True) -> Path:
    """A Unigram tokenizer in the manner of umt5-xxl: <pad> 0, </s> 1, <s> 2, <unk> 3."""
    tokenizer = Tokenizer(models.Unigram())
    if normalize:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    tokenizer.train_from_iterator(
        SENTENCES * 4,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(8)  # what a file says about lengths must not matter
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_clean_by_example():
    assert clean("  a \t red\n\ncircle\u3000 ") == "a red circle"
    assert clean("&amp;lt;b&amp;gt; &amp;") == "<b> &"
    assert clean("<i> &amp;lt;b&amp;gt;") == "<i> <b>"  # with a tag in it, ftfy leaves the escapes to us
    assert clean("Ã©tÃ©") == "été"
    assert clean("“curly”") == '"curly"'
    assert clean("Wan CAPS") == "Wan CAPS"
    assert clean("") == clean(" \n") == ""


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["&", "amp;", "#x1c;", "#11;", "lt;", "\x1c", "\x0b", "\x85", "a"])).map("".join)
)
def test_clean_is_what_the_others_do(text):
    """diffusers' cleaning, and the official white space rule, which is that of the ``regex`` package."""
    import html

    import ftfy
    import regex
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    official = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    assert clean(text) == prompt_clean(text) == regex.sub(r"\s+", " ", official).strip()


def test_ids_are_those_of_transformers(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = WanTokenizer(folder)
    expected = theirs([clean(p) for p in PROMPTS], max_length=512, truncation=True, padding=False).input_ids
    rows, cut = ours(PROMPTS, 512)
    assert rows == expected
    assert all(row[-1] == 1 for row in rows)
    whole = theirs([clean(p) for p in PROMPTS], truncation=False, padding=False).input_ids
    assert cut == [len(row) - min(len(row), 512) for row in whole]
    assert max(cut) > 0
    assert max(map(len, rows)) == 512


def test_ids_are_those_of_transformers_t5_class(tmp_path):
    """transformers 5's own T5 class builds its rules itself. On cleaned text of known letters, and with a
    tokenizer.json that does not normalise, they are the rules of the file."""
    from transformers import T5TokenizerFast

    theirs = T5TokenizerFast.from_pretrained(save_tokenizer(tmp_path, normalize=False), extra_ids=0)
    prompts = [*SENTENCES, "", "a black circle 42", "moving moving   right"]
    expected = theirs([clean(p) for p in prompts], max_length=7, truncation=True, padding=False).input_ids
    assert WanTokenizer(tmp_path)(prompts, 7)[0] == expected


def test_padding_in_the_reference_is_our_missing_rest(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    padded = theirs(
        [clean(p) for p in PROMPTS],
        padding="max_length",
        max_length=512,
        truncation=True,
        return_attention_mask=True,
        add_special_tokens=True,
    )
    for row, ids, mask in zip(WanTokenizer(folder)(PROMPTS)[0], padded.input_ids, padded.attention_mask, strict=True):
        assert row + [0] * (512 - len(row)) == ids
        assert sum(mask) == len(row)


def test_r4_every_prompt_of_a_list_is_tokenized(folder):
    rows, cut = WanTokenizer(folder)(PROMPTS)
    assert len(rows) == len(cut) == len(PROMPTS)
    assert rows == [WanTokenizer(folder)([prompt])[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize("length", [1, 2, 3, 512])
def test_cutting_keeps_the_end(folder, length):
    tokenizer = WanTokenizer(folder)
    (whole,), (none,) = tokenizer([SENTENCES[0]])
    (row,), (cut,) = tokenizer([SENTENCES[0]], length)
    assert none == 0
    assert row == (whole if length >= len(whole) else [*whole[: length - 1], 1])
    assert len(row) + cut == len(whole)


def test_the_contract(folder):
    tokenizer = WanTokenizer(folder)
    assert isinstance(tokenizer, TokenizerContract)
    assert tokenizer([]) == ([], [])
    assert tokenizer.end == 1
    assert tokenizer.vocab_size > max(i for row in tokenizer(PROMPTS)[0] for i in row)
    assert tokenizer.fingerprint == WanTokenizer(folder).fingerprint
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer("a red circle")
    with pytest.raises(ValueError, match="max_length is 0"):
        tokenizer(["a"], 0)


def test_bad_tokenizer_files(tmp_path):
    def refused(*parts: str) -> None:
        with pytest.raises(LoadError) as error:
            WanTokenizer(tmp_path / "t")
        assert all(part in str(error.value) for part in parts), str(error.value)

    refused("it has no tokenizer.json")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/spiece.model").write_bytes(b"x")
    refused("only spiece.model", "Add the tokenizer.json")
    (tmp_path / "t/tokenizer.json").write_text("{}")
    refused("tokenizer.json cannot be read")
    save_tokenizer(tmp_path / "t", ends=False)
    refused("does not end texts with </s>")
