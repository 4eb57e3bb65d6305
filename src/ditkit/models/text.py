"""Prompts -> token ids, as Wan does it: clean the text, cut it into pieces, end it with ``</s>``.

The rules of cutting are those of ``tokenizer.json``, run by the ``tokenizers`` library; transformers is not needed,
and its T5 class (5.x) ignores parts of that file: the normaliser, and which id is unknown.
Leaves out: padding, which nothing here needs, and reading a bare ``spiece.model``.
Sources: Wan2.1 ``wan/modules/tokenizers.py`` (cleaning, 512 tokens); the umt5-xxl tokenizer (``</s>`` ends)."""

import functools
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ditkit.errors import LoadError
from ditkit.reading import file_at, read_bytes, stranger
from ditkit.state import digest

END = "</s>"


def clean(prompt: str) -> str:
    """Mend broken Unicode, undo HTML escapes twice, turn every run of white space into one blank, strip."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def tokenizer_fingerprint(file: Path) -> str:
    """Stands for the file and for the cleaning, which rests on ftfy and its version."""
    import ftfy

    from ditkit.checkpoints.files.stored import hash_of  # needs torch

    return digest(hash_of(file), "clean 1", ftfy.__version__)


class WanTokenizer:
    """The tokenizer in ``folder`` (``tokenizer.json``). Raises LoadError when it is absent or unusable.

    ``fingerprint`` stands for the file and the cleaning. Calls share nothing that changes, so threads may share one."""

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer

        file = Path(folder) / "tokenizer.json"
        asked = f"loading the tokenizer from {folder}"
        if not file_at(file, asked):
            if os.path.isfile(file.parent / "spiece.model"):
                found = "it has only spiece.model and no tokenizer.json"
                raise LoadError(asked, found, "Add the tokenizer.json of the same model")
            raise LoadError(asked, "it has no tokenizer.json", "Check the path, or download the model again")
        data = read_bytes(file, asked, do="Download the file again")
        if (other := stranger(data)) is not None:
            raise LoadError(f"reading {file}", *other)
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            end = self._tokenizer.token_to_id(END)
            ids = self._tokenizer.encode("").ids
        except BaseException as error:  # the library raises nothing narrower; a panic of Rust's is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise LoadError(asked, f"tokenizer.json cannot be read ({error})", "Download the file again") from None
        if end is None or ids != [end]:
            found = f"its tokenizer.json does not end texts with {END}"
            raise LoadError(asked, found, "Use the tokenizer of a Wan model")
        self.end: int = end
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.identify = functools.partial(tokenizer_fingerprint, file)

    @property
    def fingerprint(self) -> str:
        return self.identify()

    def __call__(self, prompts: Sequence[str], max_length: int = 512) -> tuple[list[list[int]], list[int]]:
        """Cleaned prompts -> (ids of each, how many were cut off of each). At most ``max_length`` ids, the last of
        them always the end token; not padded; an empty prompt is the end token alone."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, not one string")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; the end token alone needs 1")
        rows = [self._tokenizer.encode(clean(prompt)).ids for prompt in prompts]
        cut = [max(0, len(row) - max_length) for row in rows]
        return [[*row[: max_length - 1], self.end] if n else row for row, n in zip(rows, cut, strict=True)], cut
