"""PaddleOCR beside RapidOCR on the same weights, here or in the environment that STAGE_PADDLEOCR_PYTHON names."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from stage.detectors.paddle_ocr import DETECTOR, RECOGNISER, PaddleReader, model_folders
from tests.detectors.test_rapid_ocr import picture

# Runs where paddleocr is installed and torch need not be: the whole way from folders to lines.
READ = """
import json, sys
import numpy as np
from stage.detectors.paddle_ocr import PaddleReader
reader = PaddleReader(
    sys.argv[1], detector_side=256, box_threshold=0.6, unclip_ratio=1.5, text_score=0.5, threads=1
)
print("\\n" + json.dumps([reader.read(np.load(sys.argv[2])), reader.provenance]))
"""


def python_with_paddleocr() -> str:
    """The interpreter that can run PaddleOCR, or a skip that says why there is none."""
    named = os.environ.get("STAGE_PADDLEOCR_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("paddleocr") is None:
        pytest.skip(
            "paddleocr is not installed here (it wants an environment of its own): set STAGE_PADDLEOCR_PYTHON "
            "to the python of one made with the extra `paddleocr`"
        )
    return sys.executable


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip(
        "rapidocr", reason="the extra `ocr`, whose wheel carries the weights, is not installed"
    )
    from stage.detectors.rapid_ocr import weight_files

    return model_folders(*weight_files(), tmp_path / "models")


def test_folders_of_models(folders: tuple[Path, Path]) -> None:
    import onnxruntime

    for folder, name in zip(folders, (DETECTOR, RECOGNISER), strict=True):
        assert folder.name == name and (folder / "inference.onnx").is_file()
        content = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
        assert content["Global"]["model_name"] == name
    letters = content["PostProcess"]["character_dict"]
    session = onnxruntime.InferenceSession(folders[1] / "inference.onnx")
    # The alphabet, the blank of CTC before it and the space behind it are the classes of the last layer.
    assert len(letters) + 2 == session.get_outputs()[0].shape[-1] == 18710
    assert set("AZaz09€é中の") <= set(letters)


def test_folders_without_an_alphabet(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="names its letters in the metadata"):
        model_folders(folders[0] / "inference.onnx", folders[0] / "inference.onnx", tmp_path)


def test_both_engines_read_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """One set of weights, two programs around them: the same lines from clean signs of three sizes."""
    from stage.detectors.rapid_ocr import RapidReader

    python = python_with_paddleocr()
    rapid = RapidReader(256, box_threshold=0.5, unclip_ratio=1.6, text_score=0.5, threads=1)
    for side in (64, 96, 384):
        images = np.stack(
            [picture(side, "DOG"), picture(side, "OPEN"), picture(side), picture(side, "BUS 4")]
        )
        np.save(tmp_path / "images.npy", images)
        done = subprocess.run(
            [python, "-c", READ, str(folders[0].parent), str(tmp_path / "images.npy")],
            cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        lines, provenance = json.loads(done.stdout.splitlines()[-1])
        assert [["".join(line.split()) for line in found] for found in lines] == [
            ["".join(line.split()) for line in found] for found in rapid.read(images)
        ]
        assert lines[:3] == [["DOG"], ["OPEN"], []]
        assert sorted(provenance["sha256"].values()) == sorted(rapid.provenance["sha256"].values())


def test_without_the_package_it_says_what_to_install() -> None:
    if importlib.util.find_spec("paddleocr") is not None:
        pytest.skip("paddleocr is installed here")
    with pytest.raises(ImportError, match="needs the package paddleocr"):
        PaddleReader("models", 256, 0.6, 1.5, 0.5, 1)


@pytest.mark.parametrize(
    ("version", "words"),
    [("3.7.0", "write them with `python -m"), ("2.10.0", "unpack en_PP-OCRv3_det_infer")],
)
def test_absent_models_are_named(
    version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(FileNotFoundError, match=words):
        PaddleReader(str(tmp_path), 256, 0.6, 1.5, 0.5, 1)
