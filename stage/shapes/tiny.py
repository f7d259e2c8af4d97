"""The tiny Janus: transformers' own architecture at a size that a laptop trains, with its tokenizer and processor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from stage.shapes.scenes import World

SPECIAL = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
    "<|User|>",
    "<|Assistant|>",
)
PAD, BEGIN, END, BOI, EOI, IMAGE = range(6)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a word of the world as about one token; any other text still encodes, in smaller pieces."""
    return _train(pre_tokenizers.ByteLevel(add_prefix_space=True), texts)


def build_speller(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As `build_tokenizer`, but every capital letter is a token, with the space before it if there is one."""
    letters = pre_tokenizers.Split(Regex(" ?[A-Z]"), "isolated")
    return _train(pre_tokenizers.Sequence([letters, pre_tokenizers.ByteLevel(add_prefix_space=False)]), texts)


def _train(splitter: pre_tokenizers.PreTokenizer, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", special_tokens=[(SPECIAL[BEGIN], BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BEGIN],
        eos_token=SPECIAL[END],
        extra_special_tokens={
            "image_token": SPECIAL[IMAGE],
            "boi_token": SPECIAL[BOI],
            "eoi_token": SPECIAL[EOI],
        },
        padding_side="left",
        model_max_length=512,
    )


def build_config(
    world: World, vocabulary: int, codes: int, hidden: int, layers: int, code_size: int = 8
) -> JanusConfig:
    """Sizes of the tiny Janus. The vision tower is a stub: it exists so that the model is a whole Janus.

    `code_size` is the dimension C of a code, in Janus-Pro 8.
    """
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=512,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            mlp_ratio=2.0,
            image_size=world.size,
            patch_size=world.patch,
            projection_dim=hidden,
            num_image_tokens=world.grid**2,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=codes,
            embed_dim=code_size,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 1, 2, 2, 4],
            num_res_blocks=1,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
            num_patches=world.grid,
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, world: World) -> JanusProcessor:
    """Processor with pixels in [-1, 1], as the VQ model speaks them."""
    images = JanusImageProcessor(
        size={"height": world.size, "width": world.size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, tokenizer, num_image_tokens=world.grid**2)


def save(model: JanusForConditionalGeneration, processor: JanusProcessor, folder: Path) -> None:
    """Writes the whole checkpoint in half precision, in files below 15 MiB."""
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": BOI},
    )
    model.half().save_pretrained(folder, max_shard_size="12MB")
    processor.save_pretrained(folder)
