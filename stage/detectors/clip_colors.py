"""GenEval's colour classifier: CLIP ViT-L/14 looks at each object on a grey ground and chooses among ten colours.

Source: djghosh13/geneval evaluation/evaluate_images.py (ImageCrops, color_classification); LAION-AI/CLIP_benchmark
clip_benchmark/metrics/zeroshot_classification.py. Departure: crops of several pictures share a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from stage.batches import Batches
from stage.types import Detection
from stage.weights import Home, locate, placement, provenance

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
HOME = Home("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")

# A picture [H, W, 3], the class of some objects in it, and these objects.
Sight = tuple[np.ndarray, str, Sequence[Detection]]


class ClipColors:
    """`ColorClassifier` that tells GenEval's ten colours apart.

    Args:
        weights: what open_clip loads into `model`: a file, a folder that holds it under its published name, or
            `owner/name` of the Hugging Face hub.
        revision: of the hub's repository; null is its newest.
        model: name of the architecture in open_clip. OpenAI's weights were trained with QuickGELU: give the name
            that ends in `-quickgelu`, the other computes something else without complaint.
        background: what surrounds an object that came with a mask, as PIL reads colours (GenEval: "#999").
        batch_size: crops in one forward pass; halved when memory runs out.
        device, dtype: where and in what (autocast) the towers run.

    Raises:
        FileNotFoundError: there are no weights; says what to download.
        ValueError: the weights do not fit the model, or open_clip knows no such model.
    """

    color_names: Sequence[str] = COLORS

    def __init__(
        self,
        weights: str,
        revision: str | None,
        model: str,
        background: str,
        batch_size: int,
        device: str,
        dtype: str,
    ) -> None:
        if open_clip.get_model_config(model) is None:
            raise ValueError(
                f"model names an architecture of open_clip, got {model!r}; GenEval has ViT-L-14-quickgelu"
            )
        self.background = ImageColor.getrgb(background)
        self.batches = Batches(batch_size, "ClipColors")
        self.device, self.dtype = placement(device, dtype)
        file = locate(weights, revision, HOME)
        try:
            clip, _, self.transform = open_clip.create_model_and_transforms(model, pretrained=str(file))
        except (
            Exception
        ) as error:  # open_clip's readers raise many kinds, and each means that the file will not do
            raise ValueError(
                f"weights are a state dict that open_clip loads into {model}, {file} is not: {error}. Run "
                f"`{HOME.download()}` and give that file"
            ) from error
        self.clip = clip.to(self.device).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.provenance = provenance(file, weights, revision)
        self._directions: dict[str, Tensor] = {}

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class in one picture, uint8 `[H, W, 3]`."""
        return self.colors_in_batches([(image, class_name, objects)])[0]

    def colors_in_batches(self, sights: Sequence[Sight]) -> list[list[str]]:
        """The colours of each sight's objects; all crops share the batches.

        Raises:
            ValueError: a box holds no pixel, or a mask has another size than its picture.
        """
        crops = [crop(image, thing, self.background) for image, _, objects in sights for thing in objects]
        names = [name for _, name, objects in sights for _ in objects]
        best = [
            index
            for part in self.batches.slices(lambda rows: self._best(crops[rows], names[rows]), len(crops))
            for index in part
        ]
        answers = iter(best)
        return [[COLORS[next(answers)] for _ in objects] for _, _, objects in sights]

    @torch.inference_mode()
    def _best(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[int]:
        """Index of the colour whose direction is nearest to each crop, given the class of its object."""
        pixels = torch.stack([self.transform(picture) for picture in crops]).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.clip.encode_image(pixels).float()
        directions = torch.stack([self._direction(name) for name in names])
        similarity = (F.normalize(features, dim=-1)[:, None] * directions).sum(-1)
        if not similarity.isfinite().all():
            raise ValueError(
                f"similarities are finite, CLIP in {self.dtype} gave others; set dtype to float32"
            )
        return similarity.argmax(1).tolist()

    @torch.inference_mode()
    def _direction(self, name: str) -> Tensor:
        """Unit vectors `[10, D]`, one a colour: the mean over the templates of normalised text features."""
        if name not in self._directions:
            texts = [form.format(color=color, name=name) for color in COLORS for form in TEMPLATES]
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                features = self.clip.encode_text(self.tokenizer(texts).to(self.device)).float()
            means = F.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._directions[name] = F.normalize(means, dim=-1)
        return self._directions[name]


def crop(image: np.ndarray, thing: Detection, background: tuple[int, ...]) -> Image.Image:
    """The object's box cut out of a picture `[H, W, 3]`, with `background` where the mask is not.

    Without a mask the box is cut out as it is. Corners are rounded to whole pixels, as PIL does.
    """
    x0, y0, x1, y1 = (round(side) for side in thing.box)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"an object's box holds a pixel, got {thing.box}; check the detector")
    if thing.mask is not None:
        if thing.mask.shape != image.shape[:2]:
            raise ValueError(
                f"a mask has the size of its picture {image.shape[:2]}, got {thing.mask.shape}; check the detector"
            )
        image = np.where(thing.mask[..., None], image, np.array(background, dtype=np.uint8))
    return Image.fromarray(image).crop((x0, y0, x1, y1))
