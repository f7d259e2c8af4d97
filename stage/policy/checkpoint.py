"""Reading a Janus checkpoint folder, with every cheap check before the weights are touched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor, AutoTokenizer, JanusForConditionalGeneration

from stage.paths import resolve

IMAGE_TOKENS = ("image_token", "boi_token", "eoi_token")


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode with the tokenizer and image processor that were saved beside it."""

    model: JanusForConditionalGeneration
    tokenizer: Any
    image_processor: Any


def resolve_dtype(name: str) -> torch.dtype:
    """`float32` to `torch.float32`. Raises ValueError for anything but a floating-point type of torch."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must name a floating-point type of torch; got {name!r}. Use float32, bfloat16 or float16."
        )
    return dtype


def read_checkpoint(path: str | Path, dtype: torch.dtype) -> Checkpoint:
    """Load a Janus saved by transformers' `save_pretrained` from a local folder; nothing is downloaded.

    `lm_head` is tied to the text embeddings or not, as the folder's config.json says. Only safetensors are read.

    Raises FileNotFoundError for a missing folder or file, ValueError for a file of another model, a damaged
    safetensors file, a tokenizer without the image tokens, or weights that do not fill the model.
    """
    folder = resolve(str(path))
    _check_config(folder)
    for file in _weight_files(folder):
        _check_safetensors(file)
    tokenizer = _read_tokenizer(folder)
    image_processor = _read_image_processor(folder)
    loaded: Any = JanusForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"the weights in {folder} must fill the whole model; {len(missing)} tensors are missing, first "
            f"{missing[0]}. They would be random: save the checkpoint again with save_pretrained."
        )
    return Checkpoint(model.eval(), tokenizer, image_processor)


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"a checkpoint must be a local folder; {folder} does not exist. Download it first, or correct model.path."
        )
    config = _require(folder, "config.json")
    kind = _read_json(config).get("model_type")
    if kind != "janus":
        raise ValueError(
            f'config.json must be that of a transformers Janus, "model_type": "janus"; {config} has {kind!r}. '
            "Convert the checkpoint to the transformers layout."
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [_require(folder, "model.safetensors")]
    names = sorted(set(_read_json(index)["weight_map"].values()))
    return [_require(folder, name) for name in names]


def _check_safetensors(file: Path) -> None:
    # Opening compares the header with the length of the file, and reads no tensor.
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"weights must be a whole safetensors file; {file} ({file.stat().st_size} bytes) is damaged: {error}. "
            "Copy or download it again."
        ) from error


def _read_tokenizer(folder: Path) -> Any:
    _require(folder, "tokenizer_config.json")
    _require(folder, "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = tokenizer.get_vocab()
    absent = [name for name in IMAGE_TOKENS if getattr(tokenizer, name, None) not in known]
    if absent:
        raise ValueError(
            f"the tokenizer must name Janus's image tokens {', '.join(IMAGE_TOKENS)}; {folder} lacks "
            f"{', '.join(absent)}. Take tokenizer.json and tokenizer_config.json from a Janus checkpoint."
        )
    return tokenizer


def _read_image_processor(folder: Path) -> Any:
    # Either name will do: transformers 5 writes the first, the checkpoints of transformers 4 have the second.
    if not (folder / "processor_config.json").is_file():
        _require(folder, "preprocessor_config.json")
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be JSON; {file} is not: {error}. Copy it again.") from error


def _require(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"a checkpoint folder must contain {name}; {folder} does not. Copy it there.")
    return file
