"""`python -m stage.sample` from the command line to the picture, on a random tiny Janus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage import sample
from stage.benchmarks.generate import draw as draw_evaluation
from stage.benchmarks.images import ImageFolder
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.types import PromptTokens, Samples
from tests.benchmarks.example import prompts, tiny_policy
from tests.evaluation_world import World, make_world, run_command

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP = 16, sample.GAP


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_grid_of_the_tuned_model(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *world.arguments,
        f"checkpoint={world.checkpoint}",
        "prompt=a red circle",
        "count=5",
        "columns=3",
    ]
    assert run_command(sample.main, arguments, monkeypatch) is None
    (path,) = (world.root / "outputs" / "samples").iterdir()
    assert path.name.startswith("a-red-circle-seed0-")
    said = capsys.readouterr().out
    assert f"5 images of 'a red circle' in outputs/samples/{path.name}" in said
    assert picture(path).shape == (2 * SIDE + GAP, 3 * SIDE + 2 * GAP, 3)
    base = [*world.arguments, "prompt=a red circle", "count=5", "columns=3", "output=base.png"]
    assert run_command(sample.main, base, monkeypatch) is None
    assert not np.array_equal(picture(world.root / "base.png"), picture(path))


def test_settings_of_the_sampler_change_the_images(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (
        ("a", []),
        ("b", ["sampler.guidance_scale=4"]),
        ("c", ["seed=1"]),
        ("d", ["batch_size=1"]),
    ):
        arguments = [*world.arguments, "prompt=a red circle", "count=2", f"output={name}.png", *extra]
        assert run_command(sample.main, arguments, monkeypatch) is None
    a, b, c, d = (picture(world.root / f"{name}.png") for name in "abcd")
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    np.testing.assert_array_equal(a, d)


def test_an_image_is_the_one_an_evaluation_draws(tmp_path: Path) -> None:
    policy, sampler = tiny_policy(tmp_path / "model"), Sampler(2.0, 1.0)
    folder = ImageFolder(tmp_path / "images", {"checkpoint": "x", "seed": 3}, prompts()[:1], 3)
    draw_evaluation(policy, sampler, folder, batch_size=8, drawn=lambda count: None)
    sizes = []

    def counted(policy: JanusPolicy, prompt: PromptTokens, uniforms: torch.Tensor) -> Samples:
        sizes.append(uniforms.shape[1])
        return sampler(policy, prompt, uniforms)

    images, plans = sample.draw(policy, counted, prompts()[0].text, count=5, seed=3, batch_size=2)
    assert sizes == [2, 2, 1] and plans == []
    for item in folder.planned:
        np.testing.assert_array_equal(folder.load(item), images[item.sample].numpy())


def test_plans_are_printed(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One a line, in the order of the images; and an error where the template cannot ask for one."""
    reasoning = [
        "prompt=a red circle",
        "count=3",
        "output=a.png",
        "+sampler.reasoning=text",
        "+sampler.reasoning_weight=1",
        "+sampler.max_plan_tokens=4",
        "+sampler.plan_temperature=1",
    ]
    assert "has none" in str(run_command(sample.main, [*world.arguments, *reasoning], monkeypatch))
    asking = "+model.template.instruction='{prompt} :'"
    assert run_command(sample.main, [*world.arguments, *reasoning, asking], monkeypatch) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["1", "2", "3"]
    assert any(len(line) > 3 for line in lines[:3]) and lines[3].startswith("3 images of")


def test_a_grid_by_hand() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    found = sample.grid(images, 2)[..., 0]
    white = 255
    expected = [
        [0, 0, white, white, 1, 1],
        [0, 0, white, white, 1, 1],
        [white] * 6,
        [white] * 6,
        [2, 2, white, white, white, white],
        [2, 2, white, white, white, white],
    ]
    np.testing.assert_array_equal(found, expected)
    assert sample.grid(images[:1], 8).shape == (2, 2, 3)


def test_mistakes_are_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, text in (
        ([], "prompt"),
        (["prompt=x", "count=0"], "count must be a whole number of at least 1; got 0"),
        (["prompt='  '"], "prompt"),
        (["prompt=x", "output=x.jpg"], "ends in .png"),
        (["prompt=x", "checkpoint=nowhere.ckpt"], "nowhere.ckpt"),
    ):
        code = run_command(sample.main, [*world.arguments, *arguments], monkeypatch)
        assert isinstance(code, str) and code.startswith("error: ") and text in code, (arguments, code)


def test_help_is_for_a_reader() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "stage.sample", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert 'prompt="a photo of two red circles"' in shown and "outputs/samples/" in shown
