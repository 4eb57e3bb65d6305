"""Small files: absent for sure or read; what is something else is named; only ordinary files are opened."""

import os

import pytest

from ditkit import limits
from ditkit.errors import LoadError, SetupError, shortened
from ditkit.reading import (
    check_path,
    file_at,
    folder_at,
    is_litter,
    open_ordinary,
    parse_json,
    parse_toml,
    read_bytes,
    stranger,
)


def places(folder):
    """Name -> a place that is neither a file nor absent for sure."""
    (folder / "folder").mkdir()
    (folder / "to_nothing").symlink_to("../blobs/0123")
    (folder / "to_itself").symlink_to("to_itself")
    (folder / "to_a_folder").symlink_to("folder")
    (folder / "below").symlink_to("nowhere")
    (folder / "to_a_device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    return ["folder", "to_nothing", "to_itself", "to_a_folder", "below/config.json", "to_a_device", "pipe"]


def test_a_file_is_there_or_absent_for_sure(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert file_at(tmp_path / "file")
    assert file_at(tmp_path / "link")
    assert not file_at(tmp_path / "none")
    assert not file_at(tmp_path / "none" / "below")
    assert not file_at(tmp_path / "file" / "below")
    for name in places(tmp_path):
        with pytest.raises(SetupError, match=rf"asked: .*/{name.partition('/')[0]} (is|cannot)"):
            file_at(tmp_path / name, "asked", SetupError)
        with pytest.raises((LoadError, OSError)):
            read_bytes(tmp_path / name, "asked")
        with pytest.raises(OSError, match=r"ordinary|directory|links|Is a"):
            open_ordinary(tmp_path / name)


def test_a_folder_is_there_or_not_and_a_link_to_nothing_is_neither(tmp_path):
    names = places(tmp_path)
    assert [name for name in names if name not in ("to_nothing", "to_itself", "below/config.json")
            and folder_at(tmp_path / name)] == ["folder", "to_a_folder"]  # fmt: skip
    assert not folder_at(tmp_path / "none")
    for name in ("to_nothing", "to_itself", "below/config.json"):
        with pytest.raises(LoadError, match=r"link"):
            folder_at(tmp_path / name)


@pytest.mark.parametrize("name", [
    "._model.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", "Icon\r", "~$notes.docx",
    ".~lock.config.json#", "__MACOSX", "~syncthing~x.tmp", ".stfolder", "@eaDir", "$RECYCLE.BIN", "x.safetensors.tmp",
])  # fmt: skip
def test_what_systems_leave_is_litter(name):
    assert is_litter(name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "0001.png", "[a] b.safetensors", "~", "v1.2"])
def test_what_people_name_is_not(name):
    assert not is_litter(name)


@pytest.mark.parametrize(("data", "what"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "pointer of git-lfs"),
    (b"<!DOCTYPE html><title>403</title>", "web page"), (b"  <html>", "web page"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"), (b"<Error>", "XML"),
    (b'{"error":"you must be logged in"}', "server's error"), (b'{\n "message": "Not Found"}', "server's error"),
    (b"\x1f\x8b\x08", "packed archive"), (b"Rar!", "packed archive"), (b"", "it is empty"), (bytes(64), "zeros"),
    (b"\x00\x05\x16\x07\x00\x02\x00\x00", "macOS"),
])  # fmt: skip
def test_what_is_something_else_is_named(data, what):
    found = stranger(data)
    assert found is not None
    assert what in found[0]


@pytest.mark.parametrize("data", [b"{}", b'{"weight_map": {}}', b"GGUF", b"PK\x03\x04", b"\0\1", b"[1]"])
def test_what_may_be_data_is_not_named(data):
    assert stranger(data) is None


def test_a_mark_at_the_beginning_is_read_and_utf_16_is_named(tmp_path):
    assert parse_json(b"\xef\xbb\xbf{}", "x") == {}
    assert parse_toml(b"\xef\xbb\xbfa = 1", "x") == {"a": 1}
    for parse in (parse_json, parse_toml):
        with pytest.raises(LoadError, match=r"x: it is UTF-16\. Save it as UTF-8"):
            parse("a = 1".encode("utf-16"), "x")
    with pytest.raises(LoadError, match="pointer of git-lfs"):
        parse_json(b"version https://git-lfs.github.com/spec/v1\n", "reading config.json")


@pytest.mark.parametrize("text", [r"C:\models\Wan", r"C:\Users\me", r"C:\xyz"])
def test_backslashes_that_toml_refuses_get_a_hint(text):
    with pytest.raises(LoadError, match=r"Write backslashes twice, or / instead, or the path in single quotes"):
        parse_toml(f'model = "{text}"', "x")


def test_backslashes_that_toml_takes_are_pointed_out():
    path = parse_toml(r'model = "C:\temp\new"', "x")["model"]
    with pytest.raises(SetupError, match=r"asked: there is a tab \(\\t\) in the path .*single quotes"):
        check_path(path, "asked", SetupError)
    check_path(r"C:\temp\new", "asked")
    check_path("/é/漢 [1] #2, a=b@c", "asked")
    with pytest.raises(LoadError, match="control character 0x0"):
        check_path("a\0b", "asked")


def test_sentences_are_short_whatever_a_file_claims():
    assert shortened("x" * limits.MESSAGE) == "x" * limits.MESSAGE
    error = LoadError("a" * 10**6, "b" * 10**6, "c" * 10**6)
    assert len(str(error)) < 4 * limits.MESSAGE
