"""A short prompt to one that says what the video model wants to know, by a language model.
The original stays in ``prompt``; what is encoded instead is ``expanded_prompt``; ``expansion`` tells how it came about.
Leaves out: what the model is told (``prompting/templates.py``)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ditkit.contracts import Answer, Wish
from ditkit.errors import PlaceError, RequestError, SetupError
from ditkit.execution.stage import BaseStage, Context
from ditkit.execution.stage_list import StageList
from ditkit.prompting.cleaning import cleaned
from ditkit.prompting.templates import PICTURES, chosen, packaged_sha256
from ditkit.reading import check_value
from ditkit.state import State


@dataclass(frozen=True)
class ExpandPrompt(BaseStage):
    """``templates`` is the hash of ditkit's own templates: with others the result is another one."""

    templates: str = packaged_sha256()

    name = "expand_prompt"
    reads = ("prompt", "seed", "request")
    optional = PICTURES
    writes = ("expanded_prompt", "expansion")
    components = ("prompt_expander",)
    together = True

    def skip_reason(self, state: State) -> str:
        return "the request has expand=no" if state.get("request", {}).get("expand", "no") == "no" else ""

    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        if self.templates != packaged_sha256():
            raise PlaceError("expanding a prompt", "the templates here are not those of the caller",
                             "Use the same version of ditkit on both machines")  # fmt: skip
        columns = zip(inputs["prompt"], inputs["seed"], strict=True)
        done = [self.expand(prompt, seed, i, inputs, ctx) for i, (prompt, seed) in enumerate(columns)]
        return {"expanded_prompt": [text for text, _ in done], "expansion": [about for _, about in done]}

    def expand(self, prompt: str, seed: int, clip: int, inputs: Mapping[str, Any], ctx: Context) -> tuple[str, Any]:
        """What becomes of one prompt, and how that came about."""
        settings, expander = ctx.settings, ctx.components["prompt_expander"]
        template = chosen(settings.expand_template, prompt, [name for name in PICTURES if name in inputs])
        pictures = tuple(inputs[name][clip].cpu().numpy() for name in template.pictures)
        sampling = settings.expand_temperature, seed + settings.expand_attempt, settings.expand_max_tokens
        wish = Wish(template.instructions, prompt, pictures, *sampling)
        about = {
            "expander": expander.name, "template": template.name, "template_version": template.version,
            "template_sha256": template.sha256, "language": template.language, "pictures": template.pictures,
            "temperature": wish.temperature, "seed": wish.seed,
        }  # fmt: skip
        answer: Answer | None = None
        try:
            answer = whole(expander(wish), expander.name)
            text = useful(answer, expander.name, wish.max_tokens)
        except PlaceError as e:
            if not settings.expand_fallback:
                do = f"{e.do}; or go on with the raw prompt by expand_fallback"
                raise PlaceError(e.asked, e.found, do) from None
            ctx.cacheable = False  # another try may go better
            ctx.events.emit("prompt.fallback", clip=clip, prompt=prompt, reason=str(e))
            text, about = prompt, {**about, "failure": str(e)}
        return text, about | ({} if answer is None else {k: v for k, v in asdict(answer).items() if k != "text"})


def whole(answer: Answer, place: str) -> Answer:
    """``answer`` as it is. Raises PlaceError for one that no file could hold: with half of a character."""
    try:
        check_value(asdict(answer))
    except ValueError:
        found, do = "its answer holds half of a character", "Try another seed or another model"
        raise PlaceError(f"expanding a prompt at {place}", found, do) from None
    return answer


def useful(answer: Answer, place: str, max_tokens: int) -> str:
    """The prompt that an answer holds. Raises PlaceError for an empty, a filtered and a cut one."""
    asked, text = f"expanding a prompt at {place}", cleaned(answer.text)
    if answer.finish == "length":
        where = " (it was still reasoning)" if answer.reasoning and not text else ""
        raise PlaceError(asked, f"the answer was cut off at {max_tokens} tokens{where}", "Raise expand_max_tokens")
    if answer.finish == "content_filter":
        raise PlaceError(asked, "the server's filter stopped the answer", "Say it in other words")
    if not text:
        found = "the model reasoned and did not answer" if answer.reasoning else "the answer is empty"
        raise PlaceError(asked, found, "Try another seed or another model")
    return text


def check_asked(pipeline: StageList, state: State, start: str | None, until: str | None) -> None:
    """Before a run: raises SetupError where a prompt shall be expanded and nothing is there that can, and RequestError
    where a person shall be asked and the run would go on without that."""
    expand, name = state["request"].get("expand", "no"), ExpandPrompt.name
    if expand != "no" and name not in pipeline.names and "expanded_prompt" not in state:
        found = "nothing is there that expands prompts"
        raise SetupError(f"expand={expand!r}", found, "Name a server or a folder with expander")
    if expand == "ask" and until != name and any(s.name == name for s in pipeline.planned(state, start, until)):
        do = f"Run it until={name!r}, change expanded_prompt of its State, and run that State"
        raise RequestError("a run with expand='ask'", "it does not stop to ask", do)
