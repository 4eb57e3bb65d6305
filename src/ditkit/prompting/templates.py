"""Templates: what a language model is told to make of a prompt. Each is a TOML file with a name and a version.

Those of ditkit lie in ``assets/prompts``. A file of yours takes their place: its text, not its path, goes into the
request, so that a State is whole without the file. Leaves out: asking the model."""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError

from ditkit.errors import RequestError, nearest
from ditkit.reading import decoded, parse_toml, read_bytes
from ditkit.request import Request, one_of, sentence

FOLDER = Path(__file__).parents[1] / "assets" / "prompts"
AUTO = "auto"
PICTURES = ("image", "last_image")
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|「[^」]*」|『[^』]*』|《[^》]*》')
_HAN, _KANA, _HANGUL = r"[\u3400-\u4dbf\u4e00-\u9fff]", r"[\u3040-\u30ff]", r"[\uac00-\ud7af]"


Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Template(BaseModel):
    """``pictures``: the fields of the run that the model is shown, in this order. ``sha256`` is that of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Word = Field(description="a text")
    version: int = Field(description="a whole number")
    language: Word = Field(description="a text such as en")
    pictures: list[Annotated[str, one_of(PICTURES, "picture")]] = Field(description="a list such as [] or ['image']")
    instructions: Word = Field(description="a text of at least a word")
    _sha256: str = PrivateAttr()

    @property
    def sha256(self) -> str:
        return self._sha256

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Raises RequestError."""
        asked = f"the template {origin}"
        values: dict[str, Any] = parse_toml(text, asked, RequestError, do="Correct it")
        try:
            template = cls(**values)
        except ValidationError as e:
            raise sentence(cls, e, values, asked, RequestError) from None
        template._sha256 = hashlib.sha256(text.encode()).hexdigest()
        return template


@cache
def packaged() -> Mapping[str, str]:
    """Name -> text of ditkit's own templates."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.toml"))}


@cache
def packaged_sha256() -> str:
    """One hash of all of them: a result that came from others is another result."""
    return hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in packaged().items()).encode()).hexdigest()


def is_file(given: str) -> bool:
    """Whether a template is named by the path of a file: it is neither one of ditkit's nor a text."""
    return given != AUTO and given not in packaged() and "\n" not in given


def placed(request: Request) -> Request:
    """``request`` with the text of its template in place of the file's path. Raises RequestError."""
    given = request.expand_template
    if not is_file(given):
        return request
    asked, path = f"expand_template={given!r}", Path(os.path.expanduser(given))
    try:
        text = decoded(read_bytes(path, asked, RequestError), asked, RequestError, do="Save it as UTF-8 text")
    except FileNotFoundError:
        known = (AUTO, *packaged())
        raise RequestError(asked, f"there is no template and no file of that name{nearest(given, known)}",
                           f"Give a file, or one of {', '.join(known)}") from None  # fmt: skip
    Template.parse(text, given)
    return request.model_copy(update={"expand_template": text if "\n" in text else f"{text}\n"})


def chosen(given: str, prompt: str, pictures: Collection[str]) -> Template:
    """The template for ``prompt``: that of the name, or the one whose text ``given`` is; ``auto`` goes by the pictures
    that the run has and by the language of the prompt. Raises RequestError."""
    if given == AUTO:
        task = "flf2v" if {*PICTURES} <= {*pictures} else "i2v" if "image" in pictures else "t2v"
        given = f"{task}-{language_of(prompt)}"
    if given not in packaged() and "\n" not in given:
        raise RequestError(f"expand_template={given!r}", f"there is no such template{nearest(given, packaged())}",
                           f"Begin the run with Pipeline.begin, or give one of {', '.join(packaged())}")  # fmt: skip
    template = Template.parse(packaged().get(given, given), given if given in packaged() else "of the request")
    if missing := [name for name in template.pictures if name not in pictures]:
        raise RequestError(f"expand_template={template.name!r}", f"it shows the run's {missing[0]}, and there is none",
                           f"Give {missing[0]}, or take t2v-{language_of(prompt)}")  # fmt: skip
    return template


def language_of(prompt: str) -> str:
    """``zh`` where at least half of the words are Chinese characters, each counted as a word; else ``en``: Wan knows
    these two. What stands in quotation marks is a sign in the picture and does not count."""
    text = _QUOTED.sub(" ", prompt)
    if re.search(f"{_KANA}|{_HANGUL}", text):
        return "en"
    han = len(re.findall(_HAN, text))
    others = len(re.findall(r"[^\W\d_]+", re.sub(_HAN, " ", text)))
    return "zh" if han and han >= others else "en"
