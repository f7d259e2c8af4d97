"""A small BERT tokenizer, saved as in the folders of published models, and the settings of their preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Where bert-base-uncased has them: GroundingDINO knows the numbers of the first seven by heart.
PLACES = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS = ("yes", "no", "cat", "dog", "red", "blue", "car", "zebra", "photo", "two", "of", "tape", "roll")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _vocabulary() -> tuple[str, ...]:
    numbers = {number: word for word, number in PLACES.items()}
    first = [numbers.get(number, f"[unused{number}]") for number in range(1030)]
    return (*first, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS))


VOCABULARY = _vocabulary()


def save_tokenizer(folder: Path, max_length: int = 512) -> None:
    """A WordPiece tokenizer over whole words and letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        **{f"{name}_token": word for name, word in names.items()},
    ).save_pretrained(folder)


def save_preprocessor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
