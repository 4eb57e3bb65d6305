"""An error that is none of ditkit's (of a library, of a plug, of ditkit's own faults), told in one sentence, and its
traceback in a file. Leaves out: what is kept of the run that it ended (``cli/job.py``)."""

import errno
import os
import re
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import ditkit
from ditkit import limits
from ditkit.errors import DitkitError
from ditkit.filenames import free
from ditkit.hiding import hidden, printable

FILES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # read by libraries, which name none
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP")  # written by libraries
_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|unable to allocate|alloc_failed",
                     re.IGNORECASE)  # fmt: skip
_WANTED = re.compile(r"(?:tried|unable) to allocate ([\d.,]+) ?(bytes|[KMGTP]?i?B)", re.IGNORECASE)


def told(error: BaseException, asked: str, beside: Path | None = None) -> DitkitError:
    """The sentence about ``error``, which names the file with its traceback."""
    found, do = explained(error)
    file = written(error, beside)
    return DitkitError(doing(error, asked), found, do if file is None else f"{do}; its traceback is in {file}")


def explained(error: BaseException) -> tuple[str, str]:
    """What was found, and what to do: two parts of a sentence."""
    if wants_memory(error):
        wanted = _WANTED.search(str(error))
        what = f"{wanted[1]} {wanted[2]} of" if wanted else "more"
        found = f"it wanted {what} memory, which was not there ({short(error)})"
        return found, "Free some, or take another device or place with more (--placement), or smaller or fewer frames"
    if isinstance(error, OSError):
        return _explained_by_system(error)
    if isinstance(error, UnicodeEncodeError):
        found = f"a text has characters that {error.encoding} has not ({short(error)})"
        return found, "Set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"
    return f"it failed with {short(error)}", "If you brought no code of your own, that is a fault of ditkit: report it"


def wants_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, be it the machine's or a device's."""
    named = any(cls.__name__ in ("MemoryError", "OutOfMemoryError") for cls in type(error).__mro__)
    return named or getattr(error, "errno", None) == errno.ENOMEM or (
        isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None
    )  # fmt: skip


def _explained_by_system(error: OSError) -> tuple[str, str]:
    """The file or the variable that it is about; where nothing says which, what it says itself."""
    why = (error.strerror or str(error) or type(error).__name__).lower()
    named = " and ".join(os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, str | bytes))
    for name in (*FILES, *FOLDERS):
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and not named
        if (value := os.environ.get(name)) and missing and not os.path.exists(value):
            return f"{why}, and {name} names {value}, which is not there", f"Correct {name}, or unset it"
        if value and named and (named == value or named.startswith(os.path.join(value, ""))) and name in FOLDERS:
            return f"{named}, where {name} leads: {why}", f"Set {name} to a folder that can be written to"
    try:
        os.getcwd()
    except OSError:
        return "the working folder is not there any more", "Change to one that is"
    if named:
        return f"{named}: {why}", "Check the path, its permissions and the room on its disk"
    return why, "Look at its traceback for what it was about"


def short(error: BaseException) -> str:
    """Its class and what it says: one line, nothing in it that steers a terminal."""
    text = " ".join(printable(str(error)[: limits.MESSAGE]).split())
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def doing(error: BaseException, otherwise: str) -> str:
    """What was being done, by the note that the error carries from where it passed."""
    return next((note for note in getattr(error, "__notes__", ()) if isinstance(note, str)), otherwise)


def written(error: BaseException, beside: Path | None) -> Path | None:
    """The traceback in a new file, ``beside`` with a number where that is taken, or else a temporary one; only its
    owner can read it, and it holds no secret. None where none can be written."""
    text = f"ditkit {ditkit.__version__}\n" + hidden("".join(traceback.format_exception(error)))
    for target in (beside, None):
        with suppress(OSError):
            folder, ends = (None, ("ditkit-", ".txt")) if target is None else (target.parent, (".ditkit-", ".part"))
            number, name = tempfile.mkstemp(prefix=ends[0], suffix=ends[1], dir=folder)
            with os.fdopen(number, "wb") as file:
                file.write(text.encode(errors="backslashreplace"))
            return Path(name) if target is None else Path(name).replace(free(target))
    return None
