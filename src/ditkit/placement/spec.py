"""The words of the setting ``placement``: which stage, or which part of its steps, and where.

Left of the sign: ``STAGE``, ``STAGE@STEP`` (from that step on) or ``STAGE.EXPERT`` (the steps of that transformer).
Right of it: ``here``, a device of this process (``cuda:0``), ``process`` or ``process:DEVICE``, ``http://HOST:PORT``,
``ray`` or ``ray:DEVICE`` (a cluster on this machine), ``ray://HOST:PORT`` (another one).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ditkit.errors import SetupError

DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
EXPERTS = ("transformer", "transformer_2")
FORMS = "here, cpu, cuda:N, mps, process[:DEVICE], http://HOST:PORT, ray[:DEVICE] or ray://HOST:PORT"


@dataclass(frozen=True)
class Target:
    """Which steps of which stage: all, those from ``step`` on, or those of ``expert``."""

    stage: str
    step: int | None = None
    expert: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        stage, at, step = text.partition("@")
        if at:
            if not step.isdigit() or not stage:
                raise SetupError(f"placement of {text!r}", "it is not of the form STAGE@STEP", "Write denoise@10")
            return cls(stage, int(step))
        stage, dot, expert = text.partition(".")
        if dot and expert not in EXPERTS:
            raise SetupError(
                f"placement of {text!r}", f"there is no expert {expert!r}", f"Name one of {', '.join(EXPERTS)}"
            )
        return cls(stage, None, expert or None)


@dataclass(frozen=True)
class Spec:
    """``kind``: here, process, http or ray. ``address``: of http and ray. ``device``: of the others, None: theirs to
    choose. ``text`` is what was written."""

    kind: str
    text: str
    address: str | None = None
    device: str | None = None

    @classmethod
    def parse(cls, text: str, target: str = "a stage") -> Spec:
        """Raises SetupError."""
        asked = f"placement of {target} at {re.sub('(?<=//).*@', '...@', text)!r}"
        if text == "here" or DEVICE.fullmatch(text):
            return cls("here", text, None, None if text == "here" else text)
        for kind in ("process", "ray"):
            if text == kind:
                return cls(kind, text)
            if text.startswith(f"{kind}:") and DEVICE.fullmatch(text.removeprefix(f"{kind}:")):
                return cls(kind, text, None, text.removeprefix(f"{kind}:"))
        parts = urlsplit(text)
        if parts.scheme in ("http", "https", "ray"):
            return cls._address(text, asked)
        raise SetupError(asked, "nothing of that form is known", f"Give {FORMS}")

    @classmethod
    def _address(cls, text: str, asked: str) -> Spec:
        parts = urlsplit(text)
        try:
            port = parts.port
        except ValueError:
            raise SetupError(asked, "its port is not a number", "Write http://HOST:PORT") from None
        if not parts.hostname:
            raise SetupError(asked, "it names no host", "Write http://HOST:PORT")
        if parts.username or parts.password:
            raise SetupError(
                asked, "it holds a password, which would stand in every manifest", "Put it into DITKIT_HOST_TOKEN"
            )
        if parts.query or parts.fragment:
            raise SetupError(asked, "it holds more than an address", "Write http://HOST:PORT")
        if parts.scheme == "ray" and port is None:
            raise SetupError(asked, "it has no port", "Write ray://HOST:10001")
        return cls("ray" if parts.scheme == "ray" else "http", text, text.rstrip("/"))
