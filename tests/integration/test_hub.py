"""Models from a hub: the real huggingface_hub library against a small hub on loopback, one test for each thing that
goes wrong on the real one."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from ditkit.checkpoints.model.hub import Hub
from ditkit.checkpoints.model.lock import changes, lock_text, make_lock, read_lock, verify
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.checkpoints.model.place import place_of
from ditkit.errors import DitkitError, LoadError, SetupError

TOKEN = "hf_of_the_test"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, tmp_path):
    return Hub(server.endpoint, TOKEN, tmp_path / "cache")


def model(tiny_model: Path) -> dict[str, bytes]:
    """The files of a complete tiny model, with a program beside them as in repositories that bring their own code."""
    files = {file.relative_to(tiny_model).as_posix(): file for file in tiny_model.rglob("*") if file.is_file()}
    code = b"raise SystemExit('code of a model was run')"
    return {name: file.read_bytes() for name, file in files.items()} | {
        "vae/modeling_vae.py": code,
        "block.py": code,
        "README.md": b"#",
    }


def fetched(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def manifest(folder: Path, text: str) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "ditkit.toml").write_text(text)
    return Manifest.open(folder)


def places(opened: Manifest, hub: Hub) -> dict[str, Path]:
    return {name: place.resolve(hub) for name, place in opened.components.items()}


def locked(folder: Path, hub: Hub) -> Manifest:
    (folder / "ditkit.lock").write_text(lock_text(make_lock(Manifest.open(folder, lock=False), hub)))
    return Manifest.open(folder)


# --- fetching


def test_a_component_is_fetched_alone_and_once(server, hub, tiny_model, tmp_path):
    commit = server.add("o/n").commit(model(tiny_model))
    place = manifest(tmp_path / "m", f'[components]\nvae = "hf:o/n/vae@{commit}"').components["vae"]
    at = place.resolve(hub)
    assert fetched(at.parent) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert (at / "config.json").read_bytes() == (tiny_model / "vae" / "config.json").read_bytes()
    server.seen.clear()
    assert place.resolve(hub) == at
    assert [one.path for one in server.seen] == [f"/api/models/o/n/revision/{commit}"]


def test_a_whole_model_comes_from_one_commit_without_its_code(server, hub, tiny_model):
    """Also when the branch moves between two of its components."""
    repo = server.add("o/n")
    commit = repo.commit(model(tiny_model))
    opened = Manifest.fetch("hf:o/n", hub)
    repo.commit(dict.fromkeys(model(tiny_model), b""))
    found = places(opened, hub)
    assert {place.revision for place in opened.components.values()} == {commit}
    for name, at in found.items():
        for file in at.iterdir():
            assert file.read_bytes() == (tiny_model / name / file.name).read_bytes()
    assert not {one for one in fetched(opened.folder) if one.endswith((".py", ".md"))}
    assert not [one for one in server.seen if one.path.endswith((".py", ".md"))]


def test_f22_the_revision_of_a_model_is_that_of_its_parts(server, hub, tiny_model):
    """diffusers gives it to the index only and takes the weights from main."""
    repo = server.add("o/n")
    old = repo.commit(model(tiny_model), branch="v1")
    repo.commit(dict.fromkeys(model(tiny_model), b"other"))
    for name in ("v1", old):
        opened = Manifest.fetch(f"hf:o/n@{name}", hub)
        assert {place.revision for place in opened.components.values()} == {old}
        at = opened.components["vae"].resolve(hub)
        assert (at / "config.json").read_bytes() == (tiny_model / "vae" / "config.json").read_bytes()


def test_f22_in_a_modular_index_too_and_other_repositories_must_say_theirs(server, hub, tiny_model):
    files = {name: data for name, data in model(tiny_model).items() if name != "model_index.json"}
    spec = '["diffusers", "X", {"pretrained_model_name_or_path": "%s", "subfolder": "vae", "revision": null}]'
    for place, pinned in (("o/n", True), ("o/other", False)):
        files["modular_model_index.json"] = ('{"vae": ' + spec % place + "}").encode()
        commit = server.add("o/n").commit(files)
        vae = Manifest.fetch(f"hf:o/n@{commit}", hub).components["vae"]
        assert vae.pinned == pinned
        if not pinned:
            with pytest.raises(LoadError, match="can mean another commit tomorrow"):
                vae.resolve(hub)


def test_a_model_with_its_lock_goes_to_the_hub_and_comes_back(server, hub, tiny_model, tmp_path):
    """The lock that was made on this machine holds for the copy in the repository."""
    shutil.copytree(tiny_model, tmp_path / "m")
    locked(tmp_path / "m", hub)
    repo = server.add("o/n")
    repo.commit(dict(model(tmp_path / "m").items()))
    opened = Manifest.fetch("hf:o/n", hub)
    assert opened.locked
    assert sum(verify(place, place.resolve(hub)) for place in opened.components.values()) > 10_000
    bad = model(tmp_path / "m")
    bad["vae/config.json"] = bad["vae/config.json"].replace(b"1", b"2", 1)
    repo.commit(bad)
    vae = Manifest.fetch("hf:o/n", hub).components["vae"]
    with pytest.raises(LoadError, match=r"config\.json is not what it was"):
        verify(vae, vae.resolve(hub))


def test_paths_of_a_fetched_manifest_stay_in_their_repository(server, hub):
    for path in ("/etc", "../x", "~/x", "a/../../x"):
        server.add("o/n").commit({"ditkit.toml": f'[components]\nvae = "{path}"'.encode()})
        with pytest.raises(LoadError, match="outside of it"):
            Manifest.fetch("hf:o/n", hub)
    server.add("o/n").commit({"ditkit.toml": b'[components]\nvae = "x/y.gguf"\ntokenizer = "."', "x/y.gguf": b"1"})
    assert Manifest.fetch("hf:o/n", hub).components["vae"].resolve(hub).read_bytes() == b"1"


def test_a_collection_of_files_is_not_fetched_as_a_model(server, hub):
    server.add("o/many").commit({"split/a.safetensors": b"a", "split/b.safetensors": b"b"})
    with pytest.raises(LoadError, match="Name the files that you want of it"):
        Manifest.fetch("hf:o/many", hub)
    server.add("o/native").commit({"config.json": b"{}", "x.pth": b"x", "google/umt5/t.json": b"{}", "a.py": b""})
    opened = Manifest.fetch("hf:o/native", hub)
    assert (opened.components, fetched(opened.folder)) == ({}, {"config.json", "x.pth", "google/umt5/t.json"})


def test_a_single_file_comes_with_the_config_beside_it_and_nothing_else(server, hub):
    """Whatever else of the repository lies in the cache, a loader sees the same files."""
    server.add("o/n").commit(
        {"q/a.gguf": b"a", "q/b.gguf": b"b", "q/config.json": b"{}", "c.gguf": b"c", "r/x.json": b""}
    )
    for name, files in (("q/a.gguf", {"q/a.gguf", "q/config.json"}), ("c.gguf", {"c.gguf"})):
        place = place_of("transformer", f"hf:o/n/{name}")
        with pytest.raises(LoadError, match="can mean another commit tomorrow"):
            place.resolve(hub)
        pinned = place.pin(hub)
        assert set(pinned.files_of(hub.look("o/n"))) == files
        assert pinned.resolve(hub).read_bytes() == name[-6:-5].encode()
    assert fetched(pinned.resolve(hub).parent) == {"q/a.gguf", "q/config.json", "c.gguf"}


def test_one_of_several_variants_is_fetched(server, hub, tmp_path):
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "config.json")
    commit = server.add("o/n").commit({f"vae/{name}": name.encode() for name in names})
    table = f'[components.vae]\nrepo = "o/n"\nsubfolder = "vae"\nrevision = "{commit}"\n'
    at = manifest(tmp_path / "m", table + 'variant = "fp16"').components["vae"].resolve(hub)
    assert fetched(at) == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    with pytest.raises(LoadError, match=r"other variants \(fp16, none\)"):
        manifest(tmp_path / "m", table + 'variant = "bf16"').components["vae"].resolve(hub)


# --- what goes wrong


def test_a_cut_connection_is_resumed_where_it_was_cut(server, hub):
    """The second request asks for the rest only; the library keeps what came in whole chunks of 10 MB."""
    data = bytes(range(256)) * 4096 * 12
    commit = server.add("o/n").commit({"w.safetensors": data})
    server.cut = 11 * 2**20
    folder = hub.fetch("o/n", commit, ["w.safetensors"])
    assert hashlib.sha256((folder / "w.safetensors").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert [one.range for one in server.requests("storage", "GET")] == [None, f"bytes={10 * 2**20}-"]


def test_the_token_goes_to_the_hub_and_nowhere_else(server, hub):
    """Large files come from another host, to which the hub redirects."""
    repo = server.add("o/gated", gated=True, allowed=(TOKEN,))
    commit = repo.commit({"w.safetensors": bytes(5000), "config.json": b"{}"})
    hub.fetch("o/gated", commit, ["w.safetensors", "config.json"])
    assert {one.token for one in server.requests("hub")} == {TOKEN}
    assert len(server.requests("storage")) == 1
    assert {one.token for one in server.requests("storage")} == {None}


@pytest.mark.parametrize("token", [TOKEN, False])
def test_a_gated_repository_names_the_page_to_accept(server, tmp_path, token):
    """401 without a token, 403 with one that has not accepted."""
    commit = server.add("o/gated", gated=True).commit({"w.safetensors": b"x"})
    hub = Hub(server.endpoint, token, tmp_path / "cache")
    with pytest.raises(LoadError) as error:
        hub.fetch("o/gated", commit, ["w.safetensors"])
    assert f"Accept them at {server.endpoint}/o/gated, then log in" in str(error.value)


def test_every_refusal_is_one_sentence(server, hub):
    repo = server.add("o/n")
    commit = repo.commit({"w.safetensors": b"x"})
    server.add("o/private", private=True).commit({})
    server.add("o/forbidden", forbidden=True).commit({})
    for question, message in (
        (lambda: hub.look("o/none"), "there is no such repository, or it is private"),
        (lambda: hub.look("o/private"), "if it is private, log in with `hf auth login`"),
        (lambda: hub.look("o/forbidden"), r"the hub refuses the token \(403\)"),
        (lambda: hub.look("o/n", "v9"), "the repository has no such revision"),
        (lambda: hub.look("o/n", "../../x"), "that is no revision"),
        (lambda: hub.fetch("o/n", "f" * 40, ["w.safetensors"]), "the repository has no such revision"),
        (lambda: hub.fetch("o/n", commit, ["x.safetensors"]), "no such file at this revision"),
        (lambda: hub.fetch("o/n", commit, ["x.py"]), "it is no file of weights or settings"),
        (lambda: hub.fetch("o/n", commit, ["../x.json"]), "it is no file of weights or settings"),
        (lambda: hub.fetch("o/n", commit, []), "no file of it was asked for"),
    ):
        with pytest.raises(LoadError, match=message) as error:
            question()
        assert "\n" not in str(error.value)
        assert TOKEN not in str(error.value)


def test_a_hub_that_is_down_or_not_there(server, hub, tmp_path):
    server.add("o/n").commit({})
    server.down = True
    with pytest.raises(LoadError, match=r"the hub answers 503\. Try again later"):
        hub.look("o/n")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = Hub(f"http://127.0.0.1:{unused.getsockname()[1]}", None, tmp_path / "cache")
        with pytest.raises(LoadError, match=r"it failed .*[Cc]onnect"):
            nowhere.look("o/n")


# --- locks


def test_a_branch_is_locked_to_its_commit_and_a_move_is_told(server, hub, tiny_model, tmp_path):
    repo = server.add("o/n")
    first = repo.commit(model(tiny_model))
    manifest(tmp_path / "m", '[components]\nvae = "hf:o/n/vae@main"')
    opened = locked(tmp_path / "m", hub)
    files = model(tiny_model)
    files["vae/config.json"] = b"{}"
    second = repo.commit(files)
    vae = opened.components["vae"]
    assert (vae.revision, vae.pinned) == (first, True)
    assert verify(vae, vae.resolve(hub)) > 0
    moved = make_lock(Manifest.open(tmp_path / "m", lock=False), hub)
    assert changes(read_lock(tmp_path / "m" / "ditkit.lock"), moved) == [
        ("vae", f"commit: {first[:12]} -> {second[:12]}"),
        ("vae", "vae/config.json: changed"),
    ]


def test_a_commit_that_is_gone_from_the_hub_is_an_error(server, hub, tiny_model, tmp_path):
    """A branch that was rewritten: what is locked is not there any more, and nothing else is taken in its place."""
    repo = server.add("o/n")
    first = repo.commit(model(tiny_model))
    manifest(tmp_path / "m", '[components]\nvae = "hf:o/n/vae@main"')
    opened = locked(tmp_path / "m", hub)
    repo.commit(model(tiny_model) | {"vae/config.json": b"{}"})
    del repo.commits[first]
    fresh = Hub(server.endpoint, TOKEN, tmp_path / "another cache")
    with pytest.raises(LoadError, match="the repository has no such revision"):
        opened.components["vae"].resolve(fresh)


def test_a_locked_component_asks_for_its_files_only(server, hub, tiny_model, tmp_path):
    server.add("o/n").commit(model(tiny_model))
    manifest(tmp_path / "m", '[components]\nvae = "hf:o/n/vae@main"')
    vae = locked(tmp_path / "m", hub).components["vae"]
    server.seen.clear()
    vae.resolve(hub)
    assert server.seen == []


def test_other_bytes_under_the_locked_commit_fail_the_load(server, hub, tiny_model, tmp_path):
    """A cache that was written to, or a hub that lies."""
    commit = server.add("o/n").commit(model(tiny_model))
    manifest(tmp_path / "m", f'[components]\nvae = "hf:o/n/vae@{commit}"')
    vae = locked(tmp_path / "m", hub).components["vae"]
    at = vae.resolve(hub)
    data = (at / "config.json").read_bytes()
    (at / "config.json").resolve().write_bytes(data.replace(b"1", b"2", 1))
    with pytest.raises(LoadError, match=r"vae/config\.json is not what it was"):
        verify(vae, at)


# --- offline


def test_offline_never_opens_a_socket(server, hub, tiny_model, tmp_path, monkeypatch):
    repo = server.add("o/n")
    repo.commit(model(tiny_model))
    manifest(
        tmp_path / "m",
        '[components]\nvae = "hf:o/n/vae@main"\n[components.tokenizer]\nrepo = "o/n"\nsubfolder = "tokenizer"',
    )
    online = places(locked(tmp_path / "m", hub), hub)
    Manifest.fetch("hf:o/n", hub).components["scheduler"].resolve(hub)
    server.seen.clear()

    def refuse(*args, **more):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    offline = Hub(server.endpoint, TOKEN, tmp_path / "cache", offline=True)
    assert places(Manifest.open(tmp_path / "m"), offline) == online
    assert Manifest.fetch("hf:o/n", offline).components["scheduler"].resolve(offline).is_dir()
    for question in (
        lambda: offline.look("o/other"),
        lambda: offline.look("o/n", "v1"),
        lambda: offline.fetch("o/n", "f" * 40, ["config.json"]),
        lambda: Manifest.fetch("hf:o/n@v2", offline),
    ):
        with pytest.raises(
            LoadError, match=r"not in the cache, and this run is offline\. Run it once with the network"
        ):
            question()
    assert server.seen == []


def test_the_command_pins_and_tells(server, tiny_model, tmp_path):
    """As a person runs it: a process of its own, the hub, the token and the cache from the environment."""
    repo = server.add("o/n", gated=True, allowed=(TOKEN,))
    commit = repo.commit(model(tiny_model))
    manifest(tmp_path / "m", '[components]\nvae = "hf:o/n/vae"')
    own = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}

    def lock(*flags):
        command = [sys.executable, "-m", "ditkit", "lock", *flags, str(tmp_path / "m")]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | own, timeout=60)

    assert commit[:12] in lock().stdout
    moved = repo.commit(model(tiny_model) | {"vae/config.json": b"{}"})
    assert "every byte is what it was" in lock("--offline", "--check").stdout
    assert f"commit: {commit[:12]} -> {moved[:12]}" in lock().stdout
    own["HF_TOKEN"] = "another"
    own["HF_HOME"] = str(tmp_path / "empty")
    refused = lock()
    assert refused.returncode == 2
    assert f"Accept them at {server.endpoint}/o/n, then log in" in refused.stderr


@pytest.mark.parametrize(("name", "value", "found"), [
    ("HF_TOKEN", "hf_first-half\x1bsecond-half", r"the key in HF_TOKEN: character 14 of 25 is U\+001B"),
    ("HF_TOKEN", "hf_first-half second-half", r"the key in HF_TOKEN: character 14 of 25 is U\+0020"),
    ("HTTP_PROXY", "nonsense://first-half@x", r"the proxy in HTTP_PROXY is no address"),
])  # fmt: skip
def test_a_way_to_the_hub_that_cannot_be_gone(server, monkeypatch, tmp_path, name, value, found):
    monkeypatch.setenv(name, value)
    hub = Hub("http://hub.example", None if name == "HF_TOKEN" else False, tmp_path / "cache")
    with pytest.raises(DitkitError, match=found) as error:
        hub.look("o/n")
    assert not {"first-half", "second-half"} & {*str(error.value).replace("_", " ").split()}
    with pytest.raises(DitkitError, match="a bracket may be missing"):
        Hub("http://[::1").look("o/n")
    assert server.seen == []


def test_the_token_goes_over_plain_http_on_this_machine_only(server, tmp_path, monkeypatch):
    for proxy in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(SetupError, match="it would go over the network as plain text") as error:
        Hub("http://hub.example", TOKEN, tmp_path / "cache").look("o/n")
    assert TOKEN not in str(error.value)
    with pytest.raises(LoadError, match=r"it failed through the proxy of (HTTP_PROXY|http_proxy) \("):
        Hub("http://hub.example", TOKEN, tmp_path / "cache", plain_http=True).look("o/n")
