"""What no text for people holds: secrets in any spelling, and characters that steer a terminal."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from ditkit.errors import LoadError
from ditkit.hiding import SECRETS, echoes, hidden, holds_secret, printable, remember
from ditkit.limits import MESSAGE
from ditkit.setup import Setup

SECRET = 'sk-Zq7"w\\9/+=ü-EXAMPLE'
PLAIN = "tok_4f9aZq71LmXw82Rt"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*SECRETS, "OPENAI_BASE_URL", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SECRETS)
def test_each_variable_is_a_secret(monkeypatch, name):
    monkeypatch.setenv(name, f" {PLAIN}\r\n")
    assert hidden(f"it said {PLAIN!r}.") == "it said '***'."
    assert holds_secret(f"x{PLAIN}y")


@pytest.mark.parametrize("spell", [
    str, quote, lambda s: quote(s, safe=""), lambda s: json.dumps(s)[1:-1], lambda s: repr(s)[1:-1],
    lambda s: base64.b64encode(s.encode()).decode(), lambda s: base64.b64encode(f"user:{s}".encode()).decode(),
    lambda s: base64.b64encode(f":{s}".encode()).decode(), lambda s: s.encode().hex(), lambda s: s[: len(s) // 2],
    lambda s: s[len(s) // 2 :],
])  # fmt: skip
@pytest.mark.parametrize("secret", [SECRET, PLAIN])
def test_in_any_spelling(monkeypatch, spell, secret):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    told = spell(secret)
    shown = hidden(f"before {told} after")
    assert "***" in shown
    assert not any(told[i : i + 8] in shown for i in range(len(told) - 7))
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert echoes(f"before {told} after", secret)


@pytest.mark.parametrize(("text", "shown"), [
    ("http://me:pa/s@s@host/v1?x=1", "http://***@host/v1?x=1"),
    ("https://host/v1?token=abc&x=1", "https://host/v1?token=***&x=1"),
    ("https://host/v1?api_key=abc", "https://host/v1?api_key=***"),
    ("https://host/a?X-Amz-Signature=abc#f", "https://host/a?X-Amz-Signature=***#f"),
    ("{'Authorization': 'Bearer abcdefgh1'}", "{'Authorization': 'Bearer ***'}"),
    ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
    ("sent with Bearer abcdefghijk", "sent with Bearer ***"),
])  # fmt: skip
def test_what_looks_like_one(text, shown):
    assert hidden(text) == shown
    assert holds_secret(text)


def test_all_else_stays(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    text = "the token is too long: none of 3; https://host:80/v1?x=1 hf:a/b@main a@b.example key=steps tokens=512"
    assert hidden(text) == text
    for name in ("hf:OWNER/NAME@REVISION", "C://models/a@b", "/models/token=x/a@b", "FILE.py:NAME:key=1"):
        assert not holds_secret(name)
    monkeypatch.setenv("DITKIT_HOST_TOKEN", f"http://127.0.0.1:8700 {PLAIN}")
    assert hidden(f"http://127.0.0.1:8700 {PLAIN}") == "http://127.0.0.1:8700 ***"


def test_a_password_of_an_address_is_one_alone_too(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ssword99@proxy:8080")
    for told in ("p%40ssword99", "p@ssword99", base64.b64encode(b"me:p@ssword99").decode()):
        assert told not in hidden(f"407 for {told}")


def test_no_error_holds_a_secret_or_steers_a_terminal():
    remember(PLAIN)
    e = LoadError(f"a\x1b]0;{PLAIN}\x07", f"b\r\nc \u202e{PLAIN}", f"d\x9b2J{PLAIN}\n  ditkit run")
    assert str(e) == "a\ufffd]0;***\ufffd: b  c \ufffd***. d\ufffd2J***\n  ditkit run."
    assert (e.asked, e.found) == ("a\ufffd]0;***\ufffd", "b  c \ufffd***")
    assert len(str(LoadError("a", "b" * 10**7, "c"))) < MESSAGE + 20


def test_printable():
    assert printable("a\x1b[2J\tb\x00\x85\u2028c\u2066d\ufeff") == "a\ufffd[2J b\ufffd  c\ufffdd\ufffd"
    assert printable("a\nb\r", keep="\n") == "a\nb "
    for text in ("日本語\u3000x", "e\u0301", "👩\u200d🚀", "می\u200cخواهم", "a\xa0b"):
        assert printable(text) == text


@pytest.mark.parametrize("values", [
    {"model": "https://me:pw@host"}, {"components": {"vae": "http://host/?token=abc"}}, {"loras": ["a:1", "http://u:p@h/x"]},
    {"placement": {"denoise": "http://u:p@h"}}, {"cache": "https://h/?key=1234"}, {"expander": "http://h/v1?api_key=1"},
    {"plugs": ["a.py:B:authorization=abcdef"]},
])  # fmt: skip
def test_no_setting_holds_one(values):
    from ditkit.errors import SetupError

    with pytest.raises(SetupError, match="it holds a password or a key, which would stand in every clip") as e:
        Setup.of(values)
    assert not any(word in str(e.value) for word in ("me:pw", "abc", "u:p", "1234", "api_key=1"))
