"""The plan of the house, kept by tests: who may import whom, what is public, what an import costs."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ditkit

SOURCE = Path(ditkit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room imports rooms of a lower rank and itself. One line is one room, unless a comma separates them.
RANKS = [
    "errors events request setup state config",
    "contracts, media, shapes",
    "nn, schedulers, checkpoints",
    "models, guidance",
    "pipeline stages",
    "build samples receipt replay pipe",
    "lab",
    "cli __main__",
]
ROOMS = {
    module: (rank, room)
    for rank, rooms in enumerate(RANKS)
    for room in rooms.split(", ")
    for module in room.split()
}  # fmt: skip
PUBLIC = {
    "BaseStage", "Context", "DitkitError", "Event", "Events", "Field", "Interrupted", "Pipe", "Pipeline", "Request",
    "Result", "Seams", "Setup", "Site", "Stage", "State", "Step", "Swap", "load",
}  # fmt: skip
MILLISECONDS = {"media", "cli"}  # rooms where 1000 is the number of milliseconds in a second
LIGHT = [
    "ditkit", "errors", "events", "request", "setup", "state", "config", "contracts", "media", "shapes.draw",
    "shapes.measure", "schedulers", "schedulers.sigmas", "schedulers.table", "checkpoints.keys", "pipeline", "samples",
    "receipt", "build", "pipe", "replay",
]  # fmt: skip


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file: Path) -> str:
    """The first name below ditkit: ``nn`` for nn/rope.py, ``__init__`` for the package itself."""
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(
        "TYPE_CHECKING" in (getattr(n, "id", ""), getattr(n, "attr", "")) for n in ast.walk(node.test)
    )


def imported(node: ast.AST, package: str) -> list[str]:
    """Dotted names of everything that is imported in this node, functions included, TYPE_CHECKING blocks not."""
    if is_type_checking(node):
        return []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        above = parents[: len(parents) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return [name for child in ast.iter_child_nodes(node) for name in imported(child, package)]


def imports(file: Path, of: ast.AST | None = None) -> list[str]:
    package = ".".join(("ditkit", *file.relative_to(SOURCE).parts[:-1]))
    return imported(parsed(file) if of is None else of, package)


def at_the_top(file: Path) -> list[str]:
    """What is imported when the module is."""
    found = []
    for node in parsed(file).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            found += imports(file, node)
    return found


def forbidden(file: Path) -> list[str]:
    """What this file imports against the ranks."""
    bad = []
    for name in imports(file):
        parts = name.split(".")
        if parts[0] != "ditkit" or place(file) == "__init__":
            continue
        target = parts[1] if len(parts) > 1 else "load"
        if target == "__version__":
            continue
        if target in PUBLIC:  # `import ditkit`, `from ditkit import load`: the highest room that could be behind it
            target = "pipe"
        if target not in ROOMS:
            bad.append(f"{name}: no such room")
            continue
        (own, room), (rank, other) = ROOMS[place(file)], ROOMS[target]
        if rank > own or (rank == own and other != room):
            bad.append(name)
    return bad


def test_every_room_has_a_rank():
    rooms = {place(file) for file in FILES} - {"__init__"}
    assert rooms == set(ROOMS), "write a new room into RANKS, and remove what is gone"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_a_file_imports_lower_ranks_only(file):
    assert forbidden(file) == []


def test_the_rank_test_can_see(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    cases = {
        "from ditkit.pipe import load": True,
        "import ditkit.build": True,
        "import ditkit": True,
        "from ditkit import build": True,
        "from ditkit import load": True,
        "def f():\n    from ditkit.stages import denoise": True,
        "class A:\n    def f(self):\n        import ditkit.cli": True,
        "from ditkit.guidance.cfg import x": True,  # another room of the same rank
        "from ..build import x": True,
        "from .. import pipe": True,
        "from ditkit.nowhere import x": True,
        "from .wan_vae import x": False,
        "from ditkit.nn import rope": False,
        "from ditkit import errors": False,
        "from ditkit import __version__": False,
        "from . import wan": False,
        "from .. import errors": False,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ditkit.pipe import Pipe": False,
        "import torch, os.path": False,
    }
    (tmp_path / "models").mkdir()
    for text, bad in cases.items():
        file = tmp_path / "models" / "new.py"
        file.write_text(text)
        assert bool(forbidden(file)) == bad, text


def test_no_file_needs_diffusers():
    for file in FILES:
        tops = {name.split(".")[0] for name in imports(file)}
        assert not tops & {"diffusers", "accelerate", "pickle", "cloudpickle", "dill", "marshal", "shelve"}, file


def test_heavy_packages_are_imported_where_they_are_used():
    for file in FILES:
        tops = {name.split(".")[0] for name in at_the_top(file)}
        assert not tops & {"transformers", "tokenizers", "av", "PIL", "ftfy"}, file


def test_nothing_is_unpickled():
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert given.get("weights_only") is True, file


def test_every_module_says_what_it_is():
    for file in FILES:
        tree = parsed(file)
        assert not tree.body or ast.get_docstring(tree), f"{file} has no docstring"


def test_a_thousand_stands_in_one_place():
    """timestep = 1000 sigma is said once; everything else asks the transformer for its scale."""
    found = []
    for file in FILES:
        if place(file) in MILLISECONDS:
            continue
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 1000:
                found.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    assert len(found) == 1
    assert found[0].startswith("models/wan.py:")


# --- the public face


def test_the_public_names():
    assert set(ditkit.__all__) == PUBLIC
    assert list(ditkit.__all__) == sorted(ditkit.__all__)
    assert {*PUBLIC, "__version__"} <= set(dir(ditkit))
    for name in PUBLIC:
        thing = getattr(ditkit, name)
        assert thing.__doc__, f"{name} has no docstring"
        assert thing.__module__.startswith("ditkit.")
    with pytest.raises(AttributeError, match="module 'ditkit' has no attribute 'lod'"):
        ditkit.lod  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = parsed(SOURCE / "__init__.py")
    (block,) = [node for node in tree.body if is_type_checking(node)]
    assert {alias.name for node in block.body for alias in node.names} == PUBLIC


# --- what an import costs


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_does_not_import_torch(module):
    name = module if module == "ditkit" else f"ditkit.{module}"
    heavy = "{'torch', 'transformers', 'diffusers', 'av', 'PIL', 'tokenizers'}"
    assert python(f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_importing_ditkit_is_quick():
    code = "import time; begun = time.perf_counter(); import ditkit; print(time.perf_counter() - begun)"
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.3
