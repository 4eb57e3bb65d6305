"""What no text for people may hold: secrets, and characters that steer a terminal.

Every error of ditkit goes through here when it is made (``errors.py``), so that neither its sentence nor what is kept
of it (a State, a run's folder, a log) holds a key. Imports nothing of ditkit. Leaves out: which secret goes to which
address (``keys.py``)."""

import base64
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import quote, quote_plus, unquote, urlsplit

TOKEN, KEY = "DITKIT_HOST_TOKEN", "DITKIT_EXPANDER_KEY"
"""No settings: settings are shown and written into manifests."""

SECRETS = (TOKEN, KEY, "OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_WEBHOOK_SECRET", "HF_TOKEN",
           "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")  # fmt: skip
LISTS = ("OPENAI_CUSTOM_HEADERS",)
"""Lines of NAME: VALUE."""
ADDRESSES = ("OPENAI_BASE_URL", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy")
"""In small and in large letters; each may hold a password."""

MASK = "***"
PIECE = 8  # characters of a secret that are hidden wherever they stand together: a server may repeat half of a key
SHORT = 4  # a secret of fewer is none
DUMMIES = ("none", "null", "empty", "dummy", "test", "ollama", "token", "secret", "vllm", "sglang", "lm-studio")
"""What people give to a server that wants some key and looks at none; such a word is no secret."""

_REMEMBERED = set[str]()
_NAME = r"[\w.-]*(?:token|key|secret|passw(?:or)?d|passwd|pwd|credential|signature|authorization|\bsig|\bauth)[\w.-]*"
_FORMS = (
    (re.compile(r"(?<=\w\w://)[^\s'\"]*@"), f"{MASK}@"),  # user:password@
    (re.compile(rf"([?&;#]{_NAME}=)[^&\s#'\"]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?)[^\s\"',}*]+", re.IGNORECASE),
     rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{MASK}"),
)  # fmt: skip
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)  # not the two joiners, which words and emoji are made with


def remember(secret: str) -> None:
    """A secret that stands in no variable, such as one out of a file."""
    _REMEMBERED.add(secret)


def secrets() -> set[str]:
    """All that are known, as they were given and without what stands around them."""
    found = set(_REMEMBERED)
    for name in SECRETS:
        text = os.environ.get(name, "")
        words = [word for word in text.split() if "://" not in word]
        found |= {*words, text if "://" not in text else ""}
    for name in LISTS:
        found |= {line.partition(":")[2].strip() for line in os.environ.get(name, "").splitlines()}
    for name in ADDRESSES:
        for text in (os.environ.get(name.lower(), ""), os.environ.get(name.upper(), "")):
            found |= set(_in_address(text))
    stripped = {part for secret in found for part in (secret, secret.strip(), *secret.split())}
    return {s for s in stripped if len(s) >= SHORT and s.lower() not in DUMMIES}


def _in_address(text: str) -> Iterator[str]:
    try:
        url = urlsplit(text if "://" in text else f"//{text}")
        user, password = url.username or "", url.password or ""
    except ValueError:
        return
    if password:
        yield from (password, unquote(password), f"{user}:{password}", f"{unquote(user)}:{unquote(password)}")
    for part in url.query.split("&"):
        yield from filter(None, (part.partition("=")[2], unquote(part.partition("=")[2])))


@lru_cache(64)
def spellings(secret: str) -> set[str]:
    """As is, percent-encoded, as JSON and Python write it, and what base64 makes of it wherever it stands in a text."""
    data = secret.encode(errors="surrogateescape")
    found = {secret, quote(data), quote(data, safe=""), quote_plus(data), json.dumps(secret)[1:-1], repr(secret)[1:-1],
             data.decode("latin-1"), data.hex()}  # fmt: skip
    for before in range(3):
        first, end = -(-8 * before // 6), (8 * (before + len(data))) // 6  # letters that nothing else has a part in
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(bytes(before) + data).decode()[first:end])
    return {each for each in found if len(each) >= SHORT}


def hidden(text: str) -> str:
    """``text`` with ``***`` for each secret in it, each piece of one, and each password and key in an address."""
    for form, mask in _FORMS:
        text = form.sub(mask, text)
    marked, pieces = bytearray(len(text)), set[str]()
    for spelling in {each for secret in secrets() for each in spellings(secret)}:
        if len(spelling) < PIECE:
            for match in re.finditer(rf"(?<!\w){re.escape(spelling)}(?!\w)", text):
                marked[match.start() : match.end()] = b"\1" * len(match[0])
        pieces |= {spelling[i : i + PIECE] for i in range(len(spelling) - PIECE + 1)}
    for at in range(len(text) - PIECE + 1 if pieces else 0):
        if text[at : at + PIECE] in pieces:
            marked[at : at + PIECE] = b"\1" * PIECE
    return _masked(text, marked)


def _masked(text: str, marked: bytearray) -> str:
    pieces, at = list[str](), 0
    for run in re.finditer(b"\1+", marked):
        pieces += [text[at : run.start()], MASK]
        at = run.end()
    return "".join([*pieces, text[at:]])


def holds_secret(text: str) -> bool:
    """Whether a whole secret stands in ``text``, in any spelling, or an address with a password or a key."""
    if len(text) < PIECE:
        return False
    if any(form.sub(mask, text) != text for form, mask in _FORMS):
        return True
    return any(each in text for secret in secrets() if len(secret) >= PIECE for each in spellings(secret))


def echoes(text: str, secret: str) -> bool:
    """Whether ``text`` repeats ``secret``, or a half of it, in any spelling."""
    middle = len(secret) // 2
    parts = (secret, secret[:middle], secret[middle:]) if middle >= PIECE else (secret,)
    return any(each in text for part in parts for each in spellings(part) if len(each) >= PIECE)


def printable(text: str, keep: str = "") -> str:
    """``text`` without what a terminal takes for an order (escape sequences, bells, marks that turn the direction of
    writing): space for space and ``\\ufffd`` for all else. ``keep``: characters that stay, such as a line's end."""

    def plain(found: re.Match[str]) -> str:
        letter = found[0]
        return letter if letter in keep else " " if letter.isspace() else "\ufffd"

    return _STEERING.sub(plain, text)
