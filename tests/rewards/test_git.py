"""GIT as a reward, beside transformers' own model asked one question at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.rewards.git import GITReward, questions
from stage.rewards.mentions import Mentions
from stage.types import Prompt, Scorer
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_bert import VOCABULARY
from tests.rewards.tiny_models import save_git
from tests.rewards.tiny_towers import pictures

SETTINGS: dict[str, Any] = {"revision": None, "device": "cpu", "dtype": "float32", "batch_size": 4}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLORS = Prompt(
    1,
    "a red cat and a blue dog",
    {"task_type": "color", "nouns": ["cat", "dog"], "attr_nouns": ["red cat", "blue dog"]},
)
NOUNS = Prompt(2, "a photo of a zebra", {"task_type": "object", "nouns": ["zebra"], "attr_nouns": None})
SPATIAL = Prompt(
    3,
    "a car left of a dog",
    {
        "task_type": "spatial",
        "nouns": ["car", "dog"],
        "spatial_info": {"obj1": "car", "obj2": "dog", "locality": "left of"},
    },
)
NOTHING = Prompt(4, "rain", {"task_type": "non", "nouns": []})
GENEVAL = Prompt(5, "a red car", {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]})
PROMPTS = (COLORS, NOUNS, SPATIAL, NOTHING, GENEVAL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("git")
    save_git(folder)
    return folder


def yes(folder: Path, image: torch.Tensor, question: str) -> float:
    """Softmax over the vocabulary after `[CLS] question`, yes over yes and no, as the source has it."""
    from transformers import AutoTokenizer, GitForCausalLM

    model = GitForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = ((image / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    ids = [tokenizer.cls_token_id, *tokenizer(question, add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits = model(pixel_values=pixels[None], input_ids=torch.tensor([ids])).logits[0, -1]
    probabilities = logits.double().softmax(0)
    one, other = (probabilities[VOCABULARY.index(word)] for word in ("yes", "no"))
    return float(one / (one + other))


def test_scores_are_the_answers_of_the_model(folder: Path) -> None:
    images = pictures(5, 2, 32, 32)
    scorer = GITReward(path=str(folder), **SETTINGS)
    assert isinstance(scorer, Scorer)
    scores = scorer(images, PROMPTS)
    asked = (("red cat?", "blue dog?"), ("zebra?",), (), (), ("red car?",))
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    for p, texts in enumerate(asked):
        for g in range(2):
            if texts:
                expected[p, g] = sum(yes(folder, images[p, g], text) for text in texts) / len(texts)
    torch.testing.assert_close(scores.parts[..., 0], expected, atol=1e-5, rtol=0)
    assert expected[[0, 1, 4]].std() > 0.05
    assert scores.reasons[1][0] == f"zebra? {expected[1, 0]:.3f}" and scores.reasons[2][1] == "no question"


def test_batch_size_does_not_matter(folder: Path) -> None:
    images = pictures(5, 3, 32, 32)
    found = [
        GITReward(path=str(folder), **{**SETTINGS, "batch_size": n})(images, PROMPTS).parts
        for n in (1, 3, 64)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "bound", "mean"), [("bfloat16", 0.15, 0.02), ("float16", 2e-2, 2e-3)])
def test_half_precision_moves_scores_little(folder: Path, dtype: str, bound: float, mean: float) -> None:
    """The bounds of the docstring, on random weights far sharper than trained ones."""
    images = pictures(5, 8, 32, 32)
    full, half = (
        GITReward(path=str(folder), **{**SETTINGS, "dtype": name})(images, PROMPTS).parts
        for name in ("float32", dtype)
    )
    moved = (full - half).abs()
    assert 0 < moved.max() < bound < full.std() and moved.mean() < mean


def test_prompts_without_questions_need_no_model(folder: Path) -> None:
    scores = GITReward(path=str(folder), **SETTINGS)(pictures(2, 2), (SPATIAL, NOTHING))
    assert scores.parts[..., 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_attributes_come_before_nouns() -> None:
    assert questions(Mentions("color", ("cat",), ("red cat",), None, ())) == (("red cat?",), 1.0)
    assert questions(Mentions("complex", ("cat", "dog"), None, None, ())) == (("cat?", "dog?"), 1.0)
    assert questions(Mentions("color", ("cat", "dog"), (), None, ())) == (("cat?", "dog?"), 1.0)
    assert questions(Mentions("", (), (), None, ())) == ((), 1.0)
    assert questions(Mentions("numeracy", ("cat",), ("two cat",), None, (("cat", 2),))) == ((), 0.0)


def test_what_cannot_be_scored(folder: Path) -> None:
    scorer = GITReward(path=str(folder), **SETTINGS)
    scorer.check(PROMPTS)
    with pytest.raises(ValueError, match=r"'hello' \(number 7\)"):
        scorer.check((*PROMPTS, Prompt(7, "hello")))
    with pytest.raises(ValueError, match=r"'hello' \(number 7\) cannot be scored: .*nouns"):
        scorer(pictures(1, 1), (Prompt(7, "hello", {"tag": None}),))


def test_folders_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(FileNotFoundError, match="hf download microsoft/git-large-vqav2"):
        GITReward(path=str(tmp_path / "none"), **SETTINGS)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="type 'git', it says 'bert'"):
        GITReward(path=str(other), **SETTINGS)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="does not fit GitForCausalLM: it lacks"):
        GITReward(path=str(other), **SETTINGS)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="does not fit GitForCausalLM: it has besides"):
        GITReward(path=str(other), **SETTINGS)
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    with pytest.raises(ValueError, match="fits its architecture tensor for tensor"):
        GITReward(path=str(other), **SETTINGS)
    (other / "config.json").write_text(json.dumps(config))
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds preprocessor_config\.json"):
        GITReward(path=str(other), **SETTINGS)


def test_provenance_has_every_file(folder: Path) -> None:
    found = GITReward(path=str(folder), **SETTINGS).provenance
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"} <= set(
        found["sha256"]
    )


def test_the_encoder_sees_each_picture_once(folder: Path) -> None:
    scorer = GITReward(path=str(folder), **SETTINGS)
    seen: list[int] = []
    scorer.encoder.register_forward_hook(lambda module, given, found: seen.append(len(given[0])))
    scorer(pictures(5, 2, 32, 32), PROMPTS)
    # COLORS asks two questions of each of its two pictures, NOUNS and GENEVAL one each; 6 pictures in batches of 4.
    assert seen == [4, 2]


def test_a_small_card_and_bad_images(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    scorer = GITReward(path=str(folder), **{**SETTINGS, "batch_size": 9})
    images, asked = pictures(3, 3, 32, 32), (COLORS, NOUNS, GENEVAL)
    refuses_bad_images(scorer, images, asked)
    survives_a_small_card(lambda: (scorer, scorer.batches), images, asked, monkeypatch, caplog)
