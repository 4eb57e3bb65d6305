"""The cache of results: its database, its files, its folder. Whatever they hold, no result may come out that was not
put in, and nothing may be raised but what the cache says that it raises."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3

import torch

from ditkit.errors import DitkitError
from ditkit.store.cache import Cache, StageResult
from ditkit.store.hashes import Hashes
from ditkit.store.reasons import CacheKey

from ..mutate import as_json, bytes_mutated, entry_mutated, tree_mutated
from ..watch import command
from .state import mutated

NAMED = ()
LIMIT = 10**7
KEY = CacheKey("encode_text", 1, "c0de", {"wide": False}, {"text_encoder": "f" * 64}, {"prompt": "a" * 64},
               {"steps": 4, "guidance_scale": 5.0, "guided": True}, {})  # fmt: skip
COLUMNS = ("stage", "first", "key", "about", "file", "sha256", "size", "made", "machine", "used", "gone")
VALUES = (None, 0, -1, 2**63 - 1, -(2**63), 1e308, float("inf"), "", "x", "NaN", b"\xff\xfe", "../../../outside/victim",
          "\x1b[31m", "[]", "{}", "null", "1", '{"settings": 1}', '{"settings": {}, "plugs": null}', "[" * 100_000,
          "a" * 100_000, "a\0b", b"\xed\xa0\x80")  # fmt: skip
SCHEMAS = ("DROP TABLE entries", "ALTER TABLE entries RENAME COLUMN about TO x", "DROP INDEX by_first",
           "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END", "CREATE VIEW hashes AS SELECT 1",
           "PRAGMA user_version = 7", "DELETE FROM entries", "ALTER TABLE entries ADD COLUMN z",
           "PRAGMA journal_mode = DELETE", "CREATE TABLE hashes (path, stamp, sha256)")  # fmt: skip


def _key(number: int) -> CacheKey:
    return dataclasses.replace(KEY, inputs={"prompt": f"{number:064d}"})


def _result(number: int) -> StageResult:
    fields = {"prompt_embeds": torch.full((1, 50), float(number)), "prompt_lengths": [1]}
    return StageResult(fields, {"guided": True}, None)


def prepare(folder):
    global SOUND
    SOUND = folder / "cache"
    cache = Cache(SOUND, LIMIT)
    for number in range(6):
        cache.store(_key(number), _result(number))
    Hashes().keep_in(SOUND / "v1")
    (SOUND / "v1" / "x").write_text("x")
    os.utime(SOUND / "v1" / "x", (1, 1))


def make(rng, folder) -> str:
    cache = shutil.copytree(SOUND, folder / "cache")
    index = cache / "v1" / "index.sqlite"
    what = rng.choice(("bytes", "bytes", "row", "row", "row", "about", "schema", "entry", "entry", "wal", "link"))
    if what == "bytes":
        file = rng.choice((index, index, cache / "v1" / "hashes.sqlite"))
        file.write_bytes(bytes_mutated(rng, file.read_bytes(), 32)[0])
    elif what == "wal":
        (cache / "v1" / "index.sqlite-wal").write_bytes(rng.randbytes(rng.choice((10, 32, 5000))))
        (cache / "v1" / "index.sqlite-shm").write_bytes(rng.randbytes(rng.choice((10, 32768))))
    elif what == "entry":
        file = rng.choice(sorted((cache / "v1" / "results").iterdir()))
        data = file.read_bytes()
        data = mutated(rng, data) if rng.random() < 0.5 else bytes_mutated(rng, data, 16)[0]
        file.write_bytes(data)
        if rng.random() < 0.5:  # whoever can write the folder can make the hash fit
            _change(index, "UPDATE entries SET sha256 = ? WHERE file = ?", hashlib.sha256(data).hexdigest(), file.name)
            return "rehashed"
    elif what == "link":
        results = cache / "v1" / "results"
        entry_mutated(rng, rng.choice((*sorted(results.iterdir()), index, results, cache / "v1", cache,
                                       results / ".x.tmp", results / "zz.safetensors")))  # fmt: skip
    elif what == "schema":
        _change(index, rng.choice(SCHEMAS))
    elif what == "about":
        about = json.loads(_change(index, "SELECT about FROM entries WHERE id = 3")[0])
        text = as_json(tree_mutated(rng, about)[0]).decode("utf-8", "replace")
        _change(index, "UPDATE entries SET about = ?" + rng.choice(("", " WHERE id = 3")), text)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            column, value = rng.choice(COLUMNS), rng.choice(VALUES)
            _change(index, f"UPDATE entries SET {column} = ?" + rng.choice(("", " WHERE id = 3")), value)
    return rng.choice((*["use"] * 20, *["small"] * 10, "show", "trim"))


def _change(index, text: str, *values):
    db = sqlite3.connect(index, isolation_level=None)
    try:
        with contextlib.suppress(sqlite3.Error, OverflowError):
            return db.execute(text, values).fetchone()
    finally:
        db.close()


def run(folder, how):
    at = folder / "cache"
    if how in ("show", "trim"):
        command("cache", how, "--cache", at)
        return
    cache = Cache(at, 3000 if how == "small" else LIMIT)
    for number in (2, 3, 9):
        found, why = cache.find(_key(number))
        if not isinstance(why, str) or len(why) > 2000:
            raise AssertionError(f"it says {len(why)} letters")
        if found is not None and how != "rehashed" and found.written["prompt_embeds"][0, 0].item() != number:
            raise AssertionError(f"another result came back for {number}")
    for number in (20, 3):
        if not isinstance(cache.store(_key(number), _result(number)), str):
            raise AssertionError("no word")
    for what in (cache.contents, cache.trim, cache.clear):
        with contextlib.suppress(DitkitError):
            what()
    hashes = Hashes()
    with contextlib.suppress(sqlite3.Error, OSError):  # as it promises
        hashes.keep_in(at / "v1")
    if (at / "v1" / "x").is_file() and hashes.of(at / "v1" / "x") != hashlib.sha256(b"x").hexdigest():
        raise AssertionError("another hash")
