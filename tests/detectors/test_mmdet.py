"""mmdet itself, in its own environment, against the golden file and against the detector that does without it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage.detectors.coco import CLASS_NAMES
from stage.detectors.mmdet import MmdetDetector
from tests.detectors.tiny_mask2former import save_checkpoint

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)


@pytest.fixture(scope="session")
def mmdet_python(root: Path) -> Path:
    """The interpreter of an environment with mmdet: `$STAGE_MMDET_PYTHON`, or that of `make env-mmdet`."""
    python = Path(os.environ.get("STAGE_MMDET_PYTHON", root / ".venv-mmdet" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"no environment of mmdet at {python}: run `make env-mmdet` or set STAGE_MMDET_PYTHON")
    return python


def ask(python: Path, weights: Path, root: Path, folder: Path) -> dict[str, Any]:
    """The answers of tests/detectors/mmdet_answers.py."""
    np.save(folder / "pictures.npy", PICTURES)
    words = [str(weights), str(folder / "pictures.npy"), str(folder / "answers.pt")]
    run = subprocess.run(
        [str(python), "-m", "tests.detectors.mmdet_answers", *words], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "answers.pt", weights_only=True)


def same_objects(weights: Path, answers: dict[str, Any]) -> None:
    """The objects of both detectors: labels equal, scores to 1e-3, boxes to a pixel, masks but for 1 % of pixels."""
    pytest.importorskip("cv2", reason="the extra `geneval` is not installed: no OpenCV")
    from stage.detectors.mask2former import Mask2FormerDetector

    ours = Mask2FormerDetector(str(weights), None, 0.0, 100, [1333, 800], False, 2, "cpu", "float32")
    assert answers["provenance"] == ours.provenance
    for found, expected in zip(ours.detect(PICTURES), answers["objects"], strict=True):
        assert {name: len(things) for name, things in found.items()} == {
            name: len(things) for name, things in expected.items()
        }
        assert sum(map(len, found.values())) == 100
        for name, things in found.items():
            for thing, (box, score, mask) in zip(things, expected[name], strict=True):
                assert abs(thing.score - score) < 1e-3, name
                assert max(abs(a - b) for a, b in zip(thing.box, box, strict=True)) <= 1, name
                assert thing.mask is not None and np.mean(thing.mask != mask.numpy()) < 0.01, name


@pytest.mark.slow
def test_mmdet_gives_the_golden_logits(mmdet_python: Path, root: Path, shared: Path, tmp_path: Path) -> None:
    file = shared / "golden" / "mask2former_mini_mmdet.pt"
    golden, answers = torch.load(file, weights_only=True), ask(mmdet_python, file, root, tmp_path)
    for name in ("class_logits", "mask_logits"):
        torch.testing.assert_close(answers[name], golden[name], atol=1e-4, rtol=0)
    same_objects(file, answers)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [2, 3])
def test_both_detectors_find_the_same(layout: int, mmdet_python: Path, root: Path, tmp_path: Path) -> None:
    """Another model, its checkpoint by the names of mmdet 2 and 3, through the whole pipeline of each."""
    file = save_checkpoint(tmp_path, layout)
    same_objects(file, ask(mmdet_python, file, root, tmp_path))


def test_without_mmdet_the_way_to_it_is_named() -> None:
    if importlib.util.find_spec("mmdet") is not None:
        pytest.skip("mmdet is installed here")
    with pytest.raises(ImportError, match="Build its environment with `make env-mmdet`"):
        MmdetDetector("mask2former/x.py", "weights", 0.3, "cpu")
    assert len(MmdetDetector.class_names) == len(CLASS_NAMES) == 80
    with pytest.raises(ValueError, match="min_score lies in"):
        MmdetDetector("mask2former/x.py", "weights", -0.1, "cpu")
