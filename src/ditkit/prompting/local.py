"""A language model of a folder, by transformers, in this process; it may see pictures. It stays in memory beside the
video model's parts; ``placement = {expand_prompt = "process"}`` puts it into a process of its own."""

import copy
import os
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ditkit.contracts import Answer, Wish
from ditkit.errors import LoadError, SetupError
from ditkit.events import SILENT, Events
from ditkit.prompting.cleaning import split_reasoning
from ditkit.prompting.server import shrunk
from ditkit.reading import is_litter
from ditkit.state import digest
from ditkit.store.hashes import HASHES

_TURN = threading.Lock()  # sampling draws from torch's own generator, which all threads share
ASK_NOBODY = {"local_files_only": True, "trust_remote_code": False}  # neither the hub, nor code in the folder


class LocalExpander:
    """``folder``: config, weights, tokenizer with a chat template; a processor where the model sees pictures.
    ``place`` tells dtype and device, when they are needed."""

    def __init__(self, folder: str, place: Callable[[], tuple[str, str]]):
        self.name, self.folder, self._place = f"transformers:{folder}", Path(os.path.expanduser(folder)), place
        self._lock = threading.RLock()
        self._loaded: tuple[Any, Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of all files that decide what it says, and of its dtype; it is not loaded for that."""
        self._check()
        kinds = {".json", ".jinja", ".txt", ".model", ".safetensors", ".bin"}
        files = sorted(f for f in self.folder.iterdir() if f.suffix in kinds and not is_litter(f.name))
        return digest("transformers", self._place()[0], {f.name: HASHES.of(f) for f in files})

    def _check(self) -> None:
        if not os.path.isfile(self.folder / "config.json"):
            found = f"{self.folder} holds no config.json"
            raise SetupError(f"expander={self.name!r}", found, "Give the folder of a transformers model")

    def load(self, events: Events = SILENT) -> None:
        """Raises LoadError."""
        with self._lock:
            if self._loaded is None:
                with events.span("load", component="prompt_expander"):
                    self._loaded = self._open()

    def _open(self) -> tuple[Any, Any]:
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

        self._check()
        asked, (dtype, device) = f"loading the language model {self.folder}", self._place()
        try:
            sees = AutoConfig.from_pretrained(self.folder, **ASK_NOBODY).model_type in SEEING
            reader = (AutoProcessor if sees else AutoTokenizer).from_pretrained(self.folder, **ASK_NOBODY)
            cls = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model: Any = cls.from_pretrained(self.folder, **ASK_NOBODY, dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise LoadError(asked, " ".join(str(e).split())[:300], "Give a whole folder of a chat model") from None
        if not reader.chat_template:
            raise LoadError(asked, "its tokenizer has no chat template", "Take a model that was made to follow orders")
        return model.to(device).eval().requires_grad_(False), reader

    def __call__(self, wish: Wish) -> Answer:
        """The same seed gives the same answer; torch's generators are left as they were. Raises LoadError, and
        SetupError for pictures that the model cannot see."""
        import torch

        self.load()
        assert self._loaded is not None
        model, reader = self._loaded
        if wish.pictures and not hasattr(reader, "image_processor"):
            do = "Take one that sees, or a template that shows no picture, such as expand_template=t2v-en"
            raise SetupError(f"showing a picture to {self.name}", "the model reads text alone", do)
        inputs = reader.apply_chat_template(
            _messages(wish, hasattr(reader, "image_processor")),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ).to(model.device)  # fmt: skip
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        length = inputs["input_ids"].shape[1]
        cards = [model.device] if model.device.type == "cuda" else []
        with _TURN, torch.inference_mode(), torch.random.fork_rng(devices=cards):
            torch.manual_seed(wish.seed % 2**64)
            ids = model.generate(**inputs, generation_config=_sampling(model, wish))[0, length:].tolist()
        raw = reader.decode(ids, skip_special_tokens=True)
        text, thought = split_reasoning(raw)
        ends = model.generation_config.eos_token_id
        stopped = bool(ids) and ids[-1] in (ends if isinstance(ends, list) else [ends])
        return Answer(raw, text, thought, self.name, model.config.model_type, "", "stop" if stopped else "length",
                      length, len(ids))  # fmt: skip


def _messages(wish: Wish, parts: bool) -> list[dict[str, Any]]:
    """A processor wants lists of parts, a tokenizer texts."""

    def content(text: str, *seen: dict[str, Any]) -> Any:
        return [*seen, {"type": "text", "text": text}] if parts else text

    seen = [{"type": "image", "image": shrunk(picture)} for picture in wish.pictures]
    told = {"system": content(wish.instructions), "user": content(wish.prompt, *seen)}
    return [{"role": role, "content": text} for role, text in told.items()]


def _sampling(model: Any, wish: Wish) -> Any:
    """The model's own settings (top-p, penalties), with the temperature and the length that were asked for."""
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = wish.max_tokens, None
    config.do_sample = wish.temperature > 0
    if config.do_sample:
        config.temperature = wish.temperature
    else:  # these would be complained about
        config.temperature = config.top_p = config.top_k = None
    return config
