"""Tokenizer and image processor beside a checkpoint, read from either layout and written for either."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    GenerationConfig,
    JanusImageProcessor,
    JanusProcessor,
    PreTrainedTokenizerFast,
)

from stage.policy.weights import read_json, require, write_json

# Names of the image tokens, and what the original calls them (janus/models/processing_vlm.py: VLChatProcessor).
IMAGE_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
_TAGS = {"image_token": "image_tag", "boi_token": "image_start_tag", "eoi_token": "image_end_tag"}
_OF_THE_ORIGINAL = "VLMImageProcessor"
GUIDANCE = 5.0  # of images drawn by transformers' `generate`, as the original draws them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, which names the image tokens.

    The original layout holds them without names. Its tokenizer class, LlamaTokenizerFast, would build another tokenizer
    in transformers 5 than tokenizer.json describes; that file is therefore taken as it is.

    Raises FileNotFoundError for missing files, ValueError where the image tokens are not in the vocabulary.
    """
    stated = read_json(require(folder, "tokenizer_config.json"))
    read_json(require(folder, "tokenizer.json"))
    named = any(name in stated or name in (stated.get("extra_special_tokens") or {}) for name in IMAGE_TOKENS)
    tokenizer = _described(folder, {} if named else _named_tokens(folder))
    if str(stated.get("tokenizer_class")).startswith("LlamaTokenizer"):
        _frame(tokenizer, bos=stated.get("add_bos_token", True), eos=stated.get("add_eos_token", False))
    known = tokenizer.get_vocab()
    absent = [name for name in IMAGE_TOKENS if getattr(tokenizer, name, None) not in known]
    if absent:
        raise ValueError(
            f"the tokenizer must name Janus's image tokens {', '.join(IMAGE_TOKENS)}; {folder} lacks "
            f"{', '.join(absent)}. Take tokenizer.json and tokenizer_config.json from a Janus checkpoint."
        )
    return tokenizer


def read_image_processor(folder: Path) -> Any:
    """The image processor of a checkpoint folder. Raises FileNotFoundError when its configuration is not there."""
    # Either name will do: transformers 5 writes the first, the checkpoints of transformers 4 have the second.
    if not (folder / "preprocessor_config.json").is_file():
        require(folder, "processor_config.json") if _is_whole(folder) else require(
            folder, "preprocessor_config.json"
        )
        return _auto_processor(folder)
    stated = read_json(folder / "preprocessor_config.json")
    if stated.get("image_processor_type") != _OF_THE_ORIGINAL:
        return _auto_processor(folder)
    fields = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor", "background_color")
    kept = {name: stated[name] for name in fields if stated.get(name) is not None}
    side = stated.get("image_size")
    if not isinstance(side, int):
        raise ValueError(
            f"the image processor must state image_size, pixels a side; {folder / 'preprocessor_config.json'} has "
            f"{side!r}. Copy it again."
        )
    return JanusImageProcessor(size={"height": side, "width": side}, **kept)


def _auto_processor(folder: Path) -> Any:
    try:
        # Without the last word, transformers asks the terminal whether code beside the file may run.
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"the image processor must be one that transformers has, since code of a checkpoint is not run; {folder} "
            "names another. Take preprocessor_config.json from a Janus checkpoint."
        ) from error


def generation_config(tokenizer: Any) -> dict[str, Any]:
    """What transformers' `generate` needs to draw images: the tokens of unconditional rows, and the guidance."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "guidance_scale": GUIDANCE,
        "generation_kwargs": {"boi_token_id": tokenizer.convert_tokens_to_ids(tokenizer.boi_token)},
    }


def write_for_transformers(source: Path, folder: Path, image_tokens: int) -> Any:
    """Tokenizer, processor and generation configuration for transformers' `from_pretrained`; returns the tokenizer."""
    tokenizer = read_tokenizer(source)
    processor = JanusProcessor(read_image_processor(source), tokenizer, num_image_tokens=image_tokens)
    processor.save_pretrained(folder)
    stated = source / "generation_config.json"
    if not stated.is_file():
        GenerationConfig(**generation_config(tokenizer)).save_pretrained(folder)
    elif stated.parent != folder:
        shutil.copyfile(stated, folder / stated.name)
    return tokenizer


def write_for_the_original(source: Path, folder: Path, image_size: int, image_tokens: int) -> None:
    """Tokenizer and processor files as VLChatProcessor of the original reads them, on transformers 4."""
    tokenizer, images = read_tokenizer(source), read_image_processor(source)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {name: str(token) for name, token in named.items() if token is not None}
    special_tokens = {
        **special,
        "additional_special_tokens": [getattr(tokenizer, name) for name in IMAGE_TOKENS],
    }
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": tokenizer.bos_token_id in tokenizer("a").input_ids[:1],
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": _OF_THE_ORIGINAL,
            "processor_class": "VLChatProcessor",
            "image_size": image_size,
            "min_size": images.min_size,
            "do_normalize": images.do_normalize,
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            "rescale_factor": images.rescale_factor,
            "background_color": list(getattr(images, "background_color", None) or (127, 127, 127)),
        },
    )
    tags = {tag: getattr(tokenizer, name) for name, tag in _TAGS.items()}
    fixed = {"add_special_token": False, "ignore_id": -100, "mask_prompt": False, "sft_format": "deepseek"}
    write_json(
        folder / "processor_config.json",
        {"processor_class": "VLChatProcessor", "num_image_tokens": image_tokens, **fixed, **tags},
    )


def _described(folder: Path, named: dict[str, Any]) -> Any:
    """The tokenizer that tokenizer.json describes."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **named)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the library behind it raises just that
        raise ValueError(
            f"tokenizer.json must describe a tokenizer; that in {folder} does not: {error}. Copy it again."
        ) from error


def _frame(tokenizer: Any, bos: bool, eos: bool) -> None:
    """Frame a text as LlamaTokenizerFast of transformers 4 does, whatever tokenizer.json says of it."""
    first, last = (
        (str(tokenizer.bos_token), tokenizer.bos_token_id),
        (str(tokenizer.eos_token), tokenizer.eos_token_id),
    )
    special = [token for token, wanted in ((first, bos), (last, eos)) if wanted and token[1] is not None]
    words = [first[0]] * (first in special) + ["$A"] + [last[0]] * (last in special)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=words, special_tokens=special)


def _named_tokens(folder: Path) -> dict[str, Any]:
    """Names for the image tokens of the original layout, as an argument of the tokenizer."""
    file = folder / "processor_config.json"
    tags = read_json(file) if file.is_file() else {}
    tokens = {name: tags.get(_TAGS[name]) or token for name, token in IMAGE_TOKENS.items()}
    content = read_json(folder / "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab") or ()
    known = {token["content"] for token in content.get("added_tokens", ())} | set(vocabulary)
    # A token that is not there would be added, with a number beyond the embeddings.
    return {"extra_special_tokens": tokens} if known.issuperset(tokens.values()) else {}


def _is_whole(folder: Path) -> bool:
    """Whether processor_config.json of transformers 5 is there, which holds the image processor too."""
    file = folder / "processor_config.json"
    return file.is_file() and "image_processor" in read_json(file)
