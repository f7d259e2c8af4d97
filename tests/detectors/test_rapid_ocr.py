"""RapidOCR's weights are those of its wheel, and one reading of a picture is another's."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from stage.detectors import rapid_ocr


def picture(side: int, *rows: str) -> np.ndarray:
    """Black rows of text on grey, uint8 `[side, side, 3]`."""
    image = Image.new("RGB", (side, side), (210, 210, 210))
    size = side // (len(rows) + 2)
    for index, row in enumerate(rows):
        place = (side // 2, int(side * (index + 1) / (len(rows) + 1)))
        font = ImageFont.load_default(size=size)
        ImageDraw.Draw(image).text(place, row, fill="black", font=font, anchor="mm")
    return np.asarray(image)


def test_lines_come_from_top_to_bottom() -> None:
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    reader = rapid_ocr.RapidReader(
        detector_side=256, box_threshold=0.5, unclip_ratio=1.6, text_score=0.5, threads=1
    )
    images = np.stack([picture(192, "OPEN", "DAILY"), picture(192)])
    assert reader.read(images) == [("OPEN", "DAILY"), ()]


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ImportError, match=r"needs the package rapidocr.*install the extra"):
        rapid_ocr.weight_files()


def test_a_wheel_without_the_weights_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Elsewhere:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Elsewhere())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(FileNotFoundError, match=r"carries PP-OCRv6_det_small.onnx, version 9.9 .* does not"):
        rapid_ocr.weight_files()
