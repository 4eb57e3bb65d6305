"""Tiny random chat models on disk, as transformers and mlx-lm load them: a text model and one that sees pictures.

They babble. What can be tested with them is all but the sense of an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}IMAGE{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>", "<image>"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = ["a red circle moves slowly to the right while the camera stands still"] * 3


def tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = template
    return made


def like_a_chat_model(model: Any, end: int) -> None:
    """It samples, as `transformers serve` does only where the model's own settings say so. And about one token in
    eighty is the last one, because a random model would never end: the first channel is a constant, and the row of the
    end token answers to it. With temperature 0 the end comes at once, and the answer is empty."""
    model.generation_config.do_sample = True
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.05
        model.get_output_embeddings().weight[end, 0] = 0.35


def write_text_model(folder: Path) -> Path:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=4096,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None, **SIZES,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    like_a_chat_model(model, words.eos_token_id)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_seeing_model(folder: Path) -> Path:
    """A LLaVA: a CLIP of one layer before a Llama of two. A picture is (32 / 16) ** 2 = 4 tokens."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    words = tokenizer(TEMPLATE.replace("IMAGE", "<image>"))
    text = LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=4096,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None, **SIZES,
    )  # fmt: skip
    seen = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=32, **SIZES)
    token = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(text_config=text, vision_config=seen, image_token_index=token, image_token_id=token,
                         vision_feature_select_strategy="default", vision_feature_layer=-1)  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    like_a_chat_model(model, words.eos_token_id)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures, words, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=words.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder
