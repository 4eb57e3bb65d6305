"""`ditkit doctor --placement`: every place asked who it is, in one table, and exit code 1 where one is wrong."""

from __future__ import annotations

import socket

import pytest
from hosting import in_thread

from ditkit.placement.probe import probe_of
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup


@pytest.fixture(scope="module")
def worker(tiny_model):
    return worker_of(Setup(model=str(tiny_model)), ["encode_text", "denoise"])


@pytest.fixture(scope="module")
def url(worker):
    with in_thread(worker) as host:
        yield host.url


def lines(said):
    return [line.split() for line in said.out.splitlines()]


def test_a_place_that_is_in_order(call, worker, url):
    probe = probe_of(worker, "encode_text")["hash"][:16]
    said = call("doctor", "--placement", f"encode_text={url}", "--placement", "decode_latents=cpu")
    assert said.code == 0, said.err
    _, text, latents = lines(said)
    assert text[:3] == ["ok", "encode_text", url]
    assert text[4] == "ms"
    assert 0 < float(text[3]) < 10_000
    assert text[-1] == probe
    assert "float32," in text
    assert latents == ["ok", "decode_latents", "cpu"]


def test_from_a_config_file_and_pinned(call, worker, url, tmp_path):
    probe = probe_of(worker, "encode_text")["hash"]
    text = f"[placement]\nencode_text = '{url}'\n[expect]\nencode_text = '%s'\n"
    (tmp_path / "a.toml").write_text(text % probe)
    assert call("doctor", "--config", "a.toml").code == 0
    (tmp_path / "b.toml").write_text(text % ("0" * 64))
    said = call("doctor", "--config", "b.toml")
    assert said.code == 1
    assert f"{probe[:16]}, expected is 0000000000000000" in said.out


def test_places_that_are_not_in_order(call, url):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    said = call("doctor", "--placement", f"decode_latents={url}", "--placement", f"denoise=http://127.0.0.1:{port}")
    assert said.code == 1
    _, absent, down = said.out.splitlines()
    assert absent.startswith("!!")
    assert "not offered; it has encode_text, denoise" in absent
    assert down.startswith("!!")
    assert "connection refused" in down


@pytest.mark.parametrize("words", [["--steps", "4"], ["--timeout", "3"], ["--placement", "a=b", "--steps", "4"]])
def test_settings_that_doctor_has_no_use_for(call, words):
    said = call("doctor", *words)
    assert said.code == 2
    assert "Leave it out" in said.err


def test_this_machine_as_before(call):
    said = call("doctor")
    assert said.code == 0
    assert "mp4 encoder" in said.out
