"""Language models that expand prompts: over OpenAI-compatible servers, or transformers in this process."""
