"""Which secret goes to which address. A token or a key belongs to one host or server and is sent to no other.

Secrets come from the environment or from a file that a person names, never from a setting. Leaves out: how they are
kept out of texts (``hiding.py``)."""

import os
from collections.abc import Collection
from pathlib import Path

from ditkit import addresses, reading
from ditkit.addresses import Address
from ditkit.errors import SetupError
from ditkit.hiding import KEY, TOKEN, remember

SHORTEST = 16  # characters of a host's token at least; a short one can be guessed
MAKE = "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
OPENAI, OPENAI_URL, OPENAI_API = "OPENAI_API_KEY", "OPENAI_BASE_URL", "https://api.openai.com/v1"
MOST = 1 << 16  # bytes of a file that holds one token


def token_of() -> str | None:
    """The one of this machine as a host, from the environment, or None. Raises SetupError."""
    text = os.environ.get(TOKEN)
    return None if text is None else checked_token(text.strip(), TOKEN)


def token_in(file: Path) -> str:
    """The one in ``file``. Raises SetupError."""
    asked = f"the token in {file}"
    try:
        data = reading.read_bytes(file, asked, SetupError, limit=MOST, do="Check the path")
    except FileNotFoundError:
        raise SetupError(asked, "no such file or directory", "Check the path") from None
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SetupError(asked, "it is not text", "Check the path") from None
    remember(text)
    return checked_token(text, asked)


def checked_token(text: str, asked: str) -> str:
    """``text``, if it can be a host's token. Raises SetupError."""
    if len(text) < SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        found = f"it is not {SHORTEST} or more letters, digits and signs without spaces"
        raise SetupError(asked, found, MAKE)
    return text


def checked_key(text: str, variable: str) -> str:
    """``text``, if it can be sent. Raises SetupError, which does not repeat it."""
    for at, letter in enumerate(text, 1):
        if not letter.isascii() or not letter.isprintable() or letter == " ":
            found = f"character {at} of {len(text)} is U+{ord(letter):04X}, which cannot be sent"
            raise SetupError(f"the key in {variable}", found, "Copy the key once more, without what stands around it")
    return text


def token_for(address: str, others: Collection[str], plain_http: bool) -> str | None:
    """The token for the host at ``address``, which is one of the addresses ``others`` of this run; None where the
    environment has none for it. DITKIT_HOST_TOKEN is a token where the run has one host, else pairs of an address and
    its token, with spaces between. Raises SetupError for a token that could go to the wrong host, or over plain http
    beyond this machine."""
    words = os.environ.get(TOKEN, "").split()
    if not words:
        return None
    asked, form = f"the token for {address}", f"Write {TOKEN}='{address} TOKEN', with a pair for each host"
    host = read(address, asked)
    if "://" in words[0]:
        token = _pairs(words, TOKEN, asked, form).get(host.origin)
    elif len({read(other, asked).origin for other in others}) > 1:
        raise SetupError(asked, f"the run has {len(others)} hosts, and {TOKEN} does not say whose it is", form)
    else:
        token = " ".join(words)
    if token is None:
        return None
    check_private(host, plain_http, asked)
    return checked_token(token, TOKEN)


def key_for(address: str, plain_http: bool) -> str | None:
    """The key for the server of prompts at ``address``; None where the environment has none for it. DITKIT_EXPANDER_KEY
    is a key, or pairs of an address and its key; OPENAI_API_KEY is for the address of OPENAI_BASE_URL, or for OpenAI.
    Raises SetupError."""
    asked, server = f"the key for {address}", read(address, f"the key for {address}")
    words = os.environ.get(KEY, "").split()
    key, variable = None, KEY
    if words and "://" in words[0]:
        form = f"Write {KEY}='{address} KEY', with a pair for each server"
        key = _pairs(words, KEY, asked, form).get(server.origin)
    elif words:
        key = os.environ[KEY].strip()
    if key is None and (own := os.environ.get(OPENAI, "").strip()) and server.origin == openai_origin():
        key, variable = own, OPENAI
    if key is None:
        return None
    check_private(server, plain_http, asked)
    return checked_key(key, variable)


def openai_origin() -> tuple[str, str, int | None]:
    """What OPENAI_API_KEY belongs to. Raises SetupError."""
    return read(os.environ.get(OPENAI_URL, "").strip() or OPENAI_API, f"the address in {OPENAI_URL}").origin


def check_private(address: Address, plain_http: bool, asked: str) -> None:
    """Raise SetupError where a secret would go to another machine for everybody to read."""
    if address.scheme == "http" and not plain_http and not address.is_loopback:
        do = "Use https:// or a tunnel to this machine, or --plain-http if you trust the network"
        raise SetupError(asked, "it would go over the network as plain text", do)


def read(text: str, asked: str) -> Address:
    """An address. Raises SetupError."""
    try:
        return addresses.parse(text)
    except ValueError as e:
        raise SetupError(asked, str(e), "Write https://HOST[:PORT]") from None


def _pairs(words: list[str], variable: str, asked: str, form: str) -> dict[tuple[str, str, int | None], str]:
    if len(words) % 2 or not all("://" in word for word in words[::2]) or any("://" in word for word in words[1::2]):
        what = "token" if variable == TOKEN else "key"
        raise SetupError(asked, f"{variable} holds no pairs of an address and a {what}", form)
    about = f"an address in {variable}"
    return {read(host, about).origin: secret for host, secret in zip(words[::2], words[1::2], strict=True)}
