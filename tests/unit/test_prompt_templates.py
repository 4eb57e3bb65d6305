"""Templates by name, by language, by file; what is taken off an answer; which addresses are none."""

from __future__ import annotations

import hashlib

import pytest

from ditkit.cli.expand import difference, printable
from ditkit.errors import RequestError, SetupError
from ditkit.prompting.cleaning import cleaned, split_reasoning
from ditkit.prompting.templates import Template, chosen, language_of, packaged, placed
from ditkit.request import Request
from ditkit.setup import Setup

OWN = 'name = "mine"\nversion = 3\nlanguage = "en"\npictures = []\ninstructions = "Say it twice."\n'

# A template that changes gets another version: both stand in every clip's manifest.
PINNED = {
    "flf2v-en": (2, "1974c625e6966928"),
    "flf2v-zh": (2, "bb42b4df7bcf3c89"),
    "i2v-en": (2, "4e6e03c594da1754"),
    "i2v-zh": (2, "8f97c097e7f13246"),
    "t2v-en": (2, "aa971f611e837c78"),
    "t2v-zh": (2, "945ea7ada6019a99"),
}


def test_each_packaged_template_is_what_its_version_says():
    found = {}
    for name, text in packaged().items():
        template = Template.parse(text, name)
        assert (template.name, template.language) == (name, name[-2:])
        found[name] = (template.version, hashlib.sha256(text.encode()).hexdigest()[:16])
    assert found == PINNED


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("a red circle", "en"),
        ("一只猫在雨中跑", "zh"),
        ("一只 cat 在雨中跑", "zh"),
        ('a shop with the sign "欢迎光临欢迎光临" at night', "en"),
        ("猫が雨の中を走る", "en"),
        ("12345", "en"),
    ],
)
def test_the_language_is_that_of_the_words_outside_of_quotes(prompt, language):
    assert language_of(prompt) == language


@pytest.mark.parametrize(
    ("given", "prompt", "pictures", "name"),
    [
        ("auto", "a cat", (), "t2v-en"),
        ("auto", "一只猫", (), "t2v-zh"),
        ("auto", "a cat", ("image",), "i2v-en"),
        ("auto", "一只猫", ("image", "last_image"), "flf2v-zh"),
        ("t2v-zh", "a cat", ("image",), "t2v-zh"),
        (OWN, "a cat", (), "mine"),
    ],
)
def test_a_template_is_chosen(given, prompt, pictures, name):
    assert chosen(given, prompt, pictures).name == name


def test_a_template_that_shows_a_picture_wants_one():
    with pytest.raises(RequestError, match="shows the run's image, and there is none"):
        chosen("i2v-en", "a cat", ())


def test_a_file_goes_into_the_request_with_its_text(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(OWN)
    assert placed(Request(expand_template=str(file))).expand_template == OWN
    assert placed(Request(expand_template=OWN)).expand_template == OWN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("instructions = ", "not valid TOML"),
        (OWN.replace("version", "versoin"), "did you mean 'version'"),
        (OWN.replace("3", '"3"'), "version='3' .*Give a whole number"),
        (OWN.replace("Say it twice.", " "), "instructions=' '"),
        (OWN.replace("[]", '["imgae"]'), "did you mean 'image'"),
        (OWN.replace('name = "mine"\n', ""), "name .*field required"),
    ],
)
def test_a_file_that_is_no_template_is_refused_when_the_run_begins(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match=said):
        placed(Request(expand_template=str(file)))


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(RequestError, match="did you mean 't2v-en'"):
        placed(Request(expand_template="t2v_en"))


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        (" A cat.\n", "A cat."),
        ('"A cat."', "A cat."),
        ("“一只猫”", "一只猫"),
        ("```text\nA cat.\n```", "A cat."),
        ('```\n"A cat."\n```', "A cat."),
        ('"Stop" and "Go"', '"Stop" and "Go"'),
        ('A sign says "Stop"', 'A sign says "Stop"'),
        ("Here: ```A cat```", "Here: ```A cat```"),
        ('"', '"'),
    ],
)
def test_only_what_is_around_an_answer_is_taken_off(answer, prompt):
    assert cleaned(answer) == prompt


def test_reasoning_is_told_from_the_answer():
    assert split_reasoning("<think>\nhm\n</think>\nA cat.") == ("\nA cat.", "hm")
    assert split_reasoning("<think>hm, a cat") == ("", "hm, a cat")
    assert split_reasoning("A cat <think>s</think>.") == ("A cat <think>s</think>.", "")


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://", "transformers:", "ftp://a/b", "some/folder"])
def test_what_is_neither_a_server_nor_a_folder_is_refused(address):
    with pytest.raises(SetupError, match="neither the URL"):
        Setup.of({"expander": address})


@pytest.mark.parametrize("address", ["http://me:key@host/v1", "https://host/v1?key=abc"])
def test_a_key_does_not_stand_in_an_address(address):
    with pytest.raises(SetupError, match="OPENAI_API_KEY"):
        Setup.of({"expander": address})


def test_a_difference_is_told_by_words_and_by_chinese_characters():
    assert difference("a red cat", "a big red dog", True).plain == "a{+ big+} red [-cat-]{+dog+}"
    assert difference("一只猫", "一只小猫", True).plain == "一只{+小+}猫"


def test_an_answer_gives_a_terminal_no_orders():
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\ufffd[2Jb c\ufffdd"
