"""Addresses, keys that belong to them, and the way there: through which proxy and by whose certificates."""

from __future__ import annotations

import os

import pytest

from ditkit import addresses
from ditkit.addresses import origin_of, parse
from ditkit.errors import PlaceError, SetupError
from ditkit.keys import key_for, token_for
from ditkit.network import certificates, proxy_for
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.spec import Spec
from ditkit.setup import Setup

MALFORMED = [
    "http://[::1", "http://[::1:8700", "http://::1]:8700", "http://[nonsense]:80", "http://host:99999", "http://host:abc",
    "http://host:-1", "http://host:0", "http://host:", "http://", "http://:8700", "http:///path", "http://ho st:8700",
    "http://host\t:8700", "http://host\n", "http://ho\x1bst", "http://host..name:8700", "http://.host",
    "http://-host", f"http://{'a' * 64}", f"http://{'a.' * 130}b", "http://ü" + "ü" * 63, "http://a\u2024.\u3002b",
    "http://host\\evil", "http://ho%20st", "http://user@", "http://@host", "http://user:@host", "http://host,other",
]  # fmt: skip
KEY = "sk-4f9aZq71LmXw82Rt"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    names = (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "DITKIT_EXPANDER_KEY",
        "DITKIT_HOST_TOKEN",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    )
    for name in [*names, *(n for n in os.environ if n.lower().endswith("_proxy"))]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_address_is_one_sentence_wherever_it_stands(monkeypatch, text):
    with pytest.raises(ValueError, match=r"^it|^its|^what"):
        parse(text)
    for use in (Spec.parse, HTTPChannel, lambda at: Setup.of({"expander": at}), lambda at: key_for(at, False)):
        monkeypatch.setenv("DITKIT_EXPANDER_KEY", KEY)
        with pytest.raises(SetupError) as e:
            use(text)
        assert "\n" not in str(e.value)
    with pytest.raises(SetupError):
        Spec.parse(text.replace("http:", "ray:"))
    monkeypatch.delenv("DITKIT_EXPANDER_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", text)
    if text.strip() == text:
        with pytest.raises(SetupError, match="the address in OPENAI_BASE_URL"):
            key_for("https://host/v1", False)
    if not set(text) & set(" \t\n"):
        monkeypatch.setenv("DITKIT_HOST_TOKEN", f"{text} {KEY}")
        with pytest.raises(SetupError, match="an address in DITKIT_HOST_TOKEN"):
            token_for("https://host", ["https://host"], False)


def test_what_an_address_is():
    found = parse("HTTPS://Bücher.Example.:8443/v1/?x=1")
    assert (found.scheme, found.host, found.port, found.path) == ("https", "xn--bcher-kva.example.", 8443, "/v1")
    assert found.origin == origin_of("https://xn--bcher-kva.example:8443")
    assert parse("http://[::1]:8700").netloc == "[::1]:8700"
    for near in ("http://LOCALHOST.", "http://127.9.9.9", "http://[::1]"):
        assert parse(near).is_loopback
    for far in ("http://127.0.0.1.example", "http://localhost.example", "http://0.0.0.0", "http://10.0.0.1"):
        assert not parse(far).is_loopback
    assert addresses.parse("http://my_host:80/a").host == "my_host"


# --- keys


def test_a_key_goes_to_its_own_server(monkeypatch):
    local, openai, other = "http://127.0.0.1:8000/v1", "https://api.openai.com/v1", "https://llm.example/v1"
    monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\r\n")
    assert [key_for(each, False) for each in (local, openai, other)] == [None, KEY, None]
    monkeypatch.setenv("OPENAI_BASE_URL", local)
    assert [key_for(each, False) for each in (local, openai, other)] == [KEY, None, None]
    for stranger in ("http://127.0.0.1:8001/v1", "https://127.0.0.1:8000/v1"):
        assert key_for(stranger, False) is None
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", f"{other} other-{KEY}")
    assert [key_for(each, False) for each in (local, openai, other)] == [KEY, None, f"other-{KEY}"]
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", f" mine-{KEY}\n")
    assert key_for(other, False) == f"mine-{KEY}"


def test_a_key_goes_over_plain_http_on_this_machine_only(monkeypatch):
    monkeypatch.setenv("DITKIT_EXPANDER_KEY", KEY)
    monkeypatch.setenv("DITKIT_HOST_TOKEN", KEY)
    for far in ("http://llm.example/v1", "HTTP://llm.example/v1", "hTTp://10.0.0.1"):
        for ask in (key_for, lambda at, plain: token_for(at, [at], plain)):
            with pytest.raises(SetupError, match=r"as plain text\. .* or --plain-http"):
                ask(far, False)
            assert ask(far, True) == KEY
    assert key_for("http://localhost:1/v1", False) == KEY


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "DITKIT_EXPANDER_KEY"])
@pytest.mark.parametrize("inside", ["\r", "\n", " ", "\t", "ü", "\u200b", "\x7f", "\x1b"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch, variable, inside):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://h/v1")
    monkeypatch.setenv(variable, f"sk-firsthalf{inside}secondhalf")
    with pytest.raises(SetupError, match=rf"the key in {variable}: character 13 of 23 is U\+[0-9A-F]{{4}}, which") as e:
        key_for("https://h/v1", False)
    assert "firsthalf" not in str(e.value)
    assert "secondhalf" not in str(e.value)


# --- proxies


def asked(address, **environment):
    return proxy_for(parse(address), "asking")


@pytest.mark.parametrize(("listed", "excepted"), [
    ("*", True), ("llm.example", True), (".example", True), ("*.example", True), ("example", True), ("ample", False),
    ("llm.example:8443", True), ("llm.example:443", False), ("a, llm.example ,b", True), ("https://llm.example", True),
    ("other.example", False), ("", False), ("10.0.0.0/8", False),
])  # fmt: skip
def test_names_in_no_proxy(monkeypatch, listed, excepted):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    assert (asked("https://llm.example:8443/v1") is None) == excepted


@pytest.mark.parametrize(("listed", "excepted"), [
    ("10.0.0.0/8", True), ("10.1.2.3", True), ("10.1.2.3:80", True), ("10.1.2.3:81", False), ("11.0.0.0/8", False),
    ("10.1.2.0/24,x", True), ("nonsense/8", False), ("::1", False), ("*", True),
])  # fmt: skip
def test_numbers_in_no_proxy(monkeypatch, listed, excepted):
    monkeypatch.setenv("all_proxy", "proxy:3128")
    monkeypatch.setenv("no_proxy", listed)
    assert (asked("http://10.1.2.3/v1") is None) == excepted


def test_ranges_of_ipv6_in_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    for listed in ("fd00::/8", "[fd00::1]:80", "[fd00::1]", "fd00::1"):
        monkeypatch.setenv("no_proxy", listed)
        assert asked("http://[fd00::1]/v1") is None
    monkeypatch.setenv("no_proxy", "fe80::/10")
    assert asked("http://[fd00::1]/v1") is not None


@pytest.mark.parametrize(
    "proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x", "http://[::1", "socks://"]
)
def test_no_proxy_is_used_for_this_machine(monkeypatch, proxy):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for near in ("http://127.0.0.1:8000/v1", "https://localhost/v1", "http://[::1]:8000"):
        assert asked(near) is None


@pytest.mark.parametrize(("name", "proxy"), [
    ("HTTPS_PROXY", "nonsense://x"), ("https_proxy", "http://[::1"), ("ALL_PROXY", "socks://h:1"), ("ALL_PROXY", "http://"),
    ("all_proxy", "http://h:99999"), ("HTTPS_PROXY", "http://a b:1"), ("HTTPS_PROXY", "http://me:pass-word-1@h:x"),
])  # fmt: skip
def test_a_proxy_that_is_none_is_named(monkeypatch, name, proxy):
    monkeypatch.setenv(name, proxy)
    with pytest.raises(
        PlaceError, match=f"the proxy in {name} is no address .* Correct {name}, or put llm.example"
    ) as e:
        asked("https://llm.example/v1")
    assert "pass-word-1" not in str(e.value)


def test_a_socks_proxy_needs_its_package(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    try:
        import socksio  # noqa: F401

        assert asked("https://llm.example/v1").variable == "ALL_PROXY"
    except ImportError:
        with pytest.raises(PlaceError, match=r"ALL_PROXY names a SOCKS proxy, and socksio is not installed\. Run: pip"):
            asked("https://llm.example/v1")


def test_a_certificate_that_is_not_there_is_named(monkeypatch, tmp_path):
    assert certificates("asking") is None
    (tmp_path / "empty.pem").write_text("nothing")
    for name, place in (("SSL_CERT_FILE", "nowhere.pem"), ("SSL_CERT_FILE", "empty.pem"), ("SSL_CERT_DIR", "nowhere")):
        monkeypatch.setenv(name, str(tmp_path / place))
        with pytest.raises(PlaceError, match=f"{name} names .*{place}.* Correct or unset {name}"):
            certificates("asking")
        monkeypatch.delenv(name)
