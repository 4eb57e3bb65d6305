"""The plan of the house, kept by tests: what no file may import, what is public, what an import costs.

Who may import whom stands in ``test_import_ranks.py``."""

import ast
import functools
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ditkit

SOURCE = Path(ditkit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

PUBLIC = {
    "BaseStage", "Cancel", "Context", "DitkitError", "Event", "Events", "Field", "Interrupted", "Pipeline", "Request",
    "StageList", "Result", "Seams", "Setup", "Site", "Stage", "State", "Step", "Swap", "load", "switch",
}  # fmt: skip
# Rooms where 1000 is the number of milliseconds in a second, or (mlx) a distance from the largest float16.
MILLISECONDS = {"media", "cli", "mlx"}
LIGHT = [
    "ditkit", "errors", "events", "request", "setup", "state", "config", "contracts", "media", "shapes.draw",
    "shapes.measure", "schedulers", "schedulers.sigmas", "schedulers.table", "checkpoints.kinds.wan", "pipeline",
    "samples",
    "receipt", "assembly", "replay",
]  # fmt: skip


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(
        "TYPE_CHECKING" in (getattr(n, "id", ""), getattr(n, "attr", "")) for n in ast.walk(node.test)
    )


def imports(node: ast.AST) -> list[str]:
    """Dotted names of the modules that are imported in this node, functions included, TYPE_CHECKING blocks not."""
    if is_type_checking(node):
        return []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}"]
    return [name for child in ast.iter_child_nodes(node) for name in imports(child)]


def at_the_top(file: Path) -> list[str]:
    """What is imported when the module is."""
    nodes = [node for node in parsed(file).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for node in nodes for name in imports(node)]


@pytest.mark.slow
def test_no_file_needs_diffusers():
    for file in FILES:
        tops = {name.split(".")[0] for name in imports(parsed(file))}
        assert not tops & {"diffusers", "accelerate", "cloudpickle", "dill", "marshal", "shelve"}, file


@pytest.mark.slow
def test_heavy_packages_are_imported_where_they_are_used():
    for file in FILES:
        tops = {name.split(".")[0] for name in at_the_top(file)}
        assert not tops & {"transformers", "tokenizers", "av", "PIL", "ftfy"}, file


@pytest.mark.slow
def test_nothing_is_unpickled():
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert given.get("weights_only") is True, file


@pytest.mark.slow
def test_of_pickle_only_its_error_is_used():
    """To refuse a pickle that needs code is the one reason to import it."""
    for file in FILES:
        tree = parsed(file)
        assert "pickle" not in {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}, file
        aliases = [a for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name == "pickle"]
        assert all(a.asname is None for a in aliases), file
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "pickle"] if aliases else []
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.value in names]
        assert len(names) == len(attributes), file
        assert {n.attr for n in attributes} <= {"UnpicklingError"}, file


def test_every_module_says_what_it_is():
    for file in FILES:
        tree = parsed(file)
        assert not tree.body or ast.get_docstring(tree), f"{file} has no docstring"


def test_a_thousand_stands_in_one_place():
    """timestep = 1000 sigma is said once; everything else asks the transformer for its scale."""
    found = []
    for file in FILES:
        if file.relative_to(SOURCE).parts[0] in MILLISECONDS:
            continue
        tree = parsed(file)
        written = {  # a field of the scheduler's file that diffusers reads, not ours
            value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and key.value == "num_train_timesteps"
        }
        for node in ast.walk(tree):
            if node in written:
                continue
            if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 1000:
                found.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    assert len(found) == 1
    assert found[0].startswith("models/wan.py:")


# --- the public face


def _begins(node: ast.expr) -> str:
    """What a text begins with, as far as it is written out."""
    if isinstance(node, ast.JoinedStr):
        return _begins(node.values[0])
    if isinstance(node, ast.IfExp):
        return _begins(node.body)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_what_to_do_begins_with_a_capital(file):
    calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call) and len(n.args) == 3]
    errors = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id.endswith(("Error", "Dependency", "Lost"))]
    assert [begins for n in errors if (begins := _begins(n.args[2]))[:1].islower()] == []


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


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_does_not_import_torch(module):
    name = module if module == "ditkit" else f"ditkit.{module}"
    heavy = "{'torch', 'transformers', 'diffusers', 'av', 'PIL', 'tokenizers'}"
    assert python(f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_importing_ditkit_is_quick():
    code = "import time; begun = time.perf_counter(); import ditkit; print(time.perf_counter() - begun)"
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.3
