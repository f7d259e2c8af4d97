"""PaddleOCR, 3.x or 2.x, on weights that are already on this machine. It wants an environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stage.paths import resolve, sha256

DETECTOR, RECOGNISER = "PP-OCRv6_small_det", "PP-OCRv6_small_rec"
# The preprocessing and postprocessing with which PaddleX publishes these models (its pdparams2safetensors/
# inference_meta.py): pictures as BGR, ImageNet's mean and deviation, lines by DB, letters by CTC.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DB = {"thresh": 0.3, "box_thresh": 0.6, "max_candidates": 1000, "unclip_ratio": 1.5}
LINE = (3, 48, 320)  # channels, height and least width of a line for the recogniser


def model_folders(detector: Path, recogniser: Path, folder: Path) -> tuple[Path, Path]:
    """Folders in PaddleX's layout, with links to the ONNX files of PP-OCRv6 small, such as RapidOCR's wheel carries.

    The alphabet is read from the metadata of the recogniser's file. Folders that are there are written anew.

    Raises:
        ValueError: the recogniser's file holds no alphabet.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(recogniser, providers=["CPUExecutionProvider"])
    letters = session.get_modelmeta().custom_metadata_map.get("character")
    if not letters:
        raise ValueError(
            f"a recogniser names its letters in the metadata `character`, {recogniser} does not; take the ONNX file "
            f"of RapidOCR"
        )
    normalise = {"mean": [*MEAN], "std": [*DEVIATION], "scale": "1./255.", "order": "hwc"}
    find = [{"DetResizeForTest": {"resize_long": 960}}, {"NormalizeImage": normalise}, {"ToCHWImage": None}]
    read = [{"RecResizeImg": {"image_shape": [*LINE]}}]
    decode = {"name": "CTCLabelDecode", "character_dict": letters.split("\n")}
    return (
        _folder(folder / DETECTOR, detector, find, {"name": "DBPostProcess", **DB}),
        _folder(folder / RECOGNISER, recogniser, read, decode),
    )


def _folder(folder: Path, weights: Path, before: Sequence[Any], after: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inference.onnx").unlink(missing_ok=True)
    (folder / "inference.onnx").symlink_to(weights.resolve())
    content = {
        "Global": {"model_name": folder.name},
        "PreProcess": {"transform_ops": [*before]},
        "PostProcess": {**after},
    }
    (folder / "inference.yml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder


class PaddleReader:
    """A `TextReader` on PaddleOCR. With version 3 on ONNX models by onnxruntime, with version 2 on Paddle's own format.

    Args:
        folder: for version 3, holds PP-OCRv6_small_det and PP-OCRv6_small_rec, each with `inference.onnx` and
            `inference.yml`; `python -m stage.detectors.paddle_models FOLDER` writes them. For version 2, holds `det`
            and `rec` with Paddle's inference models.
        detector_side: pixels. A picture whose shorter side is smaller is enlarged to it for the detector.
        box_threshold: lowest mean probability of a found line, in [0, 1].
        unclip_ratio: how far a found line is widened, as DB defines it.
        text_score: lines read with less confidence are dropped, in [0, 1].
        threads: of one engine.
    """

    def __init__(
        self,
        folder: str,
        detector_side: int,
        box_threshold: float,
        unclip_ratio: float,
        text_score: float,
        threads: int,
    ) -> None:
        # PaddleX looks for its download servers when it is imported, unless it is told not to.
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        try:
            version = importlib.metadata.version("paddleocr")
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                "this engine needs the package paddleocr, which is not installed; install the extra into an "
                "environment of its own: python -m pip install -e '.[paddleocr]'"
            ) from error
        place, modern = resolve(folder), int(version.split(".")[0]) >= 3
        folders = [place / name for name in ((DETECTOR, RECOGNISER) if modern else ("det", "rec"))]
        for part in folders:
            if not part.is_dir():
                raise FileNotFoundError(
                    f"PaddleOCR {version} reads its models from {part}, which is no folder; write them with "
                    f"`python -m stage.detectors.paddle_models {place}`"
                    if modern
                    else f"PaddleOCR {version} reads Paddle's inference models from {part}, which is no folder; unpack "
                    f"en_PP-OCRv3_det_infer and en_PP-OCRv4_rec_infer there as det and rec"
                )
        self.provenance: Mapping[str, Any] = {
            "engine": f"paddleocr {version}",
            "sha256": {
                f"{part.name}/{file.name}": sha256(file) for part in folders for file in _weights(part)
            },
        }
        make = _modern if modern else _classic
        self._read = make(folders, detector_side, box_threshold, unclip_ratio, text_score, threads)

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]:
        """Lines from top to bottom, and from left to right at one height."""
        # The engine takes arrays for BGR, as OpenCV reads files.
        return [self._read(np.ascontiguousarray(image[..., ::-1])) for image in images]


def _modern(folders: Sequence[Path], side: int, box: float, unclip: float, score: float, threads: int) -> Any:
    """A function from a BGR picture to its lines, by PaddleOCR 3."""
    from paddleocr import PaddleOCR

    engine = PaddleOCR(
        text_detection_model_name=DETECTOR,
        text_detection_model_dir=str(folders[0]),
        text_recognition_model_name=RECOGNISER,
        text_recognition_model_dir=str(folders[1]),
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
        text_det_limit_side_len=side,
        text_det_limit_type="min",
        text_det_box_thresh=box,
        text_det_unclip_ratio=unclip,
        text_rec_score_thresh=score,
        device="cpu",
        engine="onnxruntime",
        engine_config={"intra_op_num_threads": threads, "inter_op_num_threads": threads},
    )
    return lambda picture: tuple(text for text in engine.predict(picture)[0]["rec_texts"] if text.strip())


def _classic(
    folders: Sequence[Path], side: int, box: float, unclip: float, score: float, threads: int
) -> Any:
    """A function from a BGR picture to its lines, by PaddleOCR 2, with the arguments of the STAGE release."""
    from paddleocr import PaddleOCR

    engine = PaddleOCR(
        use_angle_cls=False,
        det_model_dir=str(folders[0]),
        rec_model_dir=str(folders[1]),
        lang="en",
        use_gpu=False,
        show_log=False,
        det_limit_side_len=side,
        det_limit_type="min",
        det_db_box_thresh=box,
        det_db_unclip_ratio=unclip,
        drop_score=score,
        cpu_threads=threads,
    )
    return lambda picture: tuple(text for _, (text, _) in engine.ocr(picture, cls=False)[0] or ())


def _weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".onnx", ".pdmodel", ".pdiparams"))
