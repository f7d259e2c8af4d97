"""The tokenizer of the original layout: byte-level words, image tokens without names, a class that frames the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from stage.policy.text import (
    read_image_processor,
    read_tokenizer,
    write_for_the_original,
    write_for_transformers,
)

BOS, EOS, PAD = "<|first|>", "<|last|>", "<|fill|>"
SPECIAL = (
    BOS,
    EOS,
    PAD,
    "<image_placeholder>",
    "<begin_of_image>",
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
)
TEXT = "<|User|>: a red circle 12\n\n<|Assistant|>:<begin_of_image>"


def write_original(folder: Path, **config: Any) -> Tokenizer:
    """Tokenizer and processor files with the fields of Janus-Pro's; returns the bare tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a red circle on a table"], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "model_max_length": 16384,
    }
    stated = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False, **named}
    files = {
        "tokenizer_config.json": {**stated, **config},
        "processor_config.json": {"processor_class": "VLChatProcessor", "image_tag": "<image_placeholder>"},
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "image_size": 384,
            "min_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.5, 0.5],
            "rescale_factor": 0.00392156862745098,
            "do_normalize": True,
            "background_color": [127, 127, 127],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return tokenizer


def test_it_tokenizes_as_the_original_does(tmp_path: Path) -> None:
    """The bare tokenizer's numbers, with the first token that LlamaTokenizerFast of transformers 4 puts before them."""
    bare = write_original(tmp_path)
    found = read_tokenizer(tmp_path)
    expected = [found.bos_token_id, *bare.encode(TEXT, add_special_tokens=False).ids]
    assert found(TEXT).input_ids == expected and expected[-1] == found.boi_token_id
    assert len(found) == bare.get_vocab_size()  # nothing is added
    assert (found.bos_token, found.pad_token, found.eoi_token) == (BOS, PAD, "<end_of_image>")


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({"add_bos_token": False}, None, None),
        ({"add_eos_token": True}, BOS, EOS),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None, None),
    ],
)
def test_the_frame_of_the_text(config: Any, first: str | None, last: str | None, tmp_path: Path) -> None:
    bare = write_original(tmp_path, **config)
    found = read_tokenizer(tmp_path)
    tokens = found.convert_ids_to_tokens(found("red").input_ids)
    inner = bare.encode("red", add_special_tokens=False).tokens
    assert tokens == [*([first] if first else []), *inner, *([last] if last else [])]


def test_from_layout_to_layout_no_number_changes(tmp_path: Path) -> None:
    for name in ("original", "transformers", "back"):
        (tmp_path / name).mkdir()
    write_original(tmp_path / "original")
    expected = read_tokenizer(tmp_path / "original")(TEXT).input_ids
    write_for_transformers(tmp_path / "original", tmp_path / "transformers", 576)
    assert read_tokenizer(tmp_path / "transformers")(TEXT).input_ids == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "transformers")(TEXT).input_ids == expected
    write_for_the_original(tmp_path / "transformers", tmp_path / "back", 384, 576)
    assert read_tokenizer(tmp_path / "back")(TEXT).input_ids == expected
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizerFast" and config["add_bos_token"] is True


def test_the_image_processor(tmp_path: Path) -> None:
    write_original(tmp_path)
    for _ in range(2):  # as it came, and as it is written
        found: Any = read_image_processor(tmp_path)
        assert (found.size["height"], found.size["width"], found.min_size) == (384, 384, 14)
        assert tuple(found.image_std) == (0.25, 0.5, 0.5) and tuple(found.background_color) == (127, 127, 127)
        (tmp_path / "again").mkdir(exist_ok=True)
        write_for_the_original(tmp_path, tmp_path / "again", 384, 576)
        tmp_path = tmp_path / "again"
