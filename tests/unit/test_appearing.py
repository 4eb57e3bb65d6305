"""Files and folders that appear whole or not at all: kills, disks without room, links, clocks, several at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forks import child, ended, fork

from ditkit import writing
from ditkit.errors import OutputError
from ditkit.media import files

STOPS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(number: int, work, monkeypatch) -> bool:
    """Do ``work`` in a child that is killed before its ``number``-th call of the system; whether it was."""
    left = number

    def counted(real):
        def call(*words, **more):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)

        return call

    def stopped():
        for name in STOPS:
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        work()

    code = ended(fork(stopped))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def everywhere(work, check, monkeypatch, prepare):
    """Kill ``work`` before each call of the system in turn, and ``check`` what it left."""
    number, killed = 1, True
    while killed:  # every call once; the folders are small, so that these are few
        prepare()
        killed = killed_at(number, work, monkeypatch)
        check(killed)
        number += 1
    assert number > 5


NEW = {"clip.mp4": b"new clip", "clip.json": b"new card"}
OLD = {"clip.mp4": b"old clip", "clip.json": b"old card"}


@pytest.mark.parametrize("card", [b"new card", None])
def test_a_clip_never_lies_beside_the_card_of_another(tmp_path, monkeypatch, card):
    folder, seen = tmp_path / "out", set()

    def prepare():
        writing.remove(folder)
        folder.mkdir()
        for name, data in OLD.items():
            (folder / name).write_bytes(data)

    def check(killed):
        files.probe(folder / "clip.mp4")  # what every command does first
        found = tree(folder)
        seen.add(tuple(found.values()))
        new = {"clip.mp4": NEW["clip.mp4"], **({} if card is None else {"clip.json": card})}
        assert found in (OLD, new, {"clip.mp4": OLD["clip.mp4"]}, {"clip.mp4": NEW["clip.mp4"]})
        assert killed or found == new

    work = lambda: files.write_together({folder / "clip.mp4": NEW["clip.mp4"], folder / "clip.json": card})  # noqa: E731
    everywhere(work, check, monkeypatch, prepare)
    assert len(seen) > 2


@pytest.mark.slow
@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("old", [{}, {"a": b"old", "b": b"old"}])
def test_a_folder_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, exchanging, old):
    root, new, absent = tmp_path / "out", {"a": b"new", "c": b"new"}, []
    if not exchanging:
        monkeypatch.setattr(writing, "_exchanged", lambda one, other: False)

    def prepare():
        writing.remove(root)
        root.mkdir()
        if old:
            (root / "frames").mkdir()
            for name, data in old.items():
                (root / "frames" / name).write_bytes(data)

    def check(killed):
        absent.append(bool(old) and not (root / "frames").exists())
        writing.sweep(root)
        assert os.listdir(root) in ([["frames"]] if old or not killed else [["frames"], []])
        assert tree(root / "frames") in ((new, old) if killed else (new,))

    everywhere(lambda: files.write_together({root / "frames": new}), check, monkeypatch, prepare)
    assert any(absent) is (bool(old) and not exchanging), "where both change places at once there is always one"


def test_what_a_living_process_writes_stays_whatever_the_clock_says(tmp_path):
    target = tmp_path / "x"
    with writing.new_file(target) as (part, file), writing.new_folder(target) as folder:
        for each in (part, folder):
            os.utime(each, (1, 1))
        child(lambda: writing.sweep(tmp_path))
        writing.sweep(tmp_path)
        assert {part, folder} == set(tmp_path.iterdir())
        file.write(b"whole")
        file.flush()
        os.replace(part, target)
    assert tree(tmp_path) == {"x": b"whole"}


def test_only_what_is_ours_is_swept(tmp_path):
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "deep" / "letter").write_bytes(b"dear")
    for name in (".ditkit-notes.part", "ditkit-000000000000.part", ".ditkit-000000000000.old", ".x.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".ditkit-000000000000.part").symlink_to(mine)
    (tmp_path / ".ditkit-000000000001.part").mkdir()
    (tmp_path / ".ditkit-000000000001.part" / "link").symlink_to(mine)
    os.mkfifo(tmp_path / ".ditkit-000000000002.part")
    before = tree(tmp_path)
    writing.sweep(tmp_path)
    assert tree(tmp_path) == before
    assert not (tmp_path / ".ditkit-000000000001.part").exists()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.json"])
def test_a_link_is_replaced_and_what_is_behind_it_stays(tmp_path, name):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(mine)
    files.write_together({tmp_path / "out" / each: data for each, data in NEW.items()})
    assert mine.read_bytes() == b"mine"
    assert tree(tmp_path / "out") == NEW


def test_a_link_to_a_folder_is_replaced_by_frames_and_its_folder_stays(tmp_path, monkeypatch):
    mine, out = tmp_path / "mine", tmp_path / "out"
    for _ in range(2):
        mine.mkdir(exist_ok=True)
        (mine / "0000.png").write_bytes(b"mine")
        out.mkdir(exist_ok=True)
        writing.remove(out / "frames")
        (out / "frames").symlink_to(mine)
        files.write_together({out / "frames": {"0000.png": b"new"}})
        assert tree(mine) == {"0000.png": b"mine"}
        assert tree(out) == {"frames/0000.png": b"new"}
        assert os.listdir(out) == ["frames"]
        monkeypatch.setattr(writing, "_exchanged", lambda one, other: False)


@pytest.mark.parametrize("room", [0, 3, 7])
def test_a_full_disk_leaves_what_was_there(tmp_path, room):
    for name, data in OLD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0000.png").write_bytes(b"old")
    before = tree(tmp_path)
    for contents in ({tmp_path / name: data * 2 for name, data in NEW.items()},
                     {tmp_path / "frames": {"0000.png": b"new", "0001.png": b"new frame"}}):  # fmt: skip
        with pytest.raises(OutputError, match="file too large"):
            child(lambda contents=contents: files.write_together(contents), room=room)
    with pytest.raises(OutputError, match="File too large"):
        child(lambda: writing.write_whole(tmp_path / "clip.mp4", [b"x" * 9], "writing"), room=room)
    with pytest.raises(OutputError, match="file too large"):
        child(lambda: files.probe(tmp_path / "clip.mp4"), room=room)
    assert tree(tmp_path) == before


def test_writers_of_the_same_pair_come_one_after_the_other(tmp_path):
    def work(who):
        for turn in range(15):
            files.write_together(
                {tmp_path / "clip.mp4": b"%d %d" % (who, turn), tmp_path / "clip.json": b"%d %d" % (who, turn)}
            )

    pids = [fork(lambda who=who: work(who)) for who in range(4)]
    assert [ended(pid) for pid in pids] == [0] * 4
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "clip.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["clip.json", "clip.mp4"]


def test_somebody_who_holds_the_folder_is_not_waited_for_without_end(tmp_path, monkeypatch):
    """``flock . ditkit ...`` holds the very folder that is written into."""
    import fcntl

    monkeypatch.setattr(writing, "PATIENCE", 0.1)
    number = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    begun = time.monotonic()
    files.write_together({tmp_path / name: data for name, data in NEW.items()})
    os.close(number)
    assert 0.1 <= time.monotonic() - begun < 5
    assert tree(tmp_path) == NEW


def test_scratch_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work():
        (writing.Scratch().path / "child").write_text("socket")
        os.kill(os.getpid(), signal.SIGKILL)

    mine = writing.Scratch()
    assert ended(fork(work)) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    again = writing.Scratch()
    assert sorted(tmp_path.iterdir()) == sorted([mine.path, again.path])
    assert mine.path.stat().st_mode & 0o777 == 0o700
    for each in (mine, again, again):
        each.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_files_have_the_rights_that_the_person_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write_together({tmp_path / "a": b"", tmp_path / "frames": {"0": b""}})
        writing.write_whole(tmp_path / "b", [b""], "writing")
    finally:
        os.umask(before)
    rights = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert rights == {"a": 0o666 & ~mask, "b": 0o666 & ~mask, "frames": 0o777 & ~mask}
