"""What a decoder says against a file, as one sentence of ditkit's. Decoders are large and raise what they like: of
damaged files anything, so here alone every exception is taken for damage."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

from ditkit import limits
from ditkit.errors import DitkitError

_QUIET = threading.RLock()  # filters of warnings belong to the whole process
_SAID = 160  # characters of what a library says


@contextlib.contextmanager
def guarded(
    asked: str, error: type[DitkitError], do: str = "Save it again", found: str = "it is damaged"
) -> Iterator[None]:
    """Raise ``error`` for whatever a decoder raises within; its warnings, which speak to programmers, are not shown."""
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DitkitError:
        raise
    except MemoryError:
        raise error(asked, "it unpacks to more than there is memory for", "Make it smaller first") from None
    except Exception as e:
        raise error(asked, f"{found} ({said(e)})", do) from None


def said(e: Exception) -> str:
    """One short line of what an exception says."""
    text = " ".join(str(getattr(e, "strerror", None) or e).split()) or type(e).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _SAID else f"{text[:_SAID]}..."


def check_frame(width: int, height: int, asked: str, error: type[DitkitError]) -> None:
    """Raise ``error`` for frames that no video has."""
    if width < 1 or height < 1:
        raise error(asked, "it has no pixels", "Give another one")
    if width * height > limits.FRAME:
        found = f"its frames are {width} x {height}, more than {limits.FRAME:,} pixels"
        raise error(asked, found, "Make it smaller first")


def check_clip(frames: int, width: int, height: int, size: int, asked: str, error: type[DitkitError]) -> None:
    """Raise ``error`` where ``frames`` of a file of ``size`` bytes are more than any such file is read to."""
    check_frame(width, height, asked, error)
    most = max(limits.CLIP, min(limits.CLIP_MOST, limits.CLIP_RATIO * size))
    if frames * width * height * 3 > most:
        found = f"{frames:,} frames of {width} x {height} are more than the {most:,} bytes that such a file is read to"
        raise error(asked, found, "Make it smaller or shorter first")
