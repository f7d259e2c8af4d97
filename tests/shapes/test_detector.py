"""The shipped judge, on scenes and seeds that its training never saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.template import Template
from stage.shapes.corpus import Captions, sample
from stage.shapes.detector import ShapeDetector
from stage.shapes.detector_training import blurred, spoil, targets
from stage.shapes.prompts import splits
from stage.shapes.scenes import CLASSES, COLORS, Scenes, World, any_scenes, place, render, scatter
from stage.shapes.vq import PLAIN, contents, encode

WORLD = World()
CPU = torch.device("cpu")
ASSETS = "package://stage/shapes/assets"


@pytest.fixture(scope="module")
def judge() -> ShapeDetector:
    """The detector with the threshold of conf/reward/shapes.yaml."""
    return ShapeDetector(f"{ASSETS}/detector.safetensors", threshold=0.4)


def fresh(seed: int, count: int) -> Scenes:
    """Scenes of all combinations from seeds near 2^40: pretraining's lie below 2^24."""
    generator = torch.Generator().manual_seed(2**40 + seed)
    return any_scenes(place(count, 4, WORLD, generator, CPU), WORLD, generator)


def agreement(judge: ShapeDetector, images: torch.Tensor, scenes: Scenes) -> float:
    """Share of images in which every object is found at its place with its class and colour, and nothing else."""
    pictures = images.numpy()
    right = 0
    for i, found in enumerate(judge.detect(pictures)):
        seen = []
        for name, things in found.items():
            for thing, color in zip(things, judge.colors(pictures[i], name, things), strict=True):
                seen.append(
                    (name, color, (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2)
                )
        truth = [
            (CLASSES[scenes.kind[i, k]], COLORS[scenes.color[i, k]], *((boxes[:2] + boxes[2:]) / 2).tolist())
            for k, boxes in enumerate(scenes.boxes()[i])
            if scenes.present[i, k]
        ]
        matched = [
            any(a[:2] == b[:2] and np.hypot(a[2] - b[2], a[3] - b[3]) < 4 for b in seen) for a in truth
        ]
        right += len(seen) == len(truth) and all(matched)
    return right / len(pictures)


def test_agrees_on_rendered_scenes(judge: ShapeDetector) -> None:
    scenes = fresh(0, 400)
    assert agreement(judge, render(scenes, WORLD), scenes) >= 0.98


def test_agrees_on_blurred_scenes(judge: ShapeDetector) -> None:
    scenes = fresh(1, 200)
    images = blurred(render(scenes, WORLD), torch.Generator().manual_seed(3))
    assert agreement(judge, images, scenes) >= 0.95


def test_half_an_object_is_none(judge: ShapeDetector) -> None:
    scenes = fresh(2, 300)
    images, kept = spoil(render(scenes, WORLD), scenes, WORLD, torch.Generator().manual_seed(4))
    assert (kept.present != scenes.present).sum() > 20
    assert agreement(judge, images, kept) >= 0.9


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    """The shipped model, for its codec."""
    return load_policy(f"{ASSETS}/tiny_janus", Template("plain", "", ""), "float32", ["vqmodel"], False)


def reconstruct(policy: JanusPolicy, scenes: Scenes) -> torch.Tensor:
    """Pictures of the scenes through the shipped codec and back."""
    tokens = encode(policy.model.model.vqmodel, render(scenes, WORLD))
    return policy.decode(tokens[None])[0]


def test_agrees_on_reconstructions_of_corpus_scenes(judge: ShapeDetector, policy: JanusPolicy) -> None:
    captions = Captions.read(splits()["corpus"], CPU)
    generator = torch.Generator().manual_seed(2**40 + 3)
    index = torch.randint(len(captions.count), (160,), generator=generator)
    scenes, _ = sample(captions, index, 0.0, WORLD, generator)
    assert agreement(judge, reconstruct(policy, scenes), scenes) >= 0.97


@pytest.mark.parametrize("spread", [place, scatter])
def test_agrees_on_reconstructions_of_all_combinations(
    judge: ShapeDetector, policy: JanusPolicy, spread: Callable
) -> None:
    generator = torch.Generator().manual_seed(2**40 + 6)
    scenes = any_scenes(spread(160, 4, WORLD, generator, CPU), WORLD, generator)
    assert agreement(judge, reconstruct(policy, scenes), scenes) >= 0.97


def test_plain_patches_of_a_picture_share_one_code(policy: JanusPolicy) -> None:
    generator = torch.Generator().manual_seed(2**40 + 7)
    cells = scatter(96, 6, WORLD, generator, CPU)
    scenes = any_scenes(cells, WORLD, generator)
    tokens = encode(policy.model.model.vqmodel, render(scenes, WORLD)).flatten()
    shown = contents(scenes, cells, WORLD)
    for tone in range(PLAIN):
        codes = tokens[shown == tone]
        assert (codes == codes.mode().values).float().mean() >= 0.99


def test_agrees_with_a_human_on_generated_images(judge: ShapeDetector) -> None:
    """60 images of the shipped model, half of them after training, labelled by eye before the judge saw them."""
    folder = Path(__file__).parent / "labelled"
    sheet = np.asarray(Image.open(folder / "images.png"))
    pictures = sheet.reshape(6, 96, 10, 96, 3).swapaxes(1, 2).reshape(60, 96, 96, 3)
    labels = [sorted(line.split(", ")) for line in (folder / "labels.txt").read_text().splitlines()]
    seen = [
        sorted(
            f"{color} {name}"
            for name, things in found.items()
            for color in judge.colors(picture, name, things)
        )
        for picture, found in zip(pictures, judge.detect(pictures), strict=True)
    ]
    differ = {i: (a, b) for i, (a, b) in enumerate(zip(labels, seen, strict=True)) if a != b}
    assert len(differ) <= 6, differ


def test_targets_mark_the_cell_of_the_centre() -> None:
    scenes = fresh(4, 8)
    centre, _, color, box = targets(scenes, WORLD)
    for i, k in scenes.present.nonzero().tolist():
        x, y = (int(v) // 4 for v in scenes.center[i, k].tolist())
        assert centre[i, scenes.kind[i, k], y, x] == 1
        assert color[i, y, x] == scenes.color[i, k]
        left, top, right, bottom = box[i, :, y, x].tolist()
        corners = (4 * x + 2 - left, 4 * y + 2 - top, 4 * x + 2 + right, 4 * y + 2 + bottom)
        assert corners == pytest.approx(scenes.boxes()[i, k].tolist(), abs=1e-4)
    assert (centre == 1).sum() == scenes.present.sum()


def test_colours_without_detecting_first(judge: ShapeDetector) -> None:
    images = render(fresh(5, 4), WORLD).numpy()
    found = judge.detect(images)
    after = [judge.colors(images[0], name, things) for name, things in found[0].items()]
    judge.detect(images[1:2])  # forgets image 0
    assert [judge.colors(images[0], name, things) for name, things in found[0].items()] == after


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1])
def test_impossible_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ShapeDetector(f"{ASSETS}/detector.safetensors", threshold)
