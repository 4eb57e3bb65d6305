"""Language models that expand prompts: over OpenAI-compatible servers, or transformers in this process."""

from ditkit.contracts import PromptExpander
from ditkit.setup import Setup


def open_expander(setup: Setup) -> PromptExpander:
    """What ``setup.expander`` names. Nothing is loaded and nobody is asked yet. Raises SetupError."""
    assert setup.expander is not None
    kind, _, rest = setup.expander.partition(":")
    if kind == "transformers":
        from ditkit.prompting.local import LocalExpander

        return LocalExpander(rest, lambda: (setup.dtype_of("prompt_expander"), setup.device_of("prompt_expander")))
    from ditkit.prompting.server import ServerExpander

    return ServerExpander(setup.expander, setup.expander_model, setup.timeout, setup.retries, setup.plain_http)
