"""HPS and CLIP scores beside open_clip itself, pair by pair; the tower that they stand on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stage.paths import sha256
from stage.rewards.clip import ClipReward
from stage.rewards.combine import Combine
from stage.rewards.hps import HPSReward
from stage.rewards.tower import shared_tower
from stage.types import ChecksPrompts, Prompt, Scorer
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_towers import PROMPTS, by_hand, open_clip_pixels, pictures, tiny_clip

SETTINGS: dict[str, Any] = {"revision": None, "device": "cpu", "dtype": "float32", "batch_size": 4}


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small model, and its weights as HPSv2 publishes them: a PyTorch file with `state_dict`."""
    folder = tmp_path_factory.mktemp("hps")
    model = tiny_clip(folder / "configs")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return model, folder / "HPS_v2.1_compressed.pt"


def reward(file: Path, **changes: Any) -> HPSReward:
    return HPSReward(**{**SETTINGS, "path": str(file), "architecture": "tiny-clip", **changes})


def hps_pixels(image: torch.Tensor) -> torch.Tensor:
    """One image `[H, W, 3]` as HPSv2 has it: to a tensor, the longer side to 32, black around it, CLIP's colours."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, pad, resize, to_tensor

    height, width = image.shape[:2]
    scale = 32 / max(height, width)
    size = [round(height * scale), round(width * scale)]
    found = to_tensor(image.numpy())
    if scale != 1:
        found = resize(found, size, InterpolationMode.BICUBIC)
    left, top = (32 - size[1]) // 2, (32 - size[0]) // 2
    found = pad(found, [left, top, 32 - size[1] - left, 32 - size[0] - top])
    return normalize(found, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 57), (57, 40)])
def test_scores_are_the_cosines_of_open_clip(hps: tuple[Any, Path], size: tuple[int, int]) -> None:
    model, file = hps
    images = pictures(3, 2, *size)
    scorer = reward(file)
    assert isinstance(scorer, Scorer)
    scores = scorer(images, PROMPTS)
    expected = by_hand(model, "tiny-clip", images, [prompt.text for prompt in PROMPTS], hps_pixels)
    assert scores.parts.shape == (3, 2, 1) and scores.names == ("score",) and scores.weights == (1.0,)
    torch.testing.assert_close(scores.parts[..., 0].double(), expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-2
    assert scores.reasons[1][0] == f"HPSv2.1 {scores.parts[1, 0, 0].item():.4f}"


def test_batch_size_does_not_matter(hps: tuple[Any, Path]) -> None:
    images = pictures(3, 3)
    found = []
    for size in (1, 2, 9):
        gc.collect()
        found.append(reward(hps[1], batch_size=size)(images, PROMPTS).parts)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [HPSReward, ClipReward])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_moves_scores_little(
    hps: tuple[Any, Path], kind: Any, dtype: str, bound: float
) -> None:
    """The bounds of the docstrings; the scores themselves differ by ten times as much."""
    images = pictures(3, 8)
    settings = {**SETTINGS, "path": str(hps[1]), "architecture": "tiny-clip"}
    full, half = (kind(**{**settings, "dtype": name})(images, PROMPTS).parts for name in ("float32", dtype))
    assert 0 < (full - half).abs().max() < bound < full.std() / 5


def test_the_same_tower_is_loaded_and_asked_once(hps: tuple[Any, Path], monkeypatch: Any) -> None:
    one, two = reward(hps[1]), reward(hps[1], batch_size=2)
    assert one.tower is two.tower and one.tower.batches.size == 2
    assert reward(hps[1], dtype="bfloat16").tower is not one.tower
    calls: list[int] = []
    encode = one.tower.model.encode_image

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(one.tower.model, "encode_image", counted)
    images = pictures()
    both = Combine({"a": one, "b": two}, {"a": 1.0, "b": 1.0})(images, PROMPTS)
    assert sum(calls) == 6 and torch.equal(both.parts[..., 0], both.parts[..., 1])
    images[0, 0] = 0  # the same tensor with another content is looked at again
    assert not torch.equal(one(images, PROMPTS).parts[0, 0], both.parts[0, 0, :1]) and sum(calls) == 12


def test_provenance_names_the_file(hps: tuple[Any, Path]) -> None:
    scorer = reward(hps[1], revision="v2.1")
    assert scorer.provenance["sha256"] == {hps[1].name: sha256(hps[1])}
    assert scorer.provenance["revision"] == "v2.1" and scorer.provenance["architecture"] == "tiny-clip"
    assert reward(hps[1].parent).provenance["sha256"] == {hps[1].name: sha256(hps[1])}


def test_weights_that_do_not_fit(hps: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = hps
    state = model.state_dict()
    lacking = {name: value for name, value in state.items() if name != "text_projection"}
    torch.save({"state_dict": {**lacking, "extra": torch.zeros(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors \(text_projection\); it has besides 1 tensors \(extra\)"
    ):
        reward(tmp_path / "wrong.pt")
    torch.save({**state, "text_projection": torch.zeros(32, 8)}, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"text_projection \(32, 8\) for \(32, 16\)"):
        reward(tmp_path / "shape.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="PyTorch file of plain tensors"):
        reward(tmp_path / "broken.pt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "names.pt")
    with pytest.raises(ValueError, match="maps names to tensors"):
        reward(tmp_path / "names.pt")


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    for path in (str(tmp_path / "HPS.pt"), str(tmp_path), "xswu/HPSv2"):
        with pytest.raises(
            FileNotFoundError, match=r"hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt"
        ) as found:
            reward(path)  # type: ignore[arg-type]
        assert path in str(found.value)


def test_settings_that_cannot_be(hps: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match="architecture names a model of open_clip, got 'ViT-X'"):
        reward(hps[1], architecture="ViT-X")
    with pytest.raises(ValueError, match="dtype is one of"):
        reward(hps[1], dtype="int8")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        reward(hps[1], batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' without CUDA"):
            reward(hps[1], device="cuda")


def test_images_and_prompts_that_cannot_be_scored(hps: tuple[Any, Path]) -> None:
    scorer, images = reward(hps[1]), pictures()
    for wrong in (images.float(), images[..., :1], images[0], images[:, :, :0]):
        with pytest.raises(ValueError, match="images"):
            scorer(wrong, PROMPTS)
    with pytest.raises(ValueError, match="got 2 for 3 groups"):
        scorer(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="number 9 is empty"):
        scorer(images, (*PROMPTS[:2], Prompt(9, " ")))
    assert isinstance(scorer, ChecksPrompts)
    scorer.check(PROMPTS)
    with pytest.raises(ValueError, match="number 9 is empty"):
        scorer.check((*PROMPTS[:2], Prompt(9, " ")))


def test_the_real_towers_see_what_is_published() -> None:
    """Side, colours and interpolation of ViT-H-14 and ViT-L-14; the activation of OpenAI's weights."""
    open_clip = pytest.importorskip("open_clip")
    assert open_clip.get_model_config("ViT-H-14")["vision_cfg"]["image_size"] == 224
    assert not open_clip.get_model_config("ViT-H-14").get("quick_gelu")
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["quick_gelu"]
    assert open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")["quick_gelu"]


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 57)])
def test_clip_score(tmp_path: Path, size: tuple[int, int]) -> None:
    """OpenAI's weights need QuickGELU: the same file under the other name scores otherwise."""
    name = "tiny-clip-quickgelu"
    model = tiny_clip(tmp_path / "configs", name, quick_gelu=True, seed=3)
    tiny_clip(tmp_path / "configs", "tiny-clip", seed=3)
    save_file(
        {**model.state_dict(), "context_length": torch.tensor(77)}, tmp_path / "open_clip_model.safetensors"
    )
    images = pictures(3, 2, *size)
    scores = ClipReward(path=str(tmp_path), architecture=name, **SETTINGS)(images, PROMPTS)
    texts = [prompt.text for prompt in PROMPTS]
    expected = by_hand(model, name, images, texts, open_clip_pixels(name))
    # Without resizing the pixels are the same; with it they differ by one level of 255 at most.
    tolerance = 1e-5 if size == (32, 32) else 4e-3
    torch.testing.assert_close(scores.parts[..., 0].double(), expected, atol=tolerance, rtol=0)
    assert expected.std() > 10 * tolerance
    other = ClipReward(path=str(tmp_path), architecture="tiny-clip", **SETTINGS)(images, PROMPTS)
    assert (other.parts - scores.parts).abs().max() > 1e-4


def test_a_tower_nobody_uses_is_freed(hps: tuple[Any, Path]) -> None:
    from stage.rewards import tower

    scorer = reward(hps[1], revision="only here")
    keys = [key for key in tower._TOWERS if key[1] == "only here"]
    (key,) = keys
    path, revision, home, architecture, device, dtype, whole = key
    assert shared_tower(path, revision, home, architecture, device, dtype, 4, whole) is scorer.tower
    del scorer
    gc.collect()
    assert keys[0] not in tower._TOWERS


def test_a_small_card_and_bad_images(
    hps: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    scorer = reward(hps[1], batch_size=9)
    images = pictures(3, 3)
    refuses_bad_images(scorer, images, PROMPTS)
    survives_a_small_card(lambda: (scorer, scorer.tower.batches), images, PROMPTS, monkeypatch, caplog)
