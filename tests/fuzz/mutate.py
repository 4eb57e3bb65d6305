"""What is done to a sound input to make an odd one of it: bytes, trees of values, texts and folders.

A tree is what JSON and TOML say: dicts, lists, texts, numbers. ``Raw`` is a value that is written as it stands, so that
numbers of 5,000 digits and lists 100,000 deep can be spelled too. Leaves out: what each format is (``targets``)."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

INTS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62,
        2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
NAMES = ("", "a", "__metadata__", "\x1b[2J", "x" * 300, "\ud800", "../a", "a/b", "é\u202e漢", "0", "name", "steps")
PATHS = ("../outside/victim", "../../outside", "/etc/passwd", "/dev/zero", "/dev/stdin", ".", "..", "~", "", "/",
         "nowhere", "http://127.0.0.1:9/x", "hf:a/b@main", "a/b", "ray://127.0.0.1:9", "file:///etc/passwd",
         "\x00")  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A value as it is to be spelled."""

    text: str


class Twice(dict):
    """A table in which the key ``key`` stands a second time."""

    def __init__(self, table, key, value):
        if not isinstance(table, dict):
            raise TypeError("only a table has keys")
        super().__init__(table)
        self.key, self.value = key, value


def deep(opening: str, closing: str, count: int) -> Raw:
    return Raw(opening * count + closing * count)


def odd(rng):
    """A value that hardly anybody means."""
    return rng.choice((
        lambda: None, lambda: True, lambda: False, lambda: rng.choice(INTS), lambda: -rng.choice(INTS),
        lambda: Raw("1" + "0" * rng.choice((20, 400, 4299, 5000))), lambda: 1.5, lambda: 1e308, lambda: -0.0,
        lambda: Raw("1e999"), lambda: Raw(rng.choice(("NaN", "Infinity", "-Infinity", "nan", "inf"))),
        lambda: rng.choice(NAMES), lambda: "x" * rng.choice((300, 5000, 100_000)), lambda: "\x1b[31mred\x07\x00",
        lambda: rng.choice(PATHS), lambda: rng.choice(PATHS), lambda: [], lambda: {}, lambda: [None],
        lambda: {"a": 1}, lambda: {"": ""}, lambda: [[]], lambda: [0] * rng.choice((3, 1000)), lambda: ["a", "b"],
        lambda: [{"a": [1, "x", None]}], lambda: deep("[", "]", rng.choice((70, 2000, 100_000))),
        lambda: Raw('{"a":' * 1500 + "1" + "}" * 1500), lambda: rng.choice(("F32", "float32", "denoise", "0", "nan")),
        lambda: Raw(rng.choice(("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z"))),
        lambda: rng.choice(("a\nb", "\n", "\u2028", "a" * 70 + "\n", "%s", "{}", "[bold]x[/bold]", "[/x]", "$HOME")),
    ))()  # fmt: skip


# --- trees


def places(tree, at=()):
    """The path of every value in ``tree``."""
    found = [at]
    if isinstance(tree, dict):
        found += [place for key, value in tree.items() for place in places(value, (*at, key))]
    elif isinstance(tree, list):
        found += [place for i, value in enumerate(tree[:40]) for place in places(value, (*at, i))]
    return found


def value_at(tree, at):
    for key in at:
        tree = tree[key]
    return tree


def replaced(tree, at, value):
    if not at:
        return value
    value_at(tree, at[:-1])[at[-1]] = value
    return tree


def tree_mutated(rng, tree, most=3):
    """A copy of ``tree`` with one to ``most`` changes, and their names."""
    tree, told = _copy(tree), []
    for _ in range(rng.choice((1, 1, 1, 2, most))):
        inner = [place for place in places(tree) if place] or [()]
        change = rng.choice((_other, _other, _other, _gone, _renamed, _twice, _swapped, _grown, _nudged, _nudged))
        at = rng.choice(inner)
        try:
            tree = _copy(change(rng, tree, at, inner))
            told.append(f"{change.__name__[1:]} {'.'.join(map(str, at))}")
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
    return tree, "; ".join(told)[:200].encode(errors="replace").decode()


def _copy(tree):
    """Nothing in it stands in two places."""
    if isinstance(tree, Twice):
        return Twice(_copy(dict(tree)), tree.key, _copy(tree.value))
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [*map(_copy, tree)] if isinstance(tree, list) else tree


def _other(rng, tree, at, inner):
    return replaced(tree, at, odd(rng))


def _gone(rng, tree, at, inner):
    del value_at(tree, at[:-1])[at[-1]]
    return tree


def _renamed(rng, tree, at, inner):
    table = value_at(tree, at[:-1])
    table[rng.choice((*NAMES, f"{at[-1]}2", str(at[-1]).upper()))] = table.pop(at[-1])
    return tree


def _twice(rng, tree, at, inner):
    table = value_at(tree, at[:-1])
    return replaced(tree, at[:-1], Twice(table, at[-1], rng.choice((odd(rng), table[at[-1]]))))


def _swapped(rng, tree, at, inner):
    other = rng.choice(inner)
    one, two = value_at(tree, at), value_at(tree, other)
    if other[: len(at)] != at and at[: len(other)] != other:
        tree = replaced(replaced(tree, at, two), other, one)
    return tree


def _grown(rng, tree, at, inner):
    found = value_at(tree, at)
    if isinstance(found, dict):
        found[rng.choice(NAMES)] = odd(rng)
    elif isinstance(found, list):
        found.insert(rng.randrange(len(found) + 1), odd(rng))
    else:
        tree = replaced(tree, at, rng.choice(([found], {"a": found}, str(found))))
    return tree


def _nudged(rng, tree, at, inner):
    found = value_at(tree, at)
    if isinstance(found, bool):
        new = not found
    elif isinstance(found, int | float):
        new = rng.choice((found + 1, found - 1, found * 2, -found, float(found), str(found), found * 10**6))
    elif isinstance(found, str):
        new = rng.choice(
            (f"{found} ", found[:-1], found.upper(), f"{found}\x1b[0m", found * 50, f"\n{found}", f"{found}\ud800")
        )
    elif isinstance(found, list):
        new = rng.choice((found[:-1], found[::-1], found * 2, found * 100, dict(enumerate(found))))
    else:
        new = rng.choice(([found], list(found.items()), {}))
    return replaced(tree, at, new)


def as_json(tree) -> bytes:
    return _json(tree).encode("utf-8", "surrogatepass")


def _json(tree) -> str:
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, dict):
        pairs = [*tree.items(), *([(tree.key, tree.value)] if isinstance(tree, Twice) else [])]
        return "{" + ",".join(f"{json.dumps(str(key))}:{_json(value)}" for key, value in pairs) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ",".join(map(_json, tree)) + "]"
    return json.dumps(tree)


def as_toml(tree) -> bytes:
    """Plain values first, then the tables, which TOML wants last."""
    if not isinstance(tree, dict):
        return f"a = {_toml(tree)}\n".encode("utf-8", "surrogatepass")
    pairs = [*tree.items(), *([(tree.key, tree.value)] if isinstance(tree, Twice) else [])]
    lines = [f"{_toml(str(key))} = {_toml(value)}" for key, value in pairs if not isinstance(value, dict)]
    for key, table in pairs:
        if isinstance(table, dict):
            lines += [f"[{_toml(str(key))}]", *(f"{_toml(str(k))} = {_toml(v)}" for k, v in table.items())]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _toml(value) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        return '""'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else json.dumps(value)


# --- bytes and texts


def bytes_mutated(rng, data: bytes, most=8):
    """Bits flipped, pieces removed, doubled, moved, numbers made large; half of it near the beginning."""
    data, told = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 3, most))):
        how, n = rng.randrange(11), len(data)
        at = rng.randrange(n) if n else 0
        if rng.random() < 0.5:
            at = min(at, rng.randrange(1, 400))
        size = rng.choice((1, 4, 16, 256))
        if how == 0 and n:
            data[at % n] ^= 1 << rng.randrange(8)
        elif how == 1 and n:
            data[at % n] = rng.choice((0, 255, 127, 128, 32, 0x7B, 0x7D, 0x22, rng.randrange(256)))
        elif how == 2:
            del data[at:]
        elif how == 3:
            data += rng.randbytes(rng.choice((1, 7, 8, 64)))
        elif how == 4:
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = (rng.choice(INTS) & (256**width - 1)).to_bytes(width, rng.choice(("little", "big")))
        elif how == 5:
            del data[at : at + size]
        elif how == 6:
            data[at:at] = data[at : at + size]
        elif how == 7:
            data[at : at + size] = bytes(min(size, max(0, n - at)))
        elif how == 8 and n > 16:
            other, size = rng.randrange(n), rng.choice((4, 8, 32))
            data[at : at + size] = data[other : other + size]
        elif how == 9:
            data[at:at] = rng.randbytes(rng.choice((1, 3, 9)))
        elif how == 10 and n:
            for _ in range(rng.choice((2, 8, 32))):
                data[rng.randrange(n)] ^= 1 << rng.randrange(8)
        told.append(str(how))
    return bytes(data), f"bytes {' '.join(told)}"


def lines_mutated(rng, text: str, more=()):
    """Lines of a text doubled, removed, cut, moved, one of ``more`` added; or its bytes changed."""
    how, lines = rng.randrange(7), text.splitlines()
    at = rng.randrange(len(lines))
    if how == 0:
        lines.insert(at, rng.choice(lines))
    elif how == 1:
        del lines[at]
    elif how == 2:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    elif how == 3:
        lines[at] = lines[at].replace("=", rng.choice(("", "==", ".a =", "\x00=", "\ud800 =", ":")))
    elif how == 4 and more:
        lines.insert(at, rng.choice(more))
    elif how == 5:
        lines.insert(at, "[" + rng.choice(("a", "a.b.c", "." * 50, "a" + ".a" * 2000, "[a]", '""')) + "]")
    else:
        return bytes_mutated(rng, text.encode())
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"lines {how}"


# --- folders


def put(path: Path, data: bytes | str) -> Path:
    """Write ``data`` to a file of its own: what lay there may be shared with the sound input."""
    if path.is_symlink() or path.exists():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def copied(folder: Path, to: Path) -> Path:
    """A copy of ``folder`` whose files are shared until ``put`` replaces them."""
    return Path(shutil.copytree(folder, to, copy_function=os.link, symlinks=True, dirs_exist_ok=True))


def entry_mutated(rng, path: Path) -> str:
    """Something else where ``path`` is: a link to nothing, to itself or to a device, a pipe, a folder, rubbish."""
    if path.is_symlink() or path.exists():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    how = rng.choice(("gone", "pipe", "folder", "empty", "rubbish", "text", "link", "link", "link", "link"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "rubbish":
        path.write_bytes(rng.randbytes(rng.choice((1, 8, 100, 5000))))
    elif how == "text":
        path.write_text(rng.choice(("<!DOCTYPE html>", '{"message": "401"}', "version https://git-lfs", "[]", "null")))
    elif how == "link":
        to = rng.choice(
            (
                "nowhere",
                path.name,
                "..",
                ".",
                "/dev/zero",
                "/dev/full",
                "/etc/passwd",
                "../outside/victim",
                "/proc/self/mem",
            )
        )
        os.symlink(to, path)
        how = f"link to {to}"
    return f"{path.name}: {how}"
