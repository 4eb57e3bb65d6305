"""Files of a hub repository on the local disk, through the ``huggingface_hub`` library; its cache is used as it stands.

Everything is fetched by commit, so that what lies in the cache cannot mean something else later. Nothing that could run
is downloaded, and nothing here imports what was. Leaves out: which files a component needs (place.py)."""

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ditkit.errors import LoadError, needed
from ditkit.hiding import remember
from ditkit.keys import check_private, checked_key, read
from ditkit.network import Proxy, proxy_for

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME = re.compile(rf"hf:(?P<repo>{REPO.pattern})(/(?P<folder>[^@]*))?(@(?P<revision>.+))?")
DATA = (".json", ".toml", ".lock", ".txt", ".model", ".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of files that may be downloaded. Weights in pickles are read without running what is in them."""
OFFLINE = ("it is not in the cache, and this run is offline", "Run it once with the network")


@dataclass(frozen=True)
class HubName:
    """``hf:OWNER/NAME[/FOLDER][@REVISION]``, taken apart; ``revision`` is a commit, a branch or a tag."""

    repo: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """None when ``text`` does not begin with ``hf:``. Raises LoadError when it does and the rest is no name."""
        if not text.startswith("hf:"):
            return None
        found = NAME.fullmatch(text)
        if found is None or not inside(found["folder"] or ""):
            raise LoadError(f"the hub name {text!r}", "it cannot be understood", "Write hf:OWNER/NAME@REVISION")
        return cls(found["repo"], (found["folder"] or "").strip("/"), found["revision"])


def inside(path: str) -> bool:
    """Whether a relative path stays within the folder that it is relative to."""
    return not path.startswith("/") and "\\" not in path and ".." not in PurePosixPath(path).parts


@dataclass(frozen=True)
class Listing:
    """One commit of a repository and the names of all its files, as paths with slashes."""

    repo: str
    commit: str
    names: tuple[str, ...]

    def within(self, folder: str) -> tuple[str, ...]:
        """Names of the files directly in ``folder`` ("" for the top), without it."""
        start = f"{folder}/" if folder else ""
        rest = (name.removeprefix(start) for name in self.names if name.startswith(start))
        return tuple(name for name in rest if "/" not in name)


@dataclass(frozen=True)
class Hub:
    """How the hub is reached. ``endpoint``, ``token`` and ``cache`` are the library's own when they are None:
    HF_ENDPOINT, HF_TOKEN or the login of ``hf``, HF_HOME. ``offline``: the cache is all there is, no socket is opened;
    HF_HUB_OFFLINE=1 means the same. ``plain_http``: the token may go over http to another machine."""

    endpoint: str | None = None
    token: str | None = None
    cache: Path | None = None
    offline: bool = False
    plain_http: bool = False

    def look(self, repo: str, revision: str | None = None) -> Listing:
        """What ``revision`` (the main branch when None) is now. Offline: what it was when it was last asked for,
        with the files that were fetched. Raises LoadError."""
        asked = f"looking at {repo}{f' at {revision}' if revision else ''} on the hub"
        if revision is not None and not inside(revision):
            raise LoadError(asked, "that is no revision", "Give a commit, a branch or a tag")
        if self._offline:
            return self._cached(asked, repo, revision or "main")
        api = _library().HfApi(endpoint=self.endpoint, token=self.token)
        info = self._ask(asked, repo, lambda: api.model_info(repo, revision=revision, timeout=30))
        names = sorted(file.rfilename for file in info.siblings or () if inside(file.rfilename))
        if not COMMIT.fullmatch(revision or ""):
            with contextlib.suppress(OSError):  # a cache that cannot be written to is reported when a file is fetched
                reference = self._folder(repo) / "refs" / (revision or "main")
                reference.parent.mkdir(parents=True, exist_ok=True)
                part = reference.with_name(f"{reference.name}.{secrets.token_hex(4)}.part")
                part.write_text(info.sha)
                part.replace(reference)
        return Listing(repo, info.sha, tuple(names))

    def fetch(self, repo: str, commit: str, names: Iterable[str]) -> Path:
        """The folder that stands for the repository at ``commit``, with these files in it; what is there already is
        not asked for again. Raises LoadError, also for a file that is no data."""
        folder = None
        for name in names:
            asked = f"fetching {name} of {repo} at {commit[:12]}"
            if not name.endswith(DATA) or not inside(name):
                raise LoadError(asked, "it is no file of weights or settings", "Correct the name")
            download = partial(
                _library().hf_hub_download, repo, name, revision=commit, endpoint=self.endpoint, token=self.token,
                cache_dir=self.cache, local_files_only=self._offline,
            )  # fmt: skip
            folder = Path(self._ask(asked, repo, download)).parents[len(PurePosixPath(name).parts) - 1]
        if folder is None:
            raise LoadError(f"fetching {repo}", "no file of it was asked for", "Name a component or a file")
        return folder

    @property
    def _offline(self) -> bool:
        return self.offline or bool(_library().constants.HF_HUB_OFFLINE)

    def _folder(self, repo: str) -> Path:
        return Path(self.cache or _library().constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"

    def _cached(self, asked: str, repo: str, revision: str) -> Listing:
        reference = self._folder(repo) / "refs" / revision
        named = not COMMIT.fullmatch(revision) and os.path.isfile(reference)
        commit = reference.read_text().strip() if named else revision
        folder = self._folder(repo) / "snapshots" / commit
        if not os.path.isdir(folder):
            raise LoadError(asked, *OFFLINE)
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not os.path.isdir(file))
        return Listing(repo, commit, tuple(files))

    def _proxy(self, asked: str) -> Proxy | None:
        """The proxy on the way to the hub. Raises SetupError for an address or a token that cannot be used, PlaceError
        for such a proxy."""
        library = _library()
        server = read(self.endpoint or library.constants.ENDPOINT, f"{asked}, at the address in HF_ENDPOINT")
        if token := library.get_token() if self.token is None else self.token:
            remember(token)
            checked_key(token.strip(), "HF_TOKEN")
            check_private(server, self.plain_http, f"{asked} with a token")
        return proxy_for(server, asked)

    def _ask(self, asked: str, repo: str, question: Callable[[], Any]) -> Any:
        proxy = None if self._offline else self._proxy(asked)
        try:
            return question()
        except Exception as error:  # the library raises its transport's own types, which changed between its versions
            raise self._sentence(asked, repo, error, proxy) from error

    def _sentence(self, asked: str, repo: str, error: BaseException, proxy: Proxy | None) -> LoadError:
        from huggingface_hub import errors

        causes = list(_causes(error))
        refused = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
        status = refused and getattr(refused.response, "status_code", None)
        where = f"{(self.endpoint or _library().constants.ENDPOINT).rstrip('/')}/{repo}"
        login = "log in with `hf auth login` or set HF_TOKEN"

        def is_a(kind: type[Exception]) -> bool:
            return any(isinstance(cause, kind) for cause in causes)

        for applies, found, do in (
            (is_a(errors.GatedRepoError), "its authors let in only who accepts their terms",
             f"Accept them at {where}, then {login}"),
            (is_a(errors.RevisionNotFoundError), "the repository has no such revision",
             f"Choose one that {where}/commits/main shows"),
            (is_a(errors.RepositoryNotFoundError), "there is no such repository, or it is private",
             f"Check the name at {where}; if it is private, {login}"),
            (status in (401, 403), f"the hub refuses the token ({status})", f"Give one that may read {where}"),
            (self._offline, *OFFLINE),
            (status == 404, "the repository has no such file at this revision", f"Look at {where}"),
            (status is not None, f"the hub answers {status}", "Try again later"),
        ):  # fmt: skip
            if applies:
                return LoadError(asked, found, do)
        first = str(causes[-1]).strip().splitlines()
        found = f"{type(causes[-1]).__name__}{': ' + first[0] if first else ''}".rstrip(".")
        through = f" through the proxy of {proxy.variable}" if proxy else ""
        return LoadError(asked, f"it failed{through} ({found})", "Try again; what is already here is not fetched twice")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _library() -> Any:
    needed("huggingface_hub.constants", "using a hub repository", "hub")
    return sys.modules["huggingface_hub"]
