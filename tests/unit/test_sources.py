"""What a plug or a stage out of a file imports counts in its name: each case is one edit beside the file."""

import hashlib
import importlib
import json
import subprocess
import sys
import zipfile

import pytest

from ditkit.errors import SetupError
from ditkit.registry import PlugSpec, bring
from ditkit.sources import code_sha256, files_of, version_of

PLUG = """
{imports}
from dataclasses import dataclass
import ditkit, torch, numpy, os
@dataclass(frozen=True)
class P:
    seam = "run_blocks"
    def __call__(self, inner):
        return inner
class S(ditkit.BaseStage):
    name = "mine"
    after = "encode_text"
    def run(self, inputs, ctx):
        {inside}
        return {{}}
"""
CASES = {  # imports of the file, imports in a function, the file beside it that is edited
    "a module": ("import helper_a", "", "helper_a.py"),
    "a plain value": ("from helper_b import VALUE", "", "helper_b.py"),
    "a module behind a module": ("import front_c", "", "helper_c.py"),
    "an import in a function": ("", "import helper_d", "helper_d.py"),
    "a package": ("import pack_e.part", "", "pack_e/part.py"),
    "the head of a package": ("import pack_f.part", "", "pack_f/__init__.py"),
    "a part named by from": ("from pack_g import part", "", "pack_g/part.py"),
    "a relative import": ("from pack_h.part import VALUE", "", "pack_h/other.py"),
    "a folder without a head": ("import space_i.part", "", "space_i/part.py"),
    "by a name": ("import importlib\nhelper = importlib.import_module('helper_j')", "", "helper_j.py"),
    "an optional import": ("try:\n    import helper_k, missing_k\nexcept ImportError:\n    pass", "", "helper_k.py"),
    "all of a module": ("from helper_l import *", "", "helper_l.py"),
    "one way or the other": (
        "try:\n    from .helper_n import *\nexcept ImportError:\n    from helper_n import *",
        "",
        "helper_n.py",
    ),
    "by a name in a function": ("", "__import__('importlib').import_module('helper_o')", "helper_o.py"),
    "one called as one of Python's": ("import sched", "", "sched.py"),
    "the package around it": ("from pack_p.part import *", "", "pack_p/__init__.py"),
    "a place that the file adds": ("import sys\nsys.path.insert(0, __file__[:-8])\nimport under_m", "", "x/under_m.py"),
}
BESIDE = {"front_c.py": "import helper_c", "pack_h/part.py": "from .other import VALUE"}
NAMES = """
import json, sys
from ditkit.assembly.plugs import plugs_of, received
from ditkit.execution.records import code_of
from ditkit.registry import PlugSpec, brought
found = {}
for file in sys.argv[1:]:
    placed = str(PlugSpec.parse(file + ":P").placed())
    plug = plugs_of([placed])[0].made()
    assert received([plug.plug]).run_blocks[0].fingerprint == plug.fingerprint
    again = plugs_of([file + ":P"])[0].made()
    assert again.fingerprint == plug.fingerprint, "also when all is imported"
    stage = brought(PlugSpec.parse(placed).sha256).module.S()
    found[file] = [plug.fingerprint, code_of(stage)]
print(json.dumps(found))
"""


def names(files, folder):
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{NAMES}", *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Names of the plug and the stage: before the edit, once more, after it; and of a file that imports nothing."""
    folder = tmp_path_factory.mktemp("beside")
    files = []
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text + "\n")
    for n, (imports, inside, beside) in enumerate(CASES.values()):
        (folder / beside).parent.mkdir(exist_ok=True)
        (folder / beside).write_text("VALUE = 1\n")
        if beside.startswith("pack"):
            (folder / beside).parent.joinpath("__init__.py").touch()
            (folder / beside).parent.joinpath("part.py").touch()
        files.append(folder / ("x" if "under" in beside else ".") / f"plug_{n:02}.py".replace("plug_16", "plug"))
        files[-1].write_text(PLUG.format(imports=imports, inside=inside or "pass"))
    files.append(folder / "alone.py")
    files[-1].write_text(PLUG.format(imports="", inside="pass"))
    before, again = names(files, folder), names(files, folder)
    for _, _, beside in CASES.values():
        (folder / beside).write_text("VALUE = 222\n")
    return before, again, names(files, folder), files


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_a_file_imports_counts(told, case):
    at = [*CASES].index(case)
    before, again, after, _ = (each if isinstance(each[0], str) else each[at] for each in told)
    assert before == again
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert before[0].split("@")[1][:32] == after[0].split("@")[1][:32], "the file is the same"


def test_what_others_import_changes_no_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack_q").mkdir()
    for name, text in (("__init__", "VALUE = 1"), ("other", "VALUE = 2"), ("uses", "from pack_q import VALUE")):
        (tmp_path / "pack_q" / f"{name}.py").write_text(text + "\n")
    (tmp_path / "plug_q.py").write_text("import importlib\nfrom pack_q import VALUE, uses\nNAME = 'pack_q.other'\n")
    before = code_sha256("plug_q")
    importlib.import_module("plug_q")
    importlib.import_module("pack_q.other")
    assert code_sha256("plug_q") == before
    (tmp_path / "pack_q" / "uses.py").write_text("from pack_q import VALUE  # edited\n")
    assert code_sha256("plug_q") == before, "what was imported is what runs"
    for name in [name for name in sys.modules if name.startswith(("plug_q", "pack_q"))]:
        del sys.modules[name]
    assert code_sha256("plug_q") != before


def test_a_module_that_is_brought_counts_as_it_was_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "plug_r.py"
    file.write_text("VALUE = 1\n")
    first = bring("plug_r")
    assert first.sha256 == PlugSpec("plug_r", attribute="x").placed().sha256
    file.write_text("VALUE = 22\n")
    again = bring("plug_r")
    assert (again.module.VALUE, again.sha256) == (1, first.sha256)
    del sys.modules["plug_r"]
    importlib.invalidate_caches()
    assert bring("plug_r").sha256 != first.sha256


def test_a_module_in_an_archive_counts_with_it(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped_s.py", "VALUE = 1\n")
    monkeypatch.syspath_prepend(archive)
    assert code_sha256("zipped_s") == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_a_long_chain_of_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for n in range(1500):
        (tmp_path / f"chain_{n}.py").write_text(f"def f():\n    import chain_{n + 1}\n")
    assert len(files_of("chain_0")) == 1500


def test_a_package_that_is_installed_to_be_edited_counts_by_its_files(tmp_path, monkeypatch):
    place = tmp_path / "site-packages"
    (about := place / "kit_t-1.0.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kit_t\nVersion: 1.0\n")
    (about / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    (place / "kit_t.py").write_text("")
    (place / "loose_t.py").write_text("")  # of no package at all
    monkeypatch.syspath_prepend(place)
    empty = hashlib.sha256(b"").hexdigest()
    assert files_of("kit_t", "loose_t") == {"kit_t": empty, "loose_t": empty}


@pytest.mark.slow
def test_a_file_that_imports_nothing_of_its_own_has_its_own_sha256(told):
    before, _, after, files = told
    assert before[-1] == after[-1]
    assert before[-1][0] == f"alone.py@{PlugSpec(str(files[-1])).placed().sha256}:P"


def test_packages_count_by_version(tmp_path, monkeypatch):
    place = tmp_path / "site-packages"
    (place / "kit_n").mkdir(parents=True)
    (place / "kit_n" / "__init__.py").write_text("")
    (place / "kit_n" / "rows.py").write_text("from kit_n import more\n")
    (place / "kit_n" / "more.py").write_text("")
    (tmp_path / "uses_n.py").write_text("import kit_n.rows\n")
    monkeypatch.syspath_prepend(place)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for version in ("1.0", "1.1"):
        (about := place / f"kit_n-{version}.dist-info").mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kit_n\nVersion: {version}\n")
        version_of.cache_clear()
        found.append([code_sha256("uses_n"), code_sha256("kit_n.rows")])
        about.rename(about.with_suffix(".old"))
    assert not {*found[0]} & {*found[1]}


@pytest.mark.slow
def test_a_pin_holds_what_the_file_imports(told):
    before, _, _, files = told
    pin = before[0][0].split("@")[1].partition(":")[0]
    sys.path.insert(0, str(files[0].parent))
    try:
        with pytest.raises(SetupError, match="its file is the one that is asked for, and what that imports is not"):
            bring(str(files[0]), pin)
        assert bring(str(files[0]), pin[:32]).sha256 != pin
    finally:
        sys.path.remove(str(files[0].parent))
        del sys.modules["helper_a"]
