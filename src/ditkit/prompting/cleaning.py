"""What a language model answered, without the wrapping: a reasoning block before it, a code fence or quotes around it.
Nothing inside of the answer is changed."""

import re

_FENCE = re.compile(r"^```[^\n`]*\n(.*?)\n?```$", re.S)
_THOUGHT = re.compile(r"^\s*<think>(.*?)</think>", re.S)
_QUOTES = ('""', "''", "“”", "‘’", "「」", "『』", "«»")


def split_reasoning(text: str) -> tuple[str, str]:
    """(answer, reasoning). A closed ``<think>`` block at the very beginning is reasoning that the server left in the
    text; one that is not closed means that no answer came, and the answer is empty."""
    if found := _THOUGHT.match(text):
        return text[found.end() :], found.group(1).strip()
    if text.lstrip().startswith("<think>"):
        return "", text.lstrip().removeprefix("<think>").strip()
    return text, ""


def cleaned(text: str) -> str:
    """``text`` without space, one code fence and one pair of quotes around all of it."""
    text = text.strip()
    if fence := _FENCE.match(text):
        text = fence.group(1).strip()
    inner = text[1:-1]
    for first, last in map(tuple, _QUOTES):
        if len(text) > 1 and text[0] == first and text[-1] == last and first not in inner and last not in inner:
            return inner.strip()
    return text
