"""GenEval's object detector: Mask2Former with a Swin backbone, run by transformers with the weights of mmdet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage.batches import Batches, positive
from stage.detectors.coco import CLASS_NAMES
from stage.detectors.mask2former_pipeline import Frame, Instances, frame, instances, prepare
from stage.detectors.mask2former_weights import build
from stage.detectors.mmdet_checkpoint import read_checkpoint
from stage.detectors.mmdet_settings import require_representable
from stage.types import Detection, Detections
from stage.weights import Home, locate, placement, provenance

HOME = Home(
    repository="",
    file="mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    command="mim download mmdet --config mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco --dest DIRECTORY",
)


class Mask2FormerDetector:
    """`Detector` of COCO's 80 classes, with masks.

    Args:
        weights: the checkpoint of mmdet, in its layout 2 or 3: a file, a folder that holds it under its published
            name, or `owner/name` of the Hugging Face hub.
        revision: of the hub's repository; null is its newest.
        min_score: the lowest score of a detection, in [0, 1]. What a judge would drop need not be drawn.
        max_per_image: the most detections of one picture, before `min_score` (mmdet: 100).
        scale: bounds of the longer and of the shorter side of a picture as it is looked at (mmdet: 1333, 800).
        round_pixels: whether resized pixels are whole grey levels, as in GenEval, which runs mmdet 2. The
            configuration of mmdet 3 keeps fractions.
        batch_size: pictures in one forward pass; halved when memory runs out.
        device, dtype: where and in what the network runs; scores are computed in float32.

    Raises:
        FileNotFoundError: there are no weights; says what to download.
        ValueError: the weights are of another model, or of one that transformers does not have, or an argument is out
            of its range.
    """

    class_names: Sequence[str] = CLASS_NAMES

    def __init__(
        self,
        weights: str,
        revision: str | None,
        min_score: float,
        max_per_image: int,
        scale: Sequence[int],
        round_pixels: bool,
        batch_size: int,
        device: str,
        dtype: str,
    ) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score lies in [0, 1], got {min_score!r}; GenEval counts objects above 0.3")
        if len(scale) != 2 or not all(isinstance(side, int) and side > 0 for side in scale):
            raise ValueError(f"scale is two sides in pixels, got {list(scale)!r}; mmdet has 1333 and 800")
        self.min_score = min_score
        self.max_per_image = positive(max_per_image, "max_per_image")
        self.scale = (int(scale[0]), int(scale[1]))
        self.round_pixels = round_pixels
        self.batches = Batches(batch_size, "Mask2Former")
        self.device, self.dtype = placement(device, dtype)
        file = locate(weights, revision, HOME)
        model: Any = build(read_checkpoint(file, require_representable))
        if model.config.num_labels != len(CLASS_NAMES):
            raise ValueError(
                f"the classes are the {len(CLASS_NAMES)} of COCO, {file} tells {model.config.num_labels} apart; "
                f"give a checkpoint for instances of COCO, not one for panoptic segmentation"
            )
        self.model = model.to(self.device, self.dtype)
        self.provenance = provenance(file, weights, revision)

    def detect(self, images: np.ndarray) -> list[Detections]:
        """Objects by class in each of the pictures, uint8 `[N, H, W, 3]`, most confident first.

        Raises:
            ValueError: `images` is no such array, or the network's output is not finite.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not all(images.shape[1:]):
            raise ValueError(
                f"pictures are uint8 [N, H, W, 3] with at least one pixel, got {images.dtype} {images.shape}; "
                f"convert them to RGB"
            )
        sizes = frame((images.shape[1], images.shape[2]), self.scale)
        found: list[Detections] = []
        for part in self.batches.slices(lambda rows: self._look(images[rows], sizes), len(images)):
            found += part
        return found

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[N, Q, K + 1]` and mask logits `[N, Q, H/4, W/4]` in float32.

        `pixels` are prepared pictures `[N, 3, H, W]`, see `stage.detectors.mask2former_pipeline.prepare`.
        """
        output = self.model(pixel_values=pixels.to(self.device, self.dtype))
        return output.class_queries_logits.float(), output.masks_queries_logits.float()

    @torch.inference_mode()
    def _look(self, images: np.ndarray, sizes: Frame) -> list[Detections]:
        classes, masks = self.logits(prepare(images, sizes, self.round_pixels, self.device))
        if not (classes.isfinite().all() and masks.isfinite().all()):
            raise ValueError(
                f"logits are finite, those of {len(images)} pictures in {self.dtype} are not; check the weights, "
                f"or set dtype to float32"
            )
        return [
            _by_class(instances(*logits, sizes, self.max_per_image, self.min_score))
            for logits in zip(classes, masks, strict=True)
        ]


def _by_class(found: Instances) -> Detections:
    """Detections by class name, most confident first."""
    best = found.scores.argsort(descending=True, stable=True)
    columns = (found.boxes, found.scores, found.labels, found.masks)
    boxes, scores, labels, masks = (column[best].cpu() for column in columns)
    objects: dict[str, list[Detection]] = {}
    rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), masks.numpy(), strict=True)
    for (x0, y0, x1, y1), score, label, mask in rows:
        objects.setdefault(CLASS_NAMES[label], []).append(Detection((x0, y0, x1, y1), score, mask))
    return objects
