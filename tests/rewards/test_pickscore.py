"""PickScore beside transformers' own CLIPModel, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage.rewards.pickscore import PickScoreReward
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_bert import VOCABULARY, save_preprocessor, save_tokenizer
from tests.rewards.tiny_towers import PROMPTS, pictures

SETTINGS: dict[str, Any] = {"revision": None, "device": "cpu", "dtype": "float32", "batch_size": 4}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("pickscore")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(VOCABULARY), "bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
    model = CLIPModel(
        CLIPConfig(
            text_config={**small, **words, "max_position_embeddings": 77},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=16,
            logit_scale_init_value=4.6,
        )
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    save_tokenizer(folder, 77)
    save_preprocessor(
        folder, size=32, crop_size=32, do_center_crop=True, resample=3, image_mean=MEAN, image_std=STD
    )
    return folder


def test_scores_are_scaled_cosines(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(3, 2, 32, 32)
    scores = PickScoreReward(path=str(folder), **SETTINGS)(images, PROMPTS)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = torch.zeros(3, 2)
    for p, prompt in enumerate(PROMPTS):
        for g in range(2):
            pixels = ((images[p, g] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
            with torch.no_grad():  # CLIPModel normalises and scales by itself
                output = model(**tokenizer(prompt.text, return_tensors="pt"), pixel_values=pixels[None])
            expected[p, g] = output.logits_per_image[0, 0]
    torch.testing.assert_close(scores.parts[..., 0], expected, atol=1e-4, rtol=0)
    assert expected.std() > 1 and scores.reasons[0][0] == f"PickScore {expected[0, 0]:.3f}"


def test_batch_size_does_not_matter(folder: Path) -> None:
    images = pictures(3, 3, 40, 60)
    found = [
        PickScoreReward(path=str(folder), **{**SETTINGS, "batch_size": n})(images, PROMPTS).parts
        for n in (1, 9)
    ]
    # 1e-5 in the cosine, times the scale of 100.
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hf download yuvalkirstain/PickScore_v1 --local-dir"):
        PickScoreReward(path=str(tmp_path / "none"), **SETTINGS)


def test_a_small_card_and_bad_images(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    scorer = PickScoreReward(path=str(folder), **{**SETTINGS, "batch_size": 9})
    images = pictures(3, 3, 40, 60)
    refuses_bad_images(scorer, images, PROMPTS)
    survives_a_small_card(lambda: (scorer, scorer.batches), images, PROMPTS, monkeypatch, caplog, 1e-3)
