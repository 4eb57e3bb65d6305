"""The words of the setting ``placement``: which stage, or which part of its steps, and where.

Left of the sign: ``STAGE``, ``STAGE@STEP`` (from that step on) or ``STAGE.EXPERT`` (the steps of that transformer).
Right of it: ``here``, a device of this process (``cuda:0``), ``process`` or ``process:DEVICE``, ``http://HOST:PORT``,
``ray`` or ``ray:DEVICE`` (a cluster on this machine), ``ray://HOST:PORT`` (another one)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Self

from ditkit import addresses
from ditkit.contracts import EXPERTS
from ditkit.errors import SetupError, nearest

DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
SCHEMES = ("http", "https", "ray")
FORMS = "here, cpu, cuda:N, mps, process[:DEVICE], http://HOST:PORT, ray[:DEVICE] or ray://HOST:PORT"


@dataclass(frozen=True)
class Target:
    """Which steps of which stage: all, those from ``step`` on, or those of ``expert``. ``text`` is what was written."""

    stage: str
    step: int | None = None
    expert: str | None = None
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SetupError."""
        asked, (stage, at, step) = f"placement of {text!r}", text.partition("@")
        if at:
            if not step.isdigit() or not stage:
                raise SetupError(asked, "it is not of the form STAGE@STEP", "Write denoise@10")
            return cls(stage, int(step), None, text)
        stage, dot, expert = text.partition(".")
        if dot and expert not in EXPERTS:
            raise SetupError(asked, f"there is no expert {expert!r}", f"Name one of {', '.join(EXPERTS)}")
        return cls(stage, None, expert or None, text)


@dataclass(frozen=True)
class Spec:
    """``kind``: here, process, http or ray. ``address``: of http and ray. ``device``: of the others, None: theirs to
    choose. ``text`` is what was written."""

    kind: str
    text: str
    address: str | None = None
    device: str | None = None

    @classmethod
    def parse(cls, text: str, target: str = "a stage") -> Self:
        """Raises SetupError."""
        asked = f"placement of {target} at {text!r}"
        if text == "here" or DEVICE.fullmatch(text):
            return cls("here", text, None, None if text == "here" else text)
        kind, _, device = text.partition(":")
        if kind in ("process", "ray") and (text == kind or DEVICE.fullmatch(device)):
            return cls(kind, text, None, device or None)
        if text.partition("://")[0].lower() not in SCHEMES:
            raise SetupError(asked, "nothing of that form is known", f"Give {FORMS}")
        try:
            host = addresses.parse(text, SCHEMES)
        except ValueError as e:
            do = "Put it into DITKIT_HOST_TOKEN" if "@" in text else "Write http://HOST:PORT"
            raise SetupError(asked, str(e), do) from None
        if host.query:
            raise SetupError(asked, "it holds more than an address", "Write http://HOST:PORT")
        if host.scheme == "ray" and host.port is None:
            raise SetupError(asked, "it has no port", "Write ray://HOST:10001")
        return cls("ray" if host.scheme == "ray" else "http", text, text.rstrip("/"))


@cache
def address(text: str) -> Spec | None:
    """The host that ``text`` (a model, a part) names, if it names one. Raises SetupError for a crooked address."""
    return Spec.parse(text) if text.lower().startswith(("http://", "https://")) else None


def specs_of(placement: Mapping[str, str]) -> dict[Target, Spec]:
    """The setting, read. Raises SetupError."""
    specs = {Target.parse(key): Spec.parse(value, key) for key, value in placement.items()}
    if len(specs) < len(placement):
        raise SetupError(f"placement of {', '.join(placement)}", "it names the same steps twice", "Leave one out")
    return specs


def expected_of(probes: Mapping[str, str], specs: Mapping[Target, Spec]) -> dict[Target, str]:
    """The setting ``expected_probes``, which has the keys of ``placement``, and for each its probe's hash or the begin
    of it. Raises SetupError."""
    known = {target.text: target for target in specs}
    for key, wanted in probes.items():
        asked = f"expected_probes of {key!r}"
        if key not in known:
            raise SetupError(asked, f"it is placed nowhere{nearest(key, known)}", "Use the same key")
        if specs[known[key]].kind == "here":
            raise SetupError(asked, "it runs in this process", "Leave it out")
        if not re.fullmatch("[0-9a-f]{8,64}", wanted):
            found = "a probe's hash is 8 to 64 hexadecimal digits"
            raise SetupError(f"{asked} as {wanted!r}", found, "Take it from `ditkit doctor --placement`")
    return {known[key]: wanted for key, wanted in probes.items()}
