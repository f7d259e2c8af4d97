"""What mmdet does to a picture before Mask2Former and to its logits after it, for pictures of one size.

Sources: open-mmlab/mmdetection v3.3 configs/mask2former (test_pipeline, data_preprocessor),
mmdet/models/dense_heads/maskformer_head.py (predict), mmdet/models/seg_heads/panoptic_fusion_heads/
maskformer_fusion_head.py (predict, instance_postprocess); open-mmlab/mmcv v2.1 mmcv/image/geometric.py (rescale_size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height and width in pixels

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, red, green, blue, in grey levels
STD = (58.395, 57.12, 57.375)
DIVISOR = 32  # heights and widths are padded to multiples of this


@dataclass(frozen=True)
class Frame:
    """The sizes of a picture on its way: as it came, resized, and padded below and to the right."""

    original: Size
    resized: Size
    padded: Size


@dataclass(frozen=True)
class Instances:
    """Objects of one picture.

    boxes float32 `[M, 4]` as (x0, y0, x1, y1), x1 and y1 one past the last pixel; scores float32 `[M]`; labels int64
    `[M]`; masks bool `[M, H, W]` of the picture's original size.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


def frame(original: Size, scale: Size) -> Frame:
    """Sizes of a picture that is made as large as `scale` allows: its two entries bound the longer and shorter side."""
    factor = min(max(scale) / max(original), min(scale) / min(original))
    resized = (int(original[0] * factor + 0.5), int(original[1] * factor + 0.5))
    padded = (-(-resized[0] // DIVISOR) * DIVISOR, -(-resized[1] // DIVISOR) * DIVISOR)
    return Frame(original, resized, padded)


def prepare(images: np.ndarray, sizes: Frame, round_pixels: bool, device: torch.device) -> Tensor:
    """uint8 pictures `[N, H, W, 3]` to float32 `[N, 3, *padded]`: resized, normalised, padded with zeros.

    `round_pixels` resizes whole grey levels to whole grey levels; without it fractions stay.
    """
    height, width = sizes.resized
    source = images if round_pixels else images.astype(np.float32)
    resized = [cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in source]
    pixels = torch.from_numpy(np.stack(resized)).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return F.pad((pixels - mean) / std, (0, sizes.padded[1] - width, 0, sizes.padded[0] - height))


def instances(
    class_logits: Tensor, mask_logits: Tensor, sizes: Frame, max_per_image: int, min_score: float
) -> Instances:
    """The objects that one picture's logits tell, in the order in which they were chosen.

    The `max_per_image` best pairs of query and class are kept, the last class being "no object". A score is the
    probability of the class times the mean probability of the pixels inside the mask.

    Args:
        class_logits: `[Q, K + 1]`, float32.
        mask_logits: `[Q, h, w]`, float32, of the padded picture at a lower resolution.
        min_score: an object below it is left out, before its mask is drawn where that is possible; 0 keeps all.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    scores, chosen = probabilities.flatten().topk(min(max_per_image, probabilities.numel()), sorted=False)
    likely = scores >= min_score  # the mean over the mask is at most 1
    scores, chosen = scores[likely], chosen[likely]
    queries, which = (chosen // classes).unique(return_inverse=True)
    logits = _at_original_size(mask_logits[queries], sizes)
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = scores * certainty[which]
    kept = scores >= min_score
    which, scores, labels = which[kept], scores[kept], (chosen % classes)[kept]
    return Instances(boxes(masks)[which], scores, labels, masks[which])


def _at_original_size(mask_logits: Tensor, sizes: Frame) -> Tensor:
    """`[Q, h, w]` to `[Q, H, W]`: to the padded size, without the padding, to the original size."""
    if not len(mask_logits):
        return mask_logits.new_zeros((0, *sizes.original))
    padded = F.interpolate(mask_logits[None], size=sizes.padded, mode="bilinear", align_corners=False)
    inner = padded[:, :, : sizes.resized[0], : sizes.resized[1]]
    return F.interpolate(inner, size=sizes.original, mode="bilinear", align_corners=False)[0]


def boxes(masks: Tensor) -> Tensor:
    """The smallest box around each of bool masks `[Q, H, W]`, float32 `[Q, 4]`; zeros where a mask is empty."""
    sides = [_extent(masks.any(1)), _extent(masks.any(2))]
    return torch.stack([sides[0][0], sides[1][0], sides[0][1], sides[1][1]], dim=1).float()


def _extent(marked: Tensor) -> Sequence[Tensor]:
    """First marked place and one past the last of each row of bool `[Q, n]`; 0 and 0 where there is none."""
    places = marked.int()
    first, last = places.argmax(1), marked.shape[1] - places.flip(1).argmax(1)
    return first, last * marked.any(1)
