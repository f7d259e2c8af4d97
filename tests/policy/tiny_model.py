"""A small Janus with random weights in the transformers layout: no download, a second to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
WORDS = (
    "a photo of red green blue yellow circle square triangle and left right above below two three "
    "<|User|> <|Assistant|> :"
)
PAD, BOS, EOS, UNKNOWN, BOI, EOI, IMAGE = range(len(SPECIAL))
IMAGE_TOKENS = {"image_token": SPECIAL[IMAGE], "boi_token": SPECIAL[BOI], "eoi_token": SPECIAL[EOI]}


def tiny_tokenizer(image_tokens: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that prepends bos; `image_tokens` are its named extra tokens."""
    words = {word: index for index, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        extra_special_tokens=IMAGE_TOKENS if image_tokens is None else image_tokens,
    )


def tiny_config(
    grid: int = 4,
    vocabulary: int = 64,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    vision: dict[str, Any] | None = None,
    vq: dict[str, Any] | None = None,
    **text: Any,
) -> JanusConfig:
    """Two upsamplings, so images of `4 * grid` pixels a side. `vision`, `vq`, `text` override fields of the parts."""
    language = dict(
        model_type="llama",
        vocab_size=len(SPECIAL) + len(WORDS.split()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return JanusConfig(
        text_config={**language, **text},
        vision_config={
            **dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
            **dict(image_size=4 * grid, patch_size=4, num_image_tokens=grid * grid),
            **dict(projection_dim=hidden),
            **(vision or {}),
        },
        vq_config={
            **dict(embed_dim=8, num_embeddings=vocabulary, latent_channels=32, base_channels=32),
            **dict(channel_multiplier=[1, 1, 2], num_res_blocks=1),
            **dict(projection_dim=hidden, image_token_embed_dim=hidden),
            **(vq or {}),
        },
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )


def build_tiny_janus(folder: str | Path, *, seed: int = 0, sharpness: float = 8.0, **config: Any) -> Path:
    """Write the model, its tokenizer, processor and generation config into `folder` and return it.

    At transformers' initialisation every token is about equally likely whatever the prompt, and a comparison of
    greedy tokens would compare rounding errors: `sharpness` scales the last layer of the image head, and the
    layers before it are scaled so that prompt and image tokens matter. `config` goes to `tiny_config`.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(tiny_config(**config))
    parts = model.model
    with torch.no_grad():
        for module in (parts.language_model, parts.generation_aligner, parts.generation_head.proj_out):
            for parameter in module.parameters():
                # Norms keep their ones; biases, zero at first, must count where the model has them.
                parameter.mul_(5.0) if parameter.ndim == 2 else parameter.add_(
                    0.2 * torch.randn_like(parameter)
                )
        parts.language_model.embed_tokens.weight[PAD] = torch.randn(parts.language_model.config.hidden_size)
        parts.generation_embeddings.weight.mul_(50.0)
        parts.generation_head.vision_head.weight.mul_(sharpness)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": BOI},
    )
    vision: Any = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    images = JanusImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(folder)
    JanusProcessor(images, tiny_tokenizer(), num_image_tokens=vision.num_image_tokens).save_pretrained(folder)
    return folder
