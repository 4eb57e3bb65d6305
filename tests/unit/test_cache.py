"""The cache of stage results by itself: its two keys, what it says, its limit, damage, crashes, many processes."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import random
import sqlite3
import stat
import sys
import time
import traceback
import types
from pathlib import Path

import pytest
import torch
from forks import child, open_to_all

from ditkit.errors import OutputError, SetupError
from ditkit.execution.records import code_of
from ditkit.execution.stage import BaseStage
from ditkit.stages.decode_latents import DecodeLatents
from ditkit.stages.encode import EncodeText
from ditkit.state import State
from ditkit.store import cache as room
from ditkit.store.cache import Cache, StageResult, folder_of
from ditkit.store.hashes import Hashes
from ditkit.store.reasons import CacheKey
from ditkit.writing import new_file

ASKED = CacheKey(
    "encode_text", 1, "c0de", {"wide": False}, {"text_encoder": "f" * 64}, {"prompt": "a" * 64},
    {"steps": 4, "guidance_scale": 5.0, "guided": True}, {},
)  # fmt: skip


def asked(**changes) -> CacheKey:
    return dataclasses.replace(ASKED, **changes)


OTHER = asked(request={**ASKED.request, "steps": 5})


def outcome(value=1.0, settings=None, plugs=None, size=100, **more) -> StageResult:
    written = {"prompt_embeds": torch.full((1, size), value), "prompt_lengths": [1]}
    return StageResult(written, {"guided": True} if settings is None else settings, plugs, **more)


def value(found: StageResult | None) -> float | None:
    return None if found is None else found.written["prompt_embeds"][0, 0].item()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10**6)


def files(cache):
    return sorted(cache.results.iterdir())


def kept_bytes(cache):
    return sum(size for _, size in cache.contents().values())


def said(cache, question=ASKED):
    return cache.find(question)[1]


# --- what comes back


def test_what_was_stored_comes_back_bit_for_bit(cache):
    written = {
        "latents": torch.tensor([[float("nan"), -0.0]]).bfloat16(),
        "history": {"a": torch.ones(2), "b": torch.tensor(3)},
        "step": 4,
        "sigmas": [1.0, 0.1],
    }
    assert cache.store(ASKED, StageResult(written, {"steps": 4}, {"predict": ["x"]})) == ""
    found, why = cache.find(asked(plugs={"predict": ["x"]}))
    assert State(found.written).equal(State(written))
    assert (found.settings, found.plugs, found.stopped) == ({"steps": 4}, {"predict": ["x"]}, False)
    assert why.startswith("made on 20")


def test_an_empty_cache_says_so(cache):
    assert cache.find(ASKED) == (None, "no result of encode_text is kept")


CHANGES = {
    "stage": ({"stage": "other"}, "no result of other is kept"),
    "version": ({"version": 2}, "the stage has another version"),
    "code": ({"code": "c1de"}, "the stage has other code"),
    "option": ({"options": {"wide": True}}, "wide was False, is True"),
    "weights": ({"weights": {"text_encoder": "e" * 64}}, "text_encoder is another one"),
    "input": ({"inputs": {"prompt": "b" * 64}}, "prompt is another one"),
    "new input": ({"inputs": {"prompt": "a" * 64, "image": "c" * 64}}, "image is new"),
    "no input": ({"inputs": {}}, "prompt is gone"),
    "setting": ({"request": {**ASKED.request, "guided": False}}, "guided was True, is False"),
    "type": ({"request": {**ASKED.request, "guided": 1}}, "guided was True, is 1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_result_of_anything_else_is_not_found_and_the_difference_is_named(cache, name):
    changes, words = CHANGES[name]
    cache.store(ASKED, outcome())
    found, why = cache.find(asked(**changes))
    assert found is None
    assert why.removeprefix("the nearest one differs: ") == words


def test_other_software_is_a_miss_that_names_it(cache, monkeypatch):
    cache.store(ASKED, outcome())
    now = room.software()
    monkeypatch.setattr(room, "software", lambda: {**now, "torch": "9"})
    assert said(cache) == f"the nearest one differs: torch was {now['torch']!r}, is '9'"


def test_a_setting_that_was_not_read_does_not_matter(cache):
    cache.store(ASKED, outcome())
    assert value(cache.find(asked(request={"guided": True, "steps": 50}))[0]) == 1.0


def test_results_with_other_settings_stand_side_by_side(cache):
    for steps in (4, 5, 6):
        question = asked(request={**ASKED.request, "steps": steps})
        cache.store(question, outcome(float(steps), {"steps": steps}))
    for steps in (4, 5, 6):
        assert value(cache.find(asked(request={**ASKED.request, "steps": steps}))[0]) == steps
    assert said(cache, asked(request={**ASKED.request, "steps": 9})).endswith("steps was 6, is 9")


def test_a_stage_that_asked_for_the_empty_seams_is_another_than_one_that_never_asked(cache):
    plugged = asked(plugs={"predict": ["a wrapper"]})
    cache.store(ASKED, outcome(1.0, plugs={}))
    assert cache.find(plugged) == (None, "the nearest one differs: seam predict holds something else")
    cache.store(plugged, outcome(2.0, plugs=dict(plugged.plugs)))
    assert (value(cache.find(ASKED)[0]), value(cache.find(plugged)[0])) == (1.0, 2.0)
    never = asked(stage="never")
    cache.store(never, outcome(3.0, plugs=None))
    assert value(cache.find(asked(stage="never", plugs={"predict": ["a wrapper"]}))[0]) == 3.0


def test_the_nearest_one_is_the_one_with_the_fewest_differences(cache):
    cache.store(asked(inputs={"prompt": "b" * 64}, options={"wide": True}), outcome())
    cache.store(asked(inputs={"prompt": "b" * 64}), outcome())
    many = {f"w{i}": "0" * 64 for i in range(9)}
    cache.store(asked(weights=many), outcome())
    assert said(cache) == "the nearest one differs: prompt is another one"
    assert said(Cache(cache.folder, 1), asked(weights=many, inputs={})) == "the nearest one differs: prompt is gone"
    far = asked(weights={f"v{i}": "0" * 64 for i in range(9)})
    assert said(cache, far).count(",") == 3
    assert " more" in said(cache, far)


# --- what is not kept


def test_what_has_no_name_that_lasts_is_not_kept(cache):
    plugs = {"predict": [f"my.module.wrapper#{'0' * 32}"]}
    why = cache.store(asked(plugs=plugs), outcome(plugs=plugs))
    assert why == "my.module.wrapper has no name that lasts, so nothing would find the result"
    assert cache.store(asked(plugs=plugs), outcome(plugs=None)) == "", "a stage that never asked is kept"


def test_what_cannot_be_told_apart_is_neither_kept_nor_found(cache):
    for question in (asked(weights={"vae": "none"}), asked(code="")):
        why = cache.store(question, outcome())
        assert "nothing tells it from" in why
        assert cache.find(question) == (None, why)
    assert files(cache) == []


def test_half_a_result_is_not_kept(cache):
    assert cache.store(ASKED, outcome(stopped=True)) == "it is not complete"


def test_the_code_of_a_stage_is_its_files(monkeypatch):
    scope = {"BaseStage": BaseStage, "__name__": "a notebook"}
    exec("class Mine(BaseStage):\n    def run(self, inputs, ctx):\n        return {}", scope)
    assert code_of(scope["Mine"]()) == ""
    monkeypatch.setitem(sys.modules, "a notebook", types.ModuleType("a notebook"))
    assert code_of(scope["Mine"]()) == "", "a module without a file"
    codes = [code_of(EncodeText()), code_of(DecodeLatents())]
    assert len({*codes, ""}) == 3, "also that of a run behind a decorator"
    assert codes[0] == code_of(EncodeText())


# --- the limit


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path):
    cache = Cache(tmp_path, 5000)
    questions = [asked(inputs={"prompt": f"{i}"}) for i in range(4)]
    for i in range(3):
        assert cache.store(questions[i], outcome(float(i), size=250)) == ""
    assert value(cache.find(questions[0])[0]) == 0.0
    cache.store(questions[3], outcome(3.0, size=250))
    assert [value(cache.find(q)[0]) for q in questions] == [0.0, None, 2.0, 3.0]
    assert "was evicted to make room" in said(cache, questions[1])
    sizes = [file.stat().st_size for file in files(cache)]
    assert (len(sizes), sum(sizes)) == (3, kept_bytes(cache))
    assert sum(sizes) <= 5000


def test_one_that_is_larger_than_the_limit_is_not_kept_and_moves_nobody_out(tmp_path):
    cache = Cache(tmp_path, 5000)
    cache.store(ASKED, outcome())
    assert cache.store(asked(version=2), outcome(size=2000)) == "it has 0.0 MB, the cache may have 0.0 MB"
    assert value(cache.find(ASKED)[0]) == 1.0


def test_a_smaller_limit_holds_from_the_next_store_or_trim_on(cache):
    for i in range(6):
        cache.store(asked(version=i), outcome(size=250))
    small = Cache(cache.folder, 3000)
    assert kept_bytes(small) > 3000
    freed = small.trim()
    assert freed > 0
    assert kept_bytes(small) == sum(f.stat().st_size for f in files(small)) <= 3000


def test_clear_forgets_everything(cache):
    for i in range(3):
        cache.store(asked(version=i), outcome())
    size = kept_bytes(cache)
    assert cache.contents() == {"encode_text": (3, size)}
    assert cache.clear() == size > 0
    assert (files(cache), cache.contents()) == ([], {})
    assert said(cache) == "no result of encode_text is kept"


# --- damage and crashes


@pytest.mark.parametrize("how", ["a bit", "the end", "everything"])
def test_a_damaged_file_is_a_miss_and_is_removed(cache, how):
    cache.store(ASKED, outcome())
    (file,) = files(cache)
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes({"a bit": data, "the end": data[:-1], "everything": b""}[how])
    assert cache.find(ASKED) == (None, "its file was damaged, and is removed")
    assert files(cache) == []
    assert cache.store(ASKED, outcome(2.0)) == ""
    assert value(cache.find(ASKED)[0]) == 2.0


def test_an_entry_without_a_file_and_a_file_without_an_entry(cache):
    cache.store(ASKED, outcome())
    (file,) = files(cache)
    ours = f"{'0' * 32}-{'0' * 8}.safetensors", f".ditkit-{'0' * 12}.part"
    stray, left, mine = (cache.results / name for name in (*ours, "x.safetensors"))
    for each in (stray, left, mine):
        each.write_bytes(b"?")
    with new_file(cache.results / "x") as (part, _):
        os.utime(part, (1, 1))  # a clock that has jumped
        again = Cache(cache.folder, 10**6)
        assert files(again) == sorted([file, mine, part]), "what somebody is writing now is left alone"
    mine.unlink()
    file.unlink()
    assert cache.find(ASKED)[1].startswith("its file was removed")
    assert "its file is gone" in said(cache)
    assert cache.contents() == {}


def test_nothing_but_its_own_files_is_touched(tmp_path):
    mine = tmp_path / "holiday.safetensors"
    mine.write_bytes(b"mine")
    cache = Cache(tmp_path, 10**6)
    cache.store(ASKED, outcome())
    cache.clear()
    Cache(tmp_path, 10**6)
    assert mine.read_bytes() == b"mine"


def test_a_damaged_index_never_stops_a_run(cache):
    cache.store(ASKED, outcome())
    for suffix in ("-wal", "-shm"):
        Path(f"{cache.index.file}{suffix}").unlink(missing_ok=True)
    cache.index.file.write_bytes(b"no database at all" * 100)
    assert cache.find(ASKED)[1].startswith("the cache cannot be read (")
    assert cache.store(ASKED, outcome()).startswith("the cache cannot be written (")
    with pytest.raises(OutputError, match="Remove the folder"):
        cache.contents()
    again = Cache(cache.folder, 10**6)
    assert again.told == f"the cache {cache.folder} is not used (file is not a database)"
    assert again.find(ASKED) == (None, "the cache cannot be read (file is not a database)")
    assert again.store(ASKED, outcome()) == "the cache cannot be written (file is not a database)"
    assert again.clear() > 0
    assert files(again) == []
    assert (again.store(ASKED, outcome(2.0)), again.told) == ("", "")
    assert value(Cache(cache.folder, 10**6).find(ASKED)[0]) == 2.0


def test_an_index_of_another_version_is_left_alone_until_it_is_cleared(cache):
    cache.store(ASKED, outcome())
    with cache.index.writing() as db:
        db.execute("PRAGMA user_version = 7")
    other = Cache(cache.folder, 10**6)
    assert other.told.endswith("(it is of version 7, and this ditkit knows version 1)")
    assert other.find(ASKED)[0] is None
    assert len(files(cache)) == 1
    assert other.clear() > 0
    assert Cache(cache.folder, 10**6).told == ""


@pytest.mark.parametrize("how", ["a full disk", "a read-only disk"])
def test_a_disk_that_takes_nothing_is_read(how):
    """Every result that is there is used, and what cannot be kept is said."""
    with open_to_all() as folder:
        cache = Cache(folder, 10**6)
        cache.store(ASKED, outcome(settings={"steps": 4}))
        places = [folder, cache.results.parent, cache.results]
        for file in folder.rglob("*.*"):
            file.chmod(0o666)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

        def work():
            cache = Cache(folder, 10**6)
            found, why = cache.find(ASKED)
            kept = cache.store(OTHER, outcome(2.0, {"steps": 5}))
            return value(found), why[:7], kept, cache.told, cache.contents()

        for place in places:
            place.chmod(0o555 if how == "a read-only disk" else 0o777)
        found, why, refused, told, contents = child(work, room=0 if how == "a full disk" else None, nobody=True)
        for place in places:
            place.chmod(0o777)
        assert (found, why) == (1.0, "made on")
        assert refused.startswith("the cache cannot be written (")
        assert told.startswith(f"the cache {folder} is only read (")
        assert contents.keys() == {"encode_text"}
        assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("name", ["v1", "v1/results", "v1/index.sqlite", "v1/index.sqlite-wal"])
def test_links_lead_nowhere(tmp_path, name):
    """A folder that somebody unpacked: what is behind its links is neither written nor removed."""
    mine, folder = tmp_path / "mine", tmp_path / "cache"
    mine.mkdir()
    kept = [mine / f"{'0' * 32}-{'0' * 8}.safetensors", mine / f".ditkit-{'0' * 12}.part", mine / "empty"]
    for file in kept:
        file.write_bytes(b"")
    link = folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(kept[2] if "index" in name else mine)
    with pytest.raises(SetupError, match="is a link, which may lead anywhere"):
        Cache(folder, 10**6)
    assert sorted(mine.iterdir()) == sorted(kept)
    assert [file.read_bytes() for file in kept] == [b""] * 3


@pytest.mark.parametrize("kind", ["device", "itself", "pipe", "another result"])
def test_an_entry_that_is_something_else(tmp_path, cache, kind):
    cache.store(ASKED, outcome())
    (file,) = files(cache)
    other = Cache(tmp_path / "other", 10**6)
    other.store(OTHER, outcome(2.0, {"steps": 5}))
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "another result":
        file.write_bytes(files(other)[0].read_bytes())
        with cache.index.writing() as db:
            db.execute("UPDATE entries SET sha256 = ?", (hashlib.sha256(file.read_bytes()).hexdigest(),))
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file)
    found, why = cache.find(ASKED)
    assert found is None
    assert why.startswith("its file ")


def test_a_setting_that_flipped_in_the_index_finds_nothing_wrong(cache):
    cache.store(ASKED, outcome(settings={"steps": 4}))
    with cache.index.writing() as db:
        db.execute("""UPDATE entries SET about = replace(about, '"steps": 4', '"steps": 5')""")
    assert cache.find(OTHER)[0] is None


@pytest.mark.parametrize(
    "damage", ["about = '{}'", "about = 'null'", "about = '{\"settings\": 1}'", "made = 'x'", "made = 1e300"]
)
def test_a_damaged_row_never_stops_a_run(cache, damage):
    cache.store(ASKED, outcome())
    with cache.index.writing() as db:
        db.execute(f"UPDATE entries SET {damage}")
    found, why = cache.find(ASKED)
    assert found is None
    assert why.startswith("the index of the cache is damaged")


def test_a_damaged_row_never_removes_files_elsewhere(cache):
    cache.store(ASKED, outcome())
    other = cache.folder / "mine.txt"
    other.write_text("mine")
    with cache.index.writing() as db:
        db.execute("UPDATE entries SET file = '../../mine.txt'")
    assert cache.find(ASKED)[0] is None
    cache.clear()
    assert other.read_text() == "mine"


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"the cache .*file"):
        Cache(tmp_path / "file", 1)


def test_nobody_else_can_read_it(tmp_path):
    cache = Cache(tmp_path / "a" / "b", 10**6)
    cache.store(ASKED, outcome())
    for folder in (tmp_path / "a", cache.folder, cache.results.parent, cache.results):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(cache)] == [0o600]


def test_where_the_folder_of_the_user_is(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of("default") == tmp_path / "ditkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder_of("default") == Path.home() / ".cache" / "ditkit"
    monkeypatch.setattr("sys.platform", "darwin")
    assert folder_of("default") == Path.home() / "Library" / "Caches" / "ditkit"
    assert folder_of("~/x") == Path.home() / "x"


# --- many processes

LIMIT = 30_000


def hammer(folder, seed, end, told):
    """Finds, stores, evicts, clears; every result says by its content which question it answers."""
    try:
        draw, hits = random.Random(seed), 0
        while time.monotonic() < end:
            cache = Cache(folder, LIMIT)
            for _ in range(20):
                i = draw.randrange(40)
                question = asked(inputs={"prompt": str(i)})
                found, why = cache.find(question)
                hits += found is not None
                if found is not None and value(found) != i:
                    raise AssertionError(f"{i} was answered with {value(found)}")
                if "cannot be" in why or "damaged" in why:
                    raise AssertionError(why)
                if found is None and (why := cache.store(question, outcome(float(i), size=draw.randrange(50, 500)))):
                    raise AssertionError(why)
            if draw.random() < 0.02:
                cache.clear()
        told.put(hits)
    except BaseException:
        told.put(traceback.format_exc())


@pytest.mark.slow
def test_many_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    told, end = context.Queue(), time.monotonic() + 4
    processes = [context.Process(target=hammer, args=(tmp_path, seed, end, told)) for seed in range(4)]
    for process in processes:
        process.start()
    said = [told.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert [x for x in said if isinstance(x, str)] == []
    assert sum(said) > 10, "some were found"
    cache = Cache(tmp_path, LIMIT)
    assert sum(file.stat().st_size for file in files(cache)) == kept_bytes(cache) <= LIMIT
    with sqlite3.connect(cache.index.file) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- hashes of files


def settled(file, data):
    """A file that has not changed for a while: nothing can set the ctime back, so this waits for it."""
    file.write_bytes(data)
    while time.time() - file.stat().st_ctime < 2.2:
        time.sleep(0.1)
    return file


@pytest.mark.slow
def test_a_hash_is_read_from_disk_in_another_process_and_never_for_another_content(tmp_path):
    file = settled(tmp_path / "weights", b"old")
    (tmp_path / "hashes").mkdir()
    one = Hashes()
    one.keep_in(tmp_path / "hashes")
    right = one.of(file)
    with sqlite3.connect(tmp_path / "hashes" / "hashes.sqlite") as db:
        db.execute("UPDATE hashes SET sha256 = ?", ("5" * 64,))
    other = Hashes()
    other.keep_in(tmp_path / "hashes")
    assert other.of(file) == "5" * 64
    before = file.stat()
    file.write_bytes(b"new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert one.of(file) == other.of(file) != right
    assert other.of(file) not in ("remembered", right)


def test_a_young_file_is_not_remembered(tmp_path):
    file, hashes = tmp_path / "weights", Hashes()
    hashes.keep_in(tmp_path)
    file.write_bytes(b"1")
    hashes.of(file)
    with sqlite3.connect(tmp_path / "hashes.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM hashes").fetchone() == (0,)
    assert hashes._known == {}


def test_a_disk_that_fails_costs_time_only(tmp_path):
    file, hashes = tmp_path / "weights", Hashes()
    file.write_bytes(b"1")
    hashes.keep_in(tmp_path)
    right = Hashes().of(file)
    (tmp_path / "hashes.sqlite").write_bytes(b"no database" * 500)
    assert hashes.of(file) == right
