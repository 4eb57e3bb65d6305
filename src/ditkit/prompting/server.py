"""A language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, mlx-lm, transformers serve.

A key goes to the address that it is for (``keys.py``), and is neither kept nor told. The server is never followed to
another address, and one of this machine is asked without a proxy. Leaves out: what is asked (``templates.py``) and what
becomes of a failure (``stages/expand_prompt.py``)."""

import base64
import io
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property, partial
from typing import Any

from ditkit.contracts import Answer, Wish
from ditkit.errors import DitkitError, PlaceError, needed
from ditkit.events import SILENT, Events
from ditkit.hiding import echoes
from ditkit.keys import key_for, openai_origin, read
from ditkit.network import Proxy, certificates, proxy_for
from ditkit.prompting.cleaning import split_reasoning
from ditkit.state import digest

LONGEST_SIDE = 1024  # pixels of a picture that is sent: more costs tokens, and a prompt needs no more
CHECK = "Check that the address is that of its API"
SEEDS = 2**31  # llama.cpp and Ollama keep a seed in 32 bits, and take a negative one for "any"


class ServerExpander:
    """``url`` ends in ``/v1``, as a rule. Without ``model`` the first one that the server lists. ``timeout``: seconds
    that one answer may take; ``retries``: how often the client asks again where a server is busy or was not reached;
    ``plain_http``: a key may go over http to another machine."""

    def __init__(
        self, url: str, model: str | None = None, timeout: float = 60.0, retries: int = 2, plain_http: bool = False
    ):
        self.name, self.model, self.timeout, self.retries, self.plain_http = url, model, timeout, retries, plain_http

    @property
    def fingerprint(self) -> str:
        """Of address and model. A server that cannot be asked for its model has one too: its answer will fail."""
        try:
            model = self._model("expanding a prompt")
        except PlaceError:
            model = None
        return digest("server", self.name, model)

    def load(self, events: Events = SILENT) -> None:
        """There is nothing to load: the server has done that."""

    def __call__(self, wish: Wish) -> Answer:
        """Raises PlaceError for a server that is not there, refuses, or does not answer with a completion."""
        asked = f"expanding a prompt at {self.name}"
        model = self._model(asked)
        with self._explained(asked, model, bool(wish.pictures)):
            sampling = {"temperature": wish.temperature, "seed": wish.seed % SEEDS, "max_tokens": wish.max_tokens}
            reply = self._client.chat.completions.create(model=model, messages=messages_of(wish), **sampling)
            answer = _answer(asked, reply, model)
        key = key_for(self.name, self.plain_http)
        if key is not None and any(echoes(str(part), key) for part in astuple(answer)):
            raise PlaceError(
                asked, "its answer repeats the key that it was sent", "Trust it no more, and change the key"
            )
        return answer

    def _model(self, asked: str) -> str:
        if self.model is None:
            client = self._client
            with self._explained(asked, None, False):
                listed = client.models.list()
            names = [getattr(each, "id", None) for each in getattr(listed, "data", None) or []]
            if not names or not isinstance(names[0], str):
                raise PlaceError(asked, "it lists no models", "Name one with expander_model")
            self.model = names[0]
        return self.model

    @cached_property
    def _client(self) -> Any:
        openai = needed("openai", f"expanding prompts at {self.name}", "prompts")
        asked = f"expanding a prompt at {self.name}"
        key = key_for(self.name, self.plain_http) or "none"  # local servers want some key, and look at none
        way: dict[str, Any] = {"proxy": self._proxy.address} if self._proxy else {}
        if (trusted := certificates(asked)) is not None:
            way["verify"] = trusted
        http = openai.DefaultHttpxClient(
            trust_env=False, follow_redirects=False, timeout=self.timeout, **way,
            event_hooks={"request": [partial(_only_ours, key, read(self.name, asked).origin == openai_origin())]},
        )  # fmt: skip
        weakref.finalize(self, http.close)  # a connection that is kept for the next prompt
        return openai.OpenAI(
            base_url=self.name, api_key=key, timeout=self.timeout, max_retries=self.retries, http_client=http
        )

    @cached_property
    def _proxy(self) -> Proxy | None:
        asked = f"expanding a prompt at {self.name}"
        return proxy_for(read(self.name, asked), asked)

    @contextmanager
    def _explained(self, asked: str, model: str | None, seeing: bool) -> Iterator[None]:
        """The client's errors as PlaceError; what the server said is in them."""
        openai = needed("openai", asked, "prompts")
        try:
            yield
        except openai.APITimeoutError:
            do = "Give it more with timeout, or look at its log"
            raise PlaceError(asked, "it did not answer in time", do) from None
        except openai.APIConnectionError as e:
            through = f" through the proxy of {self._proxy.variable}" if self._proxy else ""
            found = f"it was not reached{through} ({_short(str(e.__cause__ or e))})"
            raise PlaceError(asked, found, "Start the server, or check the address") from None
        except openai.AuthenticationError as e:
            do = f"Set OPENAI_API_KEY with OPENAI_BASE_URL={self.name}, or DITKIT_EXPANDER_KEY"
            raise PlaceError(asked, f"it wants another key ({_said(e)})", do) from None
        except openai.APIStatusError as e:
            raise _refusal(asked, e, model, seeing) from None
        except (openai.OpenAIError, ValueError, RecursionError) as e:  # JSON that is none, or too deep
            if isinstance(e, DitkitError):
                raise
            found = f"its answer cannot be read ({type(e).__name__}: {_short(str(e))})"
            raise PlaceError(asked, found, CHECK) from None


def _only_ours(key: str, is_openai: bool, request: Any) -> None:
    """The client adds headers from the environment, which are for OpenAI."""
    if not is_openai:
        lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
        for name in ("OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in lines)):
            request.headers.pop(name, None)
    request.headers["Authorization"] = f"Bearer {key}"


def _refusal(asked: str, error: Any, model: str | None, seeing: bool) -> PlaceError:
    if 300 <= error.status_code < 400:
        where = error.response.headers.get("location", "nowhere")
        return PlaceError(asked, f"it sends us on to {where!r}", "Give the address itself")
    about = f" for model {model!r}" if model else ""
    do = "Check the address, which ends in /v1 with most servers, and the model's name"
    if seeing:
        do = "Take a model that sees pictures, or a template that shows none, such as expand_template=t2v-en"
    elif error.status_code >= 500:
        do = "Look at its log"
    return PlaceError(asked, f"it answered {error.status_code}{about} ({_said(error)})", do)


def messages_of(wish: Wish) -> list[dict[str, Any]]:
    """System and user message; pictures stand before the text, in data URLs."""
    seen = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in wish.pictures]
    user = [*seen, {"type": "text", "text": wish.prompt}] if seen else wish.prompt
    return [{"role": "system", "content": wish.instructions}, {"role": "user", "content": user}]


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    shrunk(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shrunk(picture: Any) -> Any:
    """uint8 [H, W, 3] -> a PIL image of at most ``LONGEST_SIDE`` pixels a side, in the same proportions."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _answer(asked: str, reply: Any, model: str) -> Answer:
    """Raises PlaceError for what is no completion: the client does not check that."""
    choices = getattr(reply, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    message, usage = getattr(first, "message", None), getattr(reply, "usage", None)
    content = getattr(message, "content", None) or ""
    if message is None or not isinstance(content, str):
        found = "its answer is no chat completion" if message is None else "its answer is no text"
        raise PlaceError(asked, found, CHECK)
    if refusal := getattr(message, "refusal", None):
        raise PlaceError(asked, f"the model refused: {refusal}", "Say it in other words")
    separated = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    text, thought = split_reasoning(content)
    told_model, build = getattr(reply, "model", None) or "", getattr(reply, "system_fingerprint", None) or ""
    finish = getattr(first, "finish_reason", None) or ""
    tokens = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return Answer(content, text, separated or thought, model, told_model, build, finish, *tokens)


def _said(error: Any) -> str:
    body = error.body
    told = body.get("message") or body.get("detail") or body.get("error") if isinstance(body, dict) else body
    return _short(str(told or error.message))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}..."
