"""PP-OCRv6 as RapidOCR runs it: the weights lie inside the wheel, so nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stage.paths import sha256

DETECTOR = "PP-OCRv6_det_small.onnx"
RECOGNISER = "PP-OCRv6_rec_small.onnx"


def weight_files() -> tuple[Path, Path]:
    """The detector and the recogniser in RapidOCR's wheel, without importing it.

    Raises:
        ImportError: RapidOCR is not installed.
        FileNotFoundError: this version of its wheel does not carry them.
    """
    try:
        folder = Path(str(importlib.metadata.distribution("rapidocr").locate_file("rapidocr/models")))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "reading text needs the package rapidocr, which is not installed; install the extra: "
            "python -m pip install -c constraints.txt -e '.[ocr]'"
        ) from error
    for name in (DETECTOR, RECOGNISER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"the wheel of rapidocr carries {name}, version {importlib.metadata.version('rapidocr')} in {folder} "
                f"does not; install the version of constraints.txt"
            )
    return folder / DETECTOR, folder / RECOGNISER


class RapidReader:
    """A `TextReader` on RapidOCR's ONNX models: lines found by DB, read by CTC.

    Args:
        detector_side: pixels. A picture whose shorter side is smaller is enlarged to it for the detector; larger ones
            are searched as they are. Letters are read from the picture itself at any size.
        box_threshold: lowest mean probability of a found line, in [0, 1].
        unclip_ratio: how far a found line is widened, as DB defines it.
        text_score: lines read with less confidence are dropped, in [0, 1].
        threads: of one engine.
    """

    def __init__(
        self, detector_side: int, box_threshold: float, unclip_ratio: float, text_score: float, threads: int
    ) -> None:
        files = weight_files()
        from rapidocr import RapidOCR

        self.provenance: Mapping[str, Any] = {
            "engine": f"rapidocr {importlib.metadata.version('rapidocr')}",
            "sha256": {file.name: sha256(file) for file in files},
        }
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # upside-down text is not asked for
                "Global.text_score": text_score,
                "Det.model_path": str(files[0]),
                "Det.limit_type": "min",
                "Det.limit_side_len": detector_side,
                "Det.box_thresh": box_threshold,
                "Det.unclip_ratio": unclip_ratio,
                "Rec.model_path": str(files[1]),
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": threads,
            }
        )

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]:
        """Lines from top to bottom, and from left to right at one height."""
        # The engine takes arrays for BGR, as OpenCV reads files.
        found: list[Any] = [self._engine(np.ascontiguousarray(image[..., ::-1])) for image in images]
        return [tuple(output.txts or ()) for output in found]
