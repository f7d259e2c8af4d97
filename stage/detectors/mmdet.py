"""GenEval's object detector run by mmdet itself, in the environment that `make env-mmdet` builds.

mmdet 3.3 needs PyTorch 2.1 and the compiled operations of mmcv, so it lives apart from training and is asked
through the reward service. `stage.detectors.mask2former` computes the same without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage.detectors.coco import CLASS_NAMES
from stage.detectors.mmdet_checkpoint import read_checkpoint
from stage.types import Detection, Detections
from stage.weights import Home, locate, placement, provenance

HOME = Home(
    repository="",
    file="mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    command="mim download mmdet --config mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco --dest DIRECTORY",
)


class MmdetDetector:
    """`Detector` of COCO's 80 classes, with masks where the model of mmdet gives them.

    Args:
        config: a configuration file of mmdet, or its path inside mmdet's own configurations, such as
            `mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py`.
        weights: its checkpoint: a file, or a folder that holds it under its published name.
        min_score: the lowest score of a detection, in [0, 1].
        device: where the network runs.

    Raises:
        ImportError: mmdet is not installed here.
        FileNotFoundError: there is no such configuration, or no weights.
        ValueError: the weights do not fit the model, tensor for tensor, or its classes are not COCO's.
    """

    class_names: Sequence[str] = CLASS_NAMES

    def __init__(self, config: str, weights: str, min_score: float, device: str) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score lies in [0, 1], got {min_score!r}; GenEval counts objects above 0.3")
        try:
            from mmdet.apis import init_detector
        except ImportError as error:
            raise ImportError(
                f"mmdet must be importable, and is not here: {error}. Build its environment with `make env-mmdet` and "
                f"serve the reward from there, or use stage.detectors.mask2former"
            ) from error
        self.min_score = min_score
        self.device, _ = placement(device, "float32")
        file = locate(weights, None, HOME)
        # A palette is for drawing; with one given, mmdet does not look for a data set.
        self.model = init_detector(str(_config(config)), None, palette="random", device=str(self.device))
        classes = len(self.model.dataset_meta["classes"])
        if classes != len(CLASS_NAMES):
            raise ValueError(
                f"the classes are the {len(CLASS_NAMES)} of COCO, {config} has {classes}; give another"
            )
        _fill(self.model, read_checkpoint(file), file)
        self.provenance = provenance(file, weights, None)

    def detect(self, images: np.ndarray) -> list[Detections]:
        """Objects by class in each of the pictures, uint8 `[N, H, W, 3]`, most confident first."""
        from mmdet.apis import inference_detector

        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not all(images.shape[1:]):
            raise ValueError(
                f"pictures are uint8 [N, H, W, 3], got {images.dtype} {images.shape}; convert them to RGB"
            )
        # mmdet reads pictures as OpenCV does: blue first.
        found = inference_detector(self.model, [np.ascontiguousarray(image[..., ::-1]) for image in images])
        return [self._by_class(sample.pred_instances.cpu().numpy()) for sample in found]

    def _by_class(self, found: Any) -> Detections:
        """Detections by class name, most confident first."""
        masks: Sequence[np.ndarray | None] = found.masks if "masks" in found else [None] * len(found.scores)
        objects: dict[str, list[Detection]] = {}
        for i in np.argsort(-found.scores, kind="stable"):
            if found.scores[i] >= self.min_score:
                x0, y0, x1, y1 = (float(side) for side in found.bboxes[i])
                thing = Detection((x0, y0, x1, y1), float(found.scores[i]), masks[i])
                objects.setdefault(CLASS_NAMES[int(found.labels[i])], []).append(thing)
        return objects


def _config(config: str) -> Path:
    """The configuration file, looked for as given and among those that mmdet brings along."""
    import mmdet

    bundled = Path(mmdet.__file__).parent / ".mim" / "configs" / config
    for path in (Path(config).expanduser(), bundled):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"config is a file, or a file under {bundled.parents[1]}, got {config!r}; correct it"
    )


def _fill(model: Any, state: dict[str, torch.Tensor], file: Path) -> None:
    """Loads `state` into `model`, every tensor accounted for."""
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"every tensor of a checkpoint fits the model of its configuration, {file} does not: {error}"
        ) from error
