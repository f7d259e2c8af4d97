"""A CLIP model of open_clip that several scorers share: loaded once, and a rollout's images are encoded once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stage import weights
from stage.batches import Batches
from stage.rewards import grid
from stage.rewards.pixels import Pixels
from stage.types import Prompt

# The tower of `clip` and `aesthetic`.
OPENAI_VIT_L_14 = weights.Home("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
# Entries of OpenAI's state dicts that are no weights.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


class Tower:
    """Image and text features of unit length. Use `shared_tower` to get one.

    Args:
        path: file of a state dict in the layout of open_clip, or where to get it; see `weights.locate`.
        revision: of the hub repository, None for the newest.
        home: where the weights are published.
        architecture: name of open_clip's configuration, such as `ViT-H-14`. Weights trained with QuickGELU
            (OpenAI's) need a name that ends in `-quickgelu`.
        device, dtype: of the model. Features are float32.
        batch_size: most images of one forward pass.
        whole: the longer side of a picture fits in and black fills the square, resized in fractions of a level;
            else the square in its middle, resized as Pillow does.

    Raises:
        FileNotFoundError, ValueError: weights are missing or do not fit, see `stage.weights`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        home: weights.Home,
        architecture: str,
        device: str,
        dtype: str,
        batch_size: int,
        whole: bool,
    ) -> None:
        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, f"the tower {architecture}")
        file = weights.locate(path, revision, home)
        # Imported after what is quick to refuse.
        import open_clip

        if architecture not in open_clip.list_models():
            raise ValueError(
                f"architecture names a model of open_clip, got {architecture!r}; open_clip.list_models() has them"
            )
        state = weights.read_state(file)
        model = _untrained(architecture)
        weights.fill(model, {name: value for name, value in state.items() if name not in NO_WEIGHTS}, file)
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.pixels = _pixels(open_clip.get_model_preprocess_cfg(model), whole)
        self.provenance = {
            **weights.provenance(file, path, revision),
            "architecture": architecture,
            "dtype": dtype,
        }
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return int(self.model.text_projection.shape[-1])

    def images(self, images: Tensor) -> Tensor:
        """Images uint8 `[P, G, H, W, 3]` to features `[P, G, D]`. Asked again for the same tensor, it remembers."""
        if self._last is not None:
            seen, version, features = self._last
            if seen() is images and version == images._version:
                return features
        found = self.batches.run(self._encode_pictures, images.flatten(0, 1))
        features = found.reshape(*images.shape[:2], -1)
        self._last = (weakref.ref(images), images._version, features)
        return features

    def texts(self, texts: Sequence[str]) -> Tensor:
        """N texts to features `[N, D]`, cut at the length that the model reads."""
        return self.batches.run(self._encode_texts, list(texts))

    def cosine(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Cosine between each image `[P, G, H, W, 3]` and its prompt, float32 `[P, G]`.

        Raises:
            ValueError: the images or prompts cannot be scored.
        """
        grid.check(images, prompts)
        texts = self.texts([prompt.text for prompt in prompts])
        return (self.images(images) * texts.unsqueeze(1)).sum(-1)

    def _encode_pictures(self, pictures: Tensor) -> Tensor:
        pixels = self.pixels(pictures, self.device, self.dtype)
        return torch.nn.functional.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(self.device)
        return torch.nn.functional.normalize(self.model.encode_text(tokens).float(), dim=-1)


def _untrained(architecture: str) -> Any:
    """The model with random weights, without open_clip's warning that they are."""
    import open_clip

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(architecture, pretrained=None, precision="fp32", device="cpu")
    finally:
        logging.disable(before)


def _pixels(config: dict[str, Any], whole: bool) -> Pixels:
    """The preprocessing of open_clip's configuration; `whole` as in `Tower`."""
    size = config["size"]
    side = size if isinstance(size, int) else size[0]
    if config["resize_mode"] != "shortest" or (not isinstance(size, int) and size[0] != size[1]):
        raise ValueError(
            f"a tower sees squares, this one wants size {size} in mode {config['resize_mode']!r}; choose another "
            f"architecture"
        )
    return Pixels(
        side=side,
        longest=side if whole else None,
        crop=side,
        mode=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        rounded=not whole,
    )


_TOWERS: weakref.WeakValueDictionary[tuple[Any, ...], Tower] = weakref.WeakValueDictionary()


def shared_tower(
    path: str,
    revision: str | None,
    home: weights.Home,
    architecture: str,
    device: str,
    dtype: str,
    batch_size: int,
    whole: bool = False,
) -> Tower:
    """The tower for these arguments: the one that is in use already, or else a new one. See `Tower`."""
    key = (path, revision, home, architecture, device, dtype, whole)
    tower = _TOWERS.get(key)
    if tower is None:
        tower = Tower(path, revision, home, architecture, device, dtype, batch_size, whole)
        _TOWERS[key] = tower
    tower.batches.size = min(tower.batches.size, Batches(batch_size, architecture).size)
    return tower
