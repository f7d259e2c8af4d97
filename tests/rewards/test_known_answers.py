"""Scorers that know the bundled pictures pass, broken ones are refused, and a check that is not wanted asks nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stage.rewards import known_answers
from stage.rewards.clip import ClipReward
from stage.rewards.combine import Combine
from stage.rewards.gdino import GDinoReward
from stage.rewards.git import GITReward
from stage.rewards.hps import HPSReward
from stage.score_checks import check_itself
from stage.types import ChecksItself, Prompt, Scorer
from tests.rewards.test_gdino import SETTINGS as GDINO
from tests.rewards.tiny_models import save_gdino, save_git
from tests.rewards.tiny_towers import tiny_clip

SETTINGS: dict[str, Any] = {"revision": None, "device": "cpu", "dtype": "float32", "batch_size": 5}


def by_color(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A judge that is right: under the stop sign's sky blue outweighs red, around the ball red outweighs blue."""
    pixels = images.double() / 255
    blue_over_red = (pixels[..., 2] - pixels[..., 0]).mean((2, 3))
    worth = {"stop": blue_over_red, "ball": -blue_over_red}
    rows = []
    for row, prompt in enumerate(prompts):
        own = [value[row] for word, value in worth.items() if word in prompt.text]
        rows.append(own[0] if own else torch.full_like(blue_over_red[row], -2.0))
    return torch.stack(rows)


def test_the_bundled_pictures() -> None:
    assert known_answers.pictures().shape == (2, 2, 384, 384, 3)
    assert known_answers.picture("red_circle.png").shape == (96, 96, 3)
    assert known_answers.grey(8).unique().tolist() == [known_answers.GREY]


def test_an_honest_judge_passes_and_a_wrong_one_is_refused() -> None:
    known_answers.require_own_words(by_color, "judge")
    with pytest.raises(ValueError, match=r"judge must find stop_sign\.png nearest to 'a red stop sign"):
        known_answers.require_own_picture(lambda images, prompts: -by_color(images, prompts), "judge")
    with pytest.raises(ValueError, match=r"nearest to 'a red stop sign"):
        known_answers.require_own_picture(lambda images, prompts: torch.zeros(images.shape[:2]), "judge")

    def pictures_alone(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Right about pictures, but every caption of the stop sign's picture is worth the same."""
        found = by_color(images, prompts)
        return torch.where(found > -1.5, found, by_color(images, [known_answers.PROMPTS[0]] * len(prompts)))

    known_answers.require_own_picture(pictures_alone, "judge")
    with pytest.raises(
        ValueError, match=r"must find 'a red stop sign.* nearest to stop_sign\.png.*two horses"
    ):
        known_answers.require_own_words(pictures_alone, "judge")


def test_values_are_finite_and_do_not_depend_on_the_batch() -> None:
    def nan(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return by_color(images, prompts) / 0 - float("inf")

    def crowd(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return by_color(images, prompts) + images.shape[1]

    with pytest.raises(ValueError, match="must be finite"):
        known_answers.require_own_picture(nan, "judge")
    with pytest.raises(ValueError, match="must not depend on those beside it"):
        known_answers.require_own_picture(crowd, "judge")
    with pytest.raises(ValueError, match="must tell a stop sign, a ball and plain grey apart"):
        known_answers.require_difference(lambda images, prompts: torch.ones(images.shape[:2]), "judge")


def taught(folder: Path, whole: bool) -> Path:
    """A small CLIP whose text projection is solved so that captions lie where their pictures lie."""
    import open_clip

    from stage.rewards.tower import _pixels

    model = tiny_clip(folder)
    shown = torch.stack(
        [*(known_answers.picture(name) for name in known_answers.PICTURES), known_answers.grey()]
    )
    pixels = _pixels(open_clip.get_model_preprocess_cfg(model), whole)(
        shown, torch.device("cpu"), torch.float32
    )
    texts = [prompt.text for prompt in (*known_answers.PROMPTS, *known_answers.UNRELATED)]
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.encode_image(pixels).double(), dim=-1)
        width = model.text_projection.shape[0]
        model.text_projection.data = torch.eye(width)
        read = model.encode_text(open_clip.get_tokenizer("tiny-clip")(texts)).double()
        apart = seen - seen.mean(0)
        wanted = torch.stack([apart[0], apart[1], -apart[0] - apart[1], -apart[0] - apart[1]])
        model.text_projection.data = (torch.linalg.pinv(read) @ wanted).float()
    torch.save({"state_dict": model.state_dict()}, folder / "taught.pt")
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.save({"state_dict": model.state_dict()}, folder / "zero.pt")
    return folder


@pytest.mark.parametrize("kind", [HPSReward, ClipReward])
def test_a_taught_tower_passes_and_one_of_zeros_is_refused(kind: Any, tmp_path: Path) -> None:
    folder = taught(tmp_path, whole=kind is HPSReward)
    good, broken = (
        kind(path=str(folder / name), architecture="tiny-clip", **SETTINGS)
        for name in ("taught.pt", "zero.pt")
    )
    assert isinstance(good, ChecksItself)
    check_itself(good, True)
    assert isinstance(good, Scorer)
    with pytest.raises(ValueError, match=r"must know the answers of the bundled pictures.*self_check=false"):
        check_itself(broken, True)
    check_itself(broken, False)
    check_itself(Combine({"a": good}, {"a": 1.0}), True)
    with pytest.raises(ValueError, match=r": b: (hps|clip) must find stop_sign\.png"):
        check_itself(Combine({"a": good, "b": broken}, {"a": 1.0, "b": 1.0}), True)


def zeroed(scorer: Any) -> Any:
    for parameter in scorer.model.parameters():
        parameter.data.zero_()
    return scorer


def test_answers_and_boxes_of_zeroed_weights_are_refused(tmp_path: Path) -> None:
    save_git(tmp_path / "git")
    save_gdino(tmp_path / "gdino")
    git = GITReward(path=str(tmp_path / "git"), **SETTINGS)
    gdino = GDinoReward(path=str(tmp_path / "gdino"), **GDINO)
    for scorer in (git, gdino):
        with pytest.raises(ValueError, match=r"must find stop_sign\.png nearest"):
            zeroed(scorer).self_check()


def test_the_surest_box_of_a_noun(tmp_path: Path) -> None:
    """Beside the boxes of all probabilities that the reward itself reads."""
    save_gdino(tmp_path)
    scorer = GDinoReward(path=str(tmp_path), **{**GDINO, "threshold": 0.0})
    images, prompts = known_answers.pictures()[:, :, :128, :128].contiguous(), known_answers.PROMPTS
    found = scorer._surest(images, prompts)
    asked = [scorer._mentions(prompt) for prompt in prompts for _ in range(2)]
    boxes = scorer._detect(images.flatten(0, 1), asked)
    nouns = ("stop sign", "stop sign", "sports ball", "sports ball")
    expected = [float(row[noun].scores.max()) for row, noun in zip(boxes, nouns, strict=True)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 4


def world_reward(root: Path) -> Any:
    return instantiate(OmegaConf.load(root / "conf" / "reward" / "shapes.yaml"))


def test_the_detector_of_the_embedded_world_knows_its_picture(root: Path) -> None:
    check_itself(world_reward(root), True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("blind", r"must judge red_circle\.png right; it is wrong: expected exactly 1 circle, found 0"),
        ("colours", r"must judge red_circle\.png right; it is wrong: expected 1 red circle"),
        ("everywhere", "must judge red_circle|finds a circle"),
    ],
)
def test_a_broken_detector_is_refused(root: Path, damage: str, words: str) -> None:
    from copy import deepcopy

    reward = world_reward(root)
    net = reward.detector.net = deepcopy(reward.detector.net)
    if damage == "everywhere":
        for parameter in net.parameters():
            parameter.data.zero_()
    elif damage == "blind":
        net.head.bias.data[:6] = -20.0
    else:
        net.head.weight.data[6:16] = net.head.weight.data[6:16].roll(1, 0)
        net.head.bias.data[6:16] = net.head.bias.data[6:16].roll(1, 0)
    with pytest.raises(ValueError, match=words):
        check_itself(reward, True)


def test_a_detector_that_names_no_classes_has_no_known_answer(root: Path) -> None:
    class Silent:
        def detect(self, images: Any) -> Any:
            raise AssertionError("nothing is asked")

        def colors(self, *args: Any) -> Any:
            raise AssertionError("nothing is asked")

    reward = world_reward(root)
    reward.detector = reward.color_classifier = Silent()
    check_itself(reward, True)
