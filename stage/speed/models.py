"""Policies with random weights at the shapes of published models: enough to measure speed and memory."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    PreTrainedTokenizerFast,
)

from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.template import Template
from stage.prompt_files import read_prompts
from stage.speed.sizes import LANGUAGE, SHIPPED

SHIPPED_PATH, SHIPPED_PROMPTS = (
    "package://stage/shapes/assets/tiny_janus",
    "package://stage/shapes/assets/train.jsonl",
)
TEXT_VOCABULARY = 102400
PROMPT_TOKENS = 24  # of `speed_prompts`, bos and the image start token counted
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
PAD, BOS, EOS, UNKNOWN, BOI, EOI, IMAGE = range(len(SPECIAL))


def build_policy(
    size: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0, layers: int | None = None
) -> JanusPolicy:
    """A Janus-Pro of `size` (`1b`, `7b` or `tiny`) with random weights, made on `device` in `dtype`.

    `shipped` is the tiny one with its trained weights.

    `layers` of its language model are fewer than it has, None is all.

    Weights have transformers' initialisation, image embeddings unit variance: logits then have a standard deviation
    of about one. Nothing is frozen.

    Raises ValueError for another size.
    """
    if size == SHIPPED:
        name = str(dtype).removeprefix("torch.")
        return load_policy(SHIPPED_PATH, Template("plain", "", ""), name, (), False).to(device)
    config: Any = model_config(size)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    torch.manual_seed(seed)
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(former)
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers: rotary frequencies are float32 in every type
            parameter.data = parameter.data.to(dtype)
        model.model.generation_embeddings.weight.normal_()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": BOI},
    )
    vision: Any = config.vision_config
    pixels = {"height": vision.image_size, "width": vision.image_size}
    processor = JanusImageProcessor(size=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return JanusPolicy(model, word_tokenizer(), Template("plain", "", ""), processor)


def model_config(size: str) -> JanusConfig:
    """The configuration of a published size; ValueError for a size that is not in `LANGUAGE`."""
    if size not in LANGUAGE:
        raise ValueError(
            f"a model size must be one of {', '.join(LANGUAGE)}; got {size!r}. Name one of them."
        )
    small, language = size == "tiny", LANGUAGE[size]
    width = language["hidden_size"]
    text = dict(
        model_type="llama",
        vocab_size=len(words()) if small else TEXT_VOCABULARY,
        num_key_value_heads=language["num_attention_heads"],
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **language,
    )
    vision: dict[str, Any] = dict(projection_dim=width, num_image_tokens=576)
    vq: dict[str, Any] = dict(projection_dim=width, image_token_embed_dim=width)
    if small:
        vision |= dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
        )
        vision |= dict(num_image_tokens=16)
        vq |= dict(num_embeddings=64, latent_channels=32, base_channels=32)
        vq |= dict(channel_multiplier=[1, 1, 2], num_res_blocks=1)
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=IMAGE, tie_word_embeddings=False
    )


def words() -> list[str]:
    """The vocabulary of `word_tokenizer`: the special tokens, then `w0` to `w63`."""
    return [*SPECIAL, *(f"w{index}" for index in range(64))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces and prepends bos, so that a prompt of n words is n + 2 tokens."""
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words())}, unk_token=SPECIAL[UNKNOWN])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        extra_special_tokens={
            "image_token": SPECIAL[IMAGE],
            "boi_token": SPECIAL[BOI],
            "eoi_token": SPECIAL[EOI],
        },
    )


def shipped_prompts(count: int) -> list[str]:
    """The first `count` prompts that the shipped model is trained on."""
    return [prompt.text for prompt in read_prompts(SHIPPED_PROMPTS)[:count]]


def speed_prompts(count: int) -> list[str]:
    """`count` different prompts of `PROMPT_TOKENS` tokens each."""
    length = PROMPT_TOKENS - 2
    return [
        " ".join(f"w{(prompt + word * (prompt + 1)) % 64}" for word in range(length))
        for prompt in range(count)
    ]
