"""Every error a person can meet: what was asked, what was found, what to do about it."""

import difflib
import importlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from ditkit.hiding import hidden, printable
from ditkit.limits import MESSAGE


class DitkitError(Exception):
    """Base of all errors that ditkit raises on purpose. ``exit_code`` is what the command line exits with. Its words
    hold no secret and nothing that steers a terminal, whoever they came from; what was asked and what was found are
    one line each, of MESSAGE characters at most."""

    exit_code = 1

    def __init__(self, asked: str, found: str, do: str):
        asked, found = (printable(hidden(_short(str(part)))) for part in (asked, found))
        do = printable(hidden(str(do)), keep="\n")
        super().__init__(f"{asked}: {found}. {do}.")
        self.asked, self.found, self.do = asked, found, do

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:  # survives pickling between processes
        return type(self), (self.asked, self.found, self.do)


def _short(text: str) -> str:
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}..."


@contextmanager
def noted(doing: str) -> Iterator[None]:
    """Note on an error that is none of ditkit's, such as one of a plug, what was being done."""
    try:
        yield
    except DitkitError:
        raise
    except Exception as e:
        e.add_note(doing)
        raise


class UserError(DitkitError, ValueError):
    """The request, the settings or the files cannot be used as they are."""

    exit_code = 2


class RequestError(UserError):
    """What to make is impossible: a size, a count, a name."""


class SetupError(UserError):
    """How to make it is impossible: a device, a dtype, an unknown key."""


class LoadError(UserError):
    """A model's files are missing, damaged or contradict each other."""


class StateError(UserError):
    """A saved State cannot be read, or belongs to another version or model."""


class OutputError(UserError):
    """The result cannot be written where it was asked for."""


class PipelineError(UserError):
    """Stages that do not fit together."""


class MissingDependency(UserError):
    """An optional package is not installed; the message gives the install line."""


class PlaceError(DitkitError):
    """A place where a stage should run cannot run it, or is not what was asked for. The message names the place."""


class Lost(PlaceError):
    """A place was not reached, or stopped answering. What it was doing can be done again, ``after`` so many seconds."""

    after = 0.0


def needed(module: str, asked: str, extra: str) -> Any:
    """An optional package, imported. Raises MissingDependency, with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        found = f"{module.partition('.')[0]} is not installed"
        raise MissingDependency(asked, found, f'Run: pip install "ditkit[{extra}]"') from None


def check_known(name: str, known: Collection[str], asked: str, found: str, error: type[DitkitError]) -> None:
    """Raises ``error`` for a name that is not among ``known``, which ``found`` says in words."""
    if name not in known:
        raise error(asked, f"{found}{nearest(name, known)}", f"Use one of: {', '.join(known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
