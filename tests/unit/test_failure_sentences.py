"""What an error that is none of ditkit's says in a sentence, and where its traceback goes."""

from __future__ import annotations

import os
import stat

import pytest

from ditkit.failures import explained, short, told, written

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 137438953472 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "it wanted more memory, which was not there (MemoryError)"),
        (MemoryError("Unable to allocate 3.00 TiB for an array"), "it wanted 3.00 TiB of memory"),
        (RuntimeError(ALLOCATOR), "it wanted 137438953472 bytes of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 512.00 MB on"), "512.00 MB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "it wanted more memory"),
        (OSError(12, "Cannot allocate memory"), "it wanted more memory"),
        (
            RuntimeError("CUDA error: device-side assert triggered\nCompile"),
            "it failed with RuntimeError: CUDA error: ",
        ),
        (KeyError("blocks"), "it failed with KeyError: 'blocks'"),
        (ValueError("a\x1b[31m\nb" + "x" * 900), f"it failed with ValueError: a\ufffd[31m b{'x' * 192}..."),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: permission denied"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "ordinal not in range"), "characters that ascii has not"),
    ],
)
def test_the_sentence(error, found):
    assert found in explained(error)[0]


def test_a_variable_that_leads_nowhere_is_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    found, do = explained(FileNotFoundError(2, "No such file or directory"))
    assert found == "no such file or directory, and SSL_CERT_FILE names /nowhere.pem, which is not there"
    assert do == "Correct SSL_CERT_FILE, or unset it"
    monkeypatch.setenv("HF_HOME", "/full")
    found, do = explained(PermissionError(13, "Permission denied", "/full/hub/models"))
    assert found == "/full/hub/models, where HF_HOME leads: permission denied"


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert explained(FileNotFoundError(2, "No such file or directory"))[0] == "the working folder is not there any more"


def test_the_traceback_replaces_nothing(tmp_path):
    try:
        raise ValueError("half \ud800")
    except ValueError as e:
        error = e
    files = [written(error, tmp_path / "a.traceback.txt") for _ in range(2)]
    assert [file.name for file in files] == ["a.traceback.txt", "a.traceback_2.txt"]
    assert "ValueError: half \\ud800" in files[0].read_text()
    elsewhere = written(error, tmp_path / "a.traceback.txt" / "no.txt")
    assert stat.S_IMODE(os.stat(elsewhere).st_mode) == 0o600
    elsewhere.unlink()
    assert str(told(error, "doing it", tmp_path / "b.txt")).startswith("doing it: it failed with ValueError: half")
    assert short(error) == "ValueError: half \ufffd"
