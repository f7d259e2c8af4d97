"""PickScore: a CLIP ViT-H-14 fine-tuned on which of two images people picked for their own prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage import weights
from stage.batches import Batches
from stage.rewards import grid, known_answers
from stage.rewards.pixels import from_processor
from stage.types import Prompt, Scores

HOME = weights.Home("yuvalkirstain/PickScore_v1")
MAX_TOKENS = 77


class PickScoreReward:
    """Cosine between image and prompt times the learnt scale of about 100; generated images lie around 18 to 24.

    The range is plus or minus that scale. Flow-GRPO divides by 26: set the weight to 0.0385 for its scale.

    Source: arXiv 2305.01569; yuvalkirstain/PickScore README.md.

    Departures: 1. Weights are in `dtype`, cosine and scale float32. Each prompt is read once.

    Args:
        path, revision: folder or repository in the layout of transformers, with tokenizer and preprocessing.
        device, dtype: of the model.
        batch_size: most images of one forward pass.
    """

    def __init__(self, path: str, revision: str | None, device: str, dtype: str, batch_size: int) -> None:
        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, "pickscore")
        folder = weights.locate(path, revision, HOME)
        # Imported after what is quick to refuse.
        from transformers import AutoTokenizer, CLIPModel

        self.model = weights.pretrained(CLIPModel.from_pretrained, folder, "clip", self.dtype).to(self.device)
        self.scale = float(self.model.logit_scale.float().exp())
        self.pixels = from_processor(weights.read_json(folder, "preprocessor_config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.provenance = {**weights.provenance(folder, path, revision), "dtype": dtype}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_own_words(known_answers.totals(self), "pickscore")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or prompts cannot be scored.
        """
        grid.check(images, prompts)
        seen = self.batches.run(self._see, images.flatten(0, 1)).reshape(*images.shape[:2], -1)
        read = self.batches.run(self._read, [prompt.text for prompt in prompts])
        found = self.scale * (seen * read.unsqueeze(1)).sum(-1).flatten()
        reasons = [f"PickScore {value:.3f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, (-self.scale, self.scale), "pickscore")

    def _see(self, pictures: Tensor) -> Tensor:
        """Image features `[N, D]` of unit length."""
        pooled = self.model.vision_model(self.pixels(pictures, self.device, self.dtype)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _read(self, texts: Sequence[str]) -> Tensor:
        """Text features `[N, D]` of unit length."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(
            tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled).float(), dim=-1)
