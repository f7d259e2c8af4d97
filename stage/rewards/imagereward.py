"""ImageReward: BLIP reads the prompt while it looks at the image, and a head rates what it has understood."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage import weights
from stage.batches import Batches
from stage.rewards import grid, known_answers
from stage.rewards.pixels import CLIP_MEAN, CLIP_STD, Pixels
from stage.types import Prompt, Scores

HOME = weights.Home("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER_HOME = weights.Home("google-bert/bert-base-uncased", "tokenizer.json")
# Mean and standard deviation of the raw rating over the training data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of one attention head, in every published BLIP
WIDTHS = (1024, 128, 64, 16, 1)

# Beginnings of the published names and what they are called here, the first that fits.
NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
# Heads of pretraining that the rating does not use, and a buffer that counts positions.
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|^blip\.text_encoder\.embeddings\.position_ids$")


class Rater(nn.Module):
    """BLIP's two encoders and the head, of the sizes that the tensors under the published names have."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision, text = "blip.visual_encoder.", "blip.text_encoder."
        patches, width = state[f"{vision}pos_embed"].shape[1:]
        patch = state[f"{vision}patch_embed.proj.weight"].shape[-1]
        self.side = int((patches - 1) ** 0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=state[f"{vision}blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(state, rf"{re.escape(vision)}blocks\.(\d+)\."),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=self.side,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        vocabulary, depth = state[f"{text}embeddings.word_embeddings.weight"].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=depth,
                encoder_hidden_size=width,
                intermediate_size=state[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(state, rf"{re.escape(text)}encoder\.layer\.(\d+)\."),
                num_attention_heads=depth // HEAD_WIDTH,
                max_position_embeddings=state[f"{text}embeddings.position_embeddings.weight"].shape[0],
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )
        # The published names count dropout layers too.
        sizes = zip((0, 2, 4, 6, 7), (depth, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.head = nn.ModuleDict({str(index): nn.Linear(before, after) for index, before, after in sizes})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels `[N, 3, h, w]`, tokens and mask `[N, T]` to normalised ratings `[N]`, the head in float32."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        value = read[:, 0].float()
        for layer in self.head.values():
            value = layer(value)
        return (value.squeeze(-1) - MEAN) / STD


class ImageRewardReward:
    """A rating with mean 0 and standard deviation 1 over the data it was trained on: mostly -2.3 to 2.

    Nothing limits it; that it is finite is checked.

    Source: arXiv 2304.05977; THUDM/ImageReward ImageReward/ImageReward.py, train/src/models/med.py.

    Departures:
        1. BLIP is the one of transformers, its weights renamed tensor by tensor. The two projections of
           pretraining in the file are not used, as there.
        2. Padding is to the longest prompt of a batch, up to 35 tokens, and masked; there it is always 35.

    Args:
        path, revision: of `ImageReward.pt`.
        tokenizer_path, tokenizer_revision: of the `tokenizer.json` of bert-base-uncased.
        device, dtype: of the encoders.
        batch_size: most images of one forward pass.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        tokenizer_path: str,
        tokenizer_revision: str | None,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        from tokenizers import Tokenizer

        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, "imagereward")
        file = weights.locate(path, revision, HOME)
        words = weights.locate(tokenizer_path, tokenizer_revision, TOKENIZER_HOME)
        self.model = read_rater(file).to(self.device, self.dtype).eval().requires_grad_(False)
        self.model.head.float()
        self.pixels = Pixels(self.model.side, None, self.model.side, "bicubic", CLIP_MEAN, CLIP_STD)
        self.tokenizer = Tokenizer.from_file(str(words))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        self.provenance: dict[str, Any] = {
            **weights.provenance(file, path, revision),
            "dtype": dtype,
            "tokenizer": weights.provenance(words, tokenizer_path, tokenizer_revision),
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_own_words(known_answers.totals(self), "imagereward")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or prompts cannot be scored.
        """
        grid.check(images, prompts)
        found = grid.pairs(self.batches, self._rate, images, prompts)
        reasons = [f"ImageReward {value:.3f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, (-float("inf"), float("inf")), "imagereward")

    def _rate(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        encodings = self.tokenizer.encode_batch(list(texts))
        ids, mask = (
            torch.tensor([getattr(encoding, name) for encoding in encodings], device=self.device)
            for name in ("ids", "attention_mask")
        )
        return self.model(self.pixels(pictures, self.device, self.dtype), ids, mask)


def read_rater(file: Path) -> Rater:
    """The model of a file in the published layout, every tensor accounted for.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    state = weights.read_state(file)
    try:
        model = Rater(state)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"a weight file fits its architecture tensor for tensor, {file} has no BLIP under the names of "
            f"ImageReward: {error}; give ImageReward.pt"
        ) from error
    weights.fill(
        model, {_renamed(name): value for name, value in state.items() if not UNUSED.match(name)}, file
    )
    return model


def _renamed(name: str) -> str:
    for pattern, ours in NAMES:
        renamed, times = re.subn(pattern, ours, name)
        if times:
            return renamed
    return name


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers have a name that matches; the group is their number."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return len(found)
