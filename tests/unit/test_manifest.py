"""Manifests and locks: places are read as they are written, and a locked model is the same bytes or an error."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditkit.checkpoints.model.hub import HubName
from ditkit.checkpoints.model.lock import Entry, changes, lock_file, lock_text, make_lock, read_lock, verify
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.checkpoints.model.place import place_of, used
from ditkit.cli.main import main
from ditkit.errors import LoadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def parts(tiny_model, tmp_path):
    """A complete tiny model whose parts lie in three folders, and the manifest that joins them."""
    shutil.copytree(tiny_model / "vae", tmp_path / "a" / "vae")
    shutil.copytree(tiny_model / "transformer", tmp_path / "b" / "transformer")
    home = tmp_path / "home"
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_model / name, home / name)
    (home / "ditkit.toml").write_text(
        '[components]\nvae = "../a/vae"\ntext_encoder = "."\ntokenizer = "."\n'
        '[components.transformer]\npath = "../b"\nsubfolder = "transformer"\n[model]\nboundary = 0.875\n'
    )
    return home


def manifest(folder: Path, text: str) -> Manifest:
    (folder / "ditkit.toml").write_text(text)
    return Manifest.open(folder)


def index(folder: Path, values: dict, name: str = "model_index.json") -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


def write_lock(folder: Path) -> Path:
    opened = Manifest.open(folder, lock=False)
    lock_file(opened).write_text(lock_text(make_lock(opened)))
    return lock_file(opened)


def places(opened: Manifest) -> dict[str, Path]:
    return {name: place.resolve() for name, place in opened.components.items()}


def verify_all(folder: Path) -> int:
    return sum(verify(place, place.resolve()) for place in Manifest.open(folder).components.values())


# --- places


def test_local_places_are_relative_to_the_manifest(parts, monkeypatch):
    monkeypatch.chdir("/")
    opened = Manifest.open(parts)
    assert places(opened) == {
        "vae": parts.parent / "a" / "vae",
        "transformer": parts.parent / "b" / "transformer",
        "text_encoder": parts / "text_encoder",
        "tokenizer": parts / "tokenizer",
    }
    assert opened.values == {"boundary_ratio": 0.875}
    assert places(Manifest.open(parts / "ditkit.toml")) == places(opened)


def test_a_dot_means_beside_the_manifest_with_and_without_a_folder_of_its_own(tmp_path):
    (tmp_path / "vae").mkdir()
    opened = manifest(
        tmp_path, '[components]\nvae = "."\ntransformer = "."\n[components.tokenizer]\npath = "."\nsubfolder = "vae"'
    )
    assert places(opened) == {"vae": tmp_path / "vae", "transformer": tmp_path, "tokenizer": tmp_path / "vae"}


def test_a_repository_in_full_and_in_short(tmp_path):
    opened = manifest(
        tmp_path,
        f"""[components]
        text_encoder = "hf:o/n/text_encoder@{COMMIT}"
        transformer = "hf:o/q/sub/x-Q4_K.gguf@{COMMIT}"
        [components.vae]
        repo = "o/n"
        subfolder = "vae"
        revision = "{COMMIT}"
        variant = "fp16"
        [components.vae.sha256]
        "vae/diffusion_pytorch_model.fp16.safetensors" = "{"a" * 64}"
        """,
    )
    vae, text, transformer = (opened.components[name] for name in ("vae", "text_encoder", "transformer"))
    assert (vae.repo, vae.subfolder, vae.revision, vae.variant, vae.pinned) == ("o/n", "vae", COMMIT, "fp16", True)
    assert dict(vae.sha256) == {"vae/diffusion_pytorch_model.fp16.safetensors": "a" * 64}
    assert (text.repo, text.subfolder, text.file, text.revision) == ("o/n", "text_encoder", None, COMMIT)
    assert (transformer.repo, transformer.subfolder, transformer.file) == ("o/q", "sub", "x-Q4_K.gguf")


def test_a_place_outside_of_any_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    assert place_of("transformer", "x.gguf").resolve() == tmp_path / "x.gguf"
    place = place_of("vae", f"hf:o/n/vae/w.pth@{COMMIT}")
    assert (place.repo, place.subfolder, place.file, place.pinned) == ("o/n", "vae", "w.pth", True)


def test_a_name_with_a_slash_is_a_folder_unless_hf_is_written(tmp_path):
    place = manifest(tmp_path, '[components]\nvae = "Wan-AI/Wan2.1"').components["vae"]
    assert place.repo is None
    assert place.path == tmp_path / "Wan-AI" / "Wan2.1"


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b@", "hf:/b", "hf:a/../x", "hf:a/b/../../c", "hf:..//b@main"])
def test_hub_names_that_are_none(text):
    with pytest.raises(LoadError, match="OWNER/NAME@REVISION"):
        HubName.parse(text)


def test_hub_names():
    assert HubName.parse("a/b") is None
    assert HubName.parse("hf:a/b") == HubName("a/b")
    assert HubName.parse("hf:a/b.c-d/x/y@refs/pr/1") == HubName("a/b.c-d", "x/y", "refs/pr/1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[component.vae]", "table 'component' (did you mean 'components'?)"),
        ('[components]\nvea = "x"', "component 'vea' (did you mean 'vae'?)"),
        ('[components.vae]\npath = "x"\nrevison = "y"', "key 'revison' (did you mean 'revision'?)"),
        ('[components.vae]\npath = "x"\nrepo = "a/b"', "both path and repo"),
        ('[components.vae]\nvariant = "fp16"', "neither path nor repo"),
        ('[components.vae]\nrepo = "https://x/y"', "Write OWNER/NAME"),
        ('[components.vae]\nrepo = "a/b"\nsubfolder = "../x"', "outside of the place"),
        ('[components.vae]\nrepo = "a/b"\nfile = "/x.gguf"', "outside of the place"),
        ('[components.vae]\npath = "x"\nrevision = "y"', "a path has no revision"),
        ('[components.vae]\npath = 3', "path is 3, not a text"),
        ("[components]\nvae = 3", "vae is 3"),
        ('[components.vae]\npath = "x"\n[components.vae.sha256]\na = "b"', "not a table of files and their 64 digits"),
        ("[model]\nbondary = 0.9", "key 'bondary' (did you mean 'boundary'?)"),
        ("[model]\nboundary = 875", "boundary is 875, not a number from 0 to 1"),
        ("[model]\nexpand_timesteps = 1", "expand_timesteps is 1, not true or false"),
        ("[components\n", "not valid TOML"),
        ("components = 3", "components is 3, not a table"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(LoadError) as error:
        manifest(tmp_path, text)
    assert message in str(error.value)


def test_the_toml_goes_before_the_index_component_by_component(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "other").mkdir()
    opened = manifest(tmp_path / "m", '[components]\nvae = "../other"\n[defaults]\nsteps = 4')
    assert opened.components["vae"].path == tmp_path / "other"
    assert places(opened)["transformer"] == tmp_path / "m" / "transformer"
    assert opened.tables == {"defaults": {"steps": 4}}


def test_what_the_toml_replaces_need_not_be_there(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.move(tmp_path / "m" / "vae", tmp_path / "other")
    assert places(manifest(tmp_path / "m", '[components]\nvae = "../other"'))["vae"] == tmp_path / "other"


# --- indexes of diffusers


def test_an_index_of_diffusers_for_two_experts(tmp_path):
    names = ("transformer", "transformer_2", "vae")
    for name in names:
        (tmp_path / name).mkdir()
    values = {name: ["diffusers", "X"] for name in names} | {
        "_class_name": "WanPipeline",
        "image_encoder": [None, None],
    }
    opened = Manifest.open(index(tmp_path, values | {"boundary_ratio": 0.9, "expand_timesteps": False}))
    assert places(opened) == {name: tmp_path / name for name in names}
    assert opened.values == {"boundary_ratio": 0.9, "expand_timesteps": False}


def test_a_modular_index_with_parts_from_elsewhere(tmp_path):
    (tmp_path / "vae").mkdir()
    spec = {"pretrained_model_name_or_path": "o/n", "subfolder": "transformer", "revision": COMMIT, "variant": "fp16"}
    spec["type_hint"] = ["diffusers", "WanTransformer3DModel"]
    values = {
        "_blocks_class_name": "WanBlocks",
        "transformer": [None, None, spec],
        "vae": ["diffusers", "X", {"pretrained_model_name_or_path": ".", "subfolder": "vae", "revision": None}],
        "guider": ["diffusers", "Guider", {}],
        "boundary_ratio": None,
    }
    opened = Manifest.open(index(tmp_path, values, "modular_model_index.json"))
    place = opened.components["transformer"]
    assert (place.repo, place.subfolder, place.revision, place.variant) == ("o/n", "transformer", COMMIT, "fp16")
    assert opened.components["vae"].resolve() == tmp_path / "vae"
    assert set(opened.components) == {"transformer", "vae"}


def test_code_of_a_repository_is_refused(tmp_path):
    """Custom classes, and the key that tells diffusers which file to import."""
    with pytest.raises(LoadError, match="a class of 'my_blocks'"):
        Manifest.open(index(tmp_path, {"transformer": ["my_blocks", "Mine"]}))
    with pytest.raises(LoadError, match="auto_map"):
        Manifest.open(index(tmp_path, {"auto_map": {"ModularPipelineBlocks": "block.Mine"}}))
    spec = {"pretrained_model_name_or_path": "o/n", "type_hint": ["evil", "Mine"]}
    with pytest.raises(LoadError, match="a class of 'evil'"):
        Manifest.open(index(tmp_path, {"transformer": ["diffusers", "X", spec]}))


def test_f16_a_component_that_cannot_be_had_is_an_error(tiny_model, tmp_path):
    """diffusers warns, leaves None in its place and goes on."""
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "ditkit.toml").write_text('[components]\nvae = "../nowhere"')
    with pytest.raises(LoadError, match=r"finding the vae: there is nothing at .*nowhere"):
        places(Manifest.open(tmp_path / "m"))


def test_f19_f20_what_a_model_says_of_itself_survives_a_lock(parts):
    """diffusers' saving drops settings of parts that have no files, and changes made to a composed pipeline. Here the
    manifest is the person's text; locking leaves every byte of it alone."""
    text = (parts / "ditkit.toml").read_bytes()
    before = Manifest.open(parts, lock=False)
    assert main(["lock", str(parts)]) == 0
    assert (parts / "ditkit.toml").read_bytes() == text
    after = Manifest.open(parts)
    assert (after.values, after.tables, set(after.components)) == (before.values, before.tables, set(before.components))


def test_f21_no_absolute_path_is_written(parts, tmp_path):
    """diffusers' saving writes one into the index, so that a copied model still reads the old folder."""
    write_lock(parts)
    assert str(tmp_path) not in (parts / "ditkit.lock").read_text()
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    moved = tmp_path.parent / f"{tmp_path.name}-moved" / "home"
    shutil.rmtree(tmp_path)
    assert verify_all(moved) > 0


def test_f21_an_absolute_path_that_is_stale_is_an_error(tmp_path):
    (tmp_path / "vae").mkdir()
    spec = {"pretrained_model_name_or_path": "/saved/elsewhere", "subfolder": "vae"}
    opened = Manifest.open(index(tmp_path, {"vae": ["diffusers", "X", spec]}, "modular_model_index.json"))
    with pytest.raises(
        LoadError, match=r"there is nothing at /saved/elsewhere/vae\. Correct .* \('\.' is its own folder"
    ):
        places(opened)


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", "@0123456"])
def test_f22_what_can_move_is_refused(tmp_path, revision):
    """diffusers takes the weights from each repository's main branch, whatever revision was asked for."""
    opened = manifest(tmp_path, f'[components]\nvae = "hf:o/n/vae{revision}"')
    with pytest.raises(LoadError, match=r"can mean another commit tomorrow\. Give a commit of 40 digits"):
        places(opened)


# --- the lock


def test_a_lock_holds_every_file_of_every_component(parts):
    lock = read_lock(write_lock(parts))
    assert set(lock["transformer"].files) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "tokenizer.json" in lock["tokenizer"].files
    opened = Manifest.open(parts)
    assert opened.locked
    size = sum(file.stat().st_size for place in places(opened).values() for file in place.iterdir())
    assert verify_all(parts) == size


def test_every_changed_byte_is_found(parts):
    """One byte of any file, its size and its time of change as they were, after it had been hashed in this process."""
    write_lock(parts)
    verify_all(parts)
    files = [file for place in places(Manifest.open(parts)).values() for file in place.iterdir()]
    assert len(files) >= 8
    for file in files:
        before, stat = file.read_bytes(), file.stat()
        middle = len(before) // 2
        file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(LoadError, match=rf"{file.name} is not what it was when it was pinned"):
            verify_all(parts)
        file.write_bytes(before)
    verify_all(parts)


def test_sizes_lost_files_and_new_files_are_found_without_reading_weights(parts):
    write_lock(parts)
    vae = parts.parent / "a" / "vae"
    weights = vae / "diffusion_pytorch_model.safetensors"
    with weights.open("ab") as file:
        file.write(b"x")
    with pytest.raises(LoadError, match=r"safetensors has \d+ bytes and had \d+ when it was locked"):
        places(Manifest.open(parts))
    weights.write_bytes(weights.read_bytes()[:-1])
    (vae / "extra.json").write_text("{}")
    with pytest.raises(LoadError, match=r"extra\.json is there and is not locked"):
        places(Manifest.open(parts))
    (vae / "extra.json").unlink()
    (vae / "config.json").rename(vae / "config.old")
    with pytest.raises(LoadError, match=r"config\.json is pinned and is not there"):
        places(Manifest.open(parts))


def test_an_index_of_diffusers_is_locked_too(tiny_model, tmp_path):
    """Its own notes, such as the boundary between two experts, change what a model makes."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    write_lock(folder)
    verify_all(folder)
    values = json.loads((folder / "model_index.json").read_text())
    index(folder, values | {"boundary_ratio": 0.5})
    with pytest.raises(LoadError, match="the index of the components is not what it was"):
        Manifest.open(folder)


def test_hashes_in_the_manifest_are_checked_without_a_lock(parts):
    lock = read_lock(write_lock(parts))
    (parts / "ditkit.lock").unlink()
    _, digest = lock["vae"].files["config.json"]
    for value, fits in ((digest, True), ("0" * 64, False)):
        place = manifest(
            parts, f'[components.vae]\npath = "../a/vae"\n[components.vae.sha256]\n"config.json" = "{value}"'
        ).components["vae"]
        if fits:
            assert verify(place, place.resolve()) == lock["vae"].files["config.json"][0]
        else:
            with pytest.raises(LoadError, match=r"config\.json is not what it was"):
                verify(place, place.resolve())
            with pytest.raises(LoadError, match=r"config\.json is not what it was"):
                make_lock(Manifest.open(parts, lock=False))


def test_a_manifest_that_changed_since_its_lock_is_an_error(parts):
    write_lock(parts)
    text = (parts / "ditkit.toml").read_text()
    for new, message in (
        (text.replace("../a/vae", "../b/transformer"), "the vae is ../b/transformer now and was ../a/vae"),
        (text.replace('tokenizer = "."\n', ""), "only the lock names tokenizer"),
        (
            text.replace("[model]", '[components.image_encoder]\npath = "x"\n[model]'),
            "only the manifest names image_enc",
        ),
    ):
        with pytest.raises(LoadError) as error:
            manifest(parts, new)
        assert message in str(error.value)
        assert "ditkit lock" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "version = 2", "version = 1\n[components.vae]\nplace = 'x'", "version = 1\nx", "\x00"]
)
def test_damaged_locks(parts, text):
    (parts / "ditkit.lock").write_text(text)
    with pytest.raises(LoadError, match=r"ditkit.lock: it .*Write it anew"):
        Manifest.open(parts)


def test_single_files_and_shards_are_locked(tmp_path):
    for name in ("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    weights = {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    manifest(tmp_path, '[components]\nvae = "y.safetensors"\ntransformer = "x.safetensors.index.json"')
    (tmp_path / "config.json").write_text("{}")  # a loader may read it, so it is locked
    lock = read_lock(write_lock(tmp_path))
    assert set(lock["vae"].files) == {"config.json", "y.safetensors"}
    assert set(lock["transformer"].files) == {"config.json", "x.safetensors.index.json", *weights.values()}
    (tmp_path / weights["b"]).write_bytes(b"X" + weights["b"].encode()[1:])
    with pytest.raises(LoadError, match=r"00002-of-00002\.safetensors is not what it was"):
        verify_all(tmp_path)


name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    st.dictionaries(name, st.tuples(st.integers(0, 2**62), st.text("0123456789abcdef", min_size=64, max_size=64))), name
)
def test_a_lock_is_read_as_it_was_written(tmp_path_factory, files, written):
    lock = {"vae": Entry(written, COMMIT, files), "tokenizer": Entry(written, None, files)}
    file = tmp_path_factory.mktemp("lock") / "ditkit.lock"
    file.write_text(lock_text(lock), encoding="utf-8")
    assert read_lock(file) == lock


def test_changes_are_told():
    one = {"a": (1, "x"), "b": (2, "y"), "c": (3, "z")}
    before = {"vae": Entry("hf:o/n@main", "1" * 40, one), "transformer": Entry("x", None, {})}
    after = {"vae": Entry("hf:o/n@main", "2" * 40, {"a": (1, "x"), "b": (2, "q"), "d": (4, "z")})}
    assert changes(before, after) == [
        ("transformer", "no longer there"),
        ("vae", "commit: 111111111111 -> 222222222222"),
        ("vae", "b: changed"),
        ("vae", "c: gone"),
        ("vae", "d: new"),
    ]
    assert changes(after, after) == []


def test_the_command(parts, capsys):
    assert main(["lock", str(parts)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main(["lock", str(parts)]) == 0
    assert "is as it was" in capsys.readouterr().out
    assert main(["lock", "--check", str(parts)]) == 0
    assert "every byte is what it was" in capsys.readouterr().out
    config = parts / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("512", "513"))
    assert main(["lock", "--check", str(parts)]) == 2
    assert "tokenizer_config.json is not what it was" in capsys.readouterr().err
    assert main(["lock", str(parts)]) == 0
    assert "tokenizer_config.json: changed" in capsys.readouterr().out
    assert not [file for file in parts.iterdir() if file.suffix == ".part"]


def test_the_command_without_a_lock_or_a_manifest(tmp_path, capsys):
    assert main(["lock", str(tmp_path)]) == 2
    assert "it names no components" in capsys.readouterr().err
    assert main(["lock", "--check", str(tmp_path)]) == 2
    assert "it has no lock" in capsys.readouterr().err
    assert main(["lock", str(tmp_path / "x")]) == 2


# --- which files make a component


PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["config.json", PLAIN, FP16, "x.py", "README.md", "a.png"], None, ["config.json", PLAIN]),
        (["config.json", PLAIN, FP16], "fp16", ["config.json", FP16]),
        (["m.safetensors.index.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], None, None),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "model.safetensors"], "fp16",
         ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"]),
        (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["Wan2.1_VAE.pth"], None, ["Wan2.1_VAE.pth"]),
        (["tokenizer.json", "tokenizer_config.json", "spiece.model", "requirements.txt"], None,
         ["spiece.model", "tokenizer.json", "tokenizer_config.json"]),
    ],
)  # fmt: skip
def test_used(names, variant, expected):
    assert list(used(names, variant, "x")) == (sorted(names) if expected is None else sorted(expected))


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        ([PLAIN], "fp16", r"other variants \(none\)"),
        ([FP16], None, r"other variants \(fp16\)"),
        (["a.gguf", "b.gguf"], None, r"2 sets of weights could be meant \(a, b\). Name one with `file`"),
        (["config.json"], "fp16", "there are no weights"),
    ],
)
def test_used_refuses_to_guess(names, variant, message):
    with pytest.raises(LoadError, match=message):
        used(names, variant, "x")
