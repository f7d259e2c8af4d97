"""BLIP-VQA against transformers' own forward pass, image by image and question by question, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.rewards.blip_vqa import BlipVQAReward
from stage.rewards.phrases import SpacyPhrases, TemplatePhrases
from stage.rewards.pixels import CLIP_MEAN, CLIP_STD
from stage.types import Prompt
from tests.rewards.tiny_bert import VOCABULARY, save_tokenizer
from tests.rewards.tiny_towers import pictures

BEGIN = len(VOCABULARY)  # the answer's first token; the one after it begins a question
PROMPTS = (Prompt(1, "a red cat and a blue dog"), Prompt(2, "a zebra"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BlipConfig, BlipForQuestionAnswering

    place = tmp_path_factory.mktemp("blip")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {
        **small,
        "encoder_hidden_size": 16,
        "vocab_size": len(VOCABULARY) + 2,
        "bos_token_id": BEGIN,
        "pad_token_id": 0,
        "sep_token_id": VOCABULARY.index("[SEP]"),
        "max_position_embeddings": 40,
    }
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4)
    model.eval().save_pretrained(place)
    save_tokenizer(place, 40)
    return place


def reward(folder: Path, **changed: Any) -> BlipVQAReward:
    settings: dict[str, Any] = {
        "path": str(folder),
        "revision": None,
        "phrases": TemplatePhrases(),
        "most": 8,
        "side": 24,  # other than the model's own 16, so that positions are interpolated
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 3,
        **changed,
    }
    return BlipVQAReward(**settings)


def by_hand(folder: Path, image: torch.Tensor, question: list[str]) -> float:
    """One pair through transformers' own forward pass: no padding, no batch, softmax over all tokens."""
    from transformers import BlipForQuestionAnswering

    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    pixels = image.permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    ids = torch.tensor(
        [[BEGIN + 1, *(VOCABULARY.index(word) for word in question), VOCABULARY.index("[SEP]")]]
    )
    found = []
    hook = model.text_decoder.register_forward_hook(
        lambda module, inputs, output: found.append(output.logits)
    )
    with torch.no_grad():
        model(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.tensor([[BEGIN]]),
            interpolate_pos_encoding=True,
        )
    hook.remove()
    chances = found[0][0, 0].double().softmax(0)
    yes, no = (float(chances[VOCABULARY.index(word)]) for word in ("yes", "no"))
    return yes / (yes + no)


def test_every_phrase_is_asked_and_multiplied(folder: Path) -> None:
    images = pictures(2, 2, 24, 24)
    scores = reward(folder)(images, PROMPTS)
    questions = [[["a", "red", "cat", "?"], ["a", "blue", "dog", "?"]], [["a", "zebra", "?"]]]
    for p in range(2):
        for g in range(2):
            expected = math.prod(by_hand(folder, images[p, g], words) for words in questions[p])
            assert scores.parts[p, g, 0].item() == pytest.approx(expected, abs=1e-4)
    assert len(set(scores.parts.flatten().tolist())) == 4
    assert scores.reasons[0][0].startswith("a red cat? 0.") and "a blue dog?" in scores.reasons[0][0]
    assert scores.ranges == ((0.0, 1.0),)


def test_the_size_of_a_batch_changes_nothing(folder: Path) -> None:
    images = pictures(2, 3, 24, 40)
    one, many = (reward(folder, batch_size=size)(images, PROMPTS).parts for size in (1, 64))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_any_image_becomes_a_square(folder: Path) -> None:
    assert reward(folder)._look(pictures(1, 2, 24, 40).flatten(0, 1)).shape == (2, 1 + (24 // 8) ** 2, 16)


def test_only_so_many_phrases_are_asked(folder: Path) -> None:
    images = pictures(1, 1, 24, 24)
    first = reward(folder, most=1)(images, PROMPTS[:1])
    assert first.reasons[0][0].count("?") == 1
    assert first.parts.item() == pytest.approx(
        by_hand(folder, images[0, 0], ["a", "red", "cat", "?"]), abs=1e-4
    )


def test_what_cannot_be_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.' has none"):
        reward(folder).check([Prompt(1, ".")])
    with pytest.raises(ValueError, match="most and side are at least 1, got 0"):
        reward(folder, most=0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "git"}))
    with pytest.raises(ValueError, match="type 'blip', it says 'git'"):
        reward(tmp_path)


def test_phrases_of_templates() -> None:
    split = TemplatePhrases()
    assert list(split("a green bench and a blue bowl")) == ["a green bench", "a blue bowl"]
    assert list(split("Two cups, three mats, and a sandy bandana.")) == [
        "Two cups",
        "three mats",
        "a sandy bandana",
    ]


def test_a_parser_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r"extra `compbench`.*TemplatePhrases"):
        SpacyPhrases("no_such_pipeline")
