"""GroundingDINO finds the nouns of a prompt: which are there, where, and how many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage import weights
from stage.batches import Batches
from stage.rewards import grid, known_answers
from stage.rewards.grounding import Boxes, Rules, caption
from stage.rewards.mentions import Mentions, read_mentions
from stage.rewards.pixels import from_processor
from stage.types import Prompt, Scores

HOME = weights.Home("IDEA-Research/grounding-dino-tiny")


class GDinoReward:
    """Objects, relation or counts of a prompt as a grounding detector sees them, in [0, 1].

    The detector reads all nouns of a prompt at once. A box belongs to a noun if the mean of its probabilities
    over the tokens of the noun is above `threshold`; what the boxes are worth is in `stage.rewards.grounding`.
    All images of a prompt without nouns get 1.

    Source: CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_gdino.py, which the release of STAGE imports. Its
    groundingdino_swint_ogc.pth is grounding-dino-tiny on the hub.

    Departures:
        1. Images go through the model in batches, their captions padded.
        2. A prompt that cannot be scored is an error; there it earns 0.
        3. GenEval's metadata are read too.
        And those of `stage.rewards.grounding.Rules`, unless `released`.

    Args:
        path, revision: folder or repository in the layout of transformers.
        threshold: a box of less probability is none.
        released, overlap, near, suppression: see `stage.rewards.grounding.Rules`.
        device, dtype: of the model. The queries that look at an image are its best few, chosen anew in each dtype: on
            random weights a half type moves the highest probability of a noun by less than 0.1, and a score by as
            much as one box more or less is worth. So it is float32 unless asked otherwise.
        batch_size: most images of one forward pass.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        threshold: float,
        released: bool,
        overlap: float,
        near: float,
        suppression: float,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a probability below 1, got {threshold!r}; the release has 0.3")
        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, "gdino")
        self.rules = Rules(released, overlap, near, suppression)
        self.threshold = threshold
        folder = weights.locate(path, revision, HOME)
        # Imported after what is quick to refuse.
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection

        load = GroundingDinoForObjectDetection.from_pretrained
        self.model = weights.pretrained(load, folder, "grounding-dino", self.dtype).to(self.device)
        self.pixels = from_processor(weights.read_json(folder, "preprocessor_config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.provenance = {**weights.provenance(folder, path, revision), "dtype": dtype}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)
        for prompt in prompts:
            self._mentions(prompt)

    def self_check(self) -> None:
        """Raises ValueError unless a noun of a bundled picture is found there with more probability than elsewhere."""
        known_answers.require_own_picture(self._surest, "gdino")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts with nouns to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or a prompt cannot be scored.
        """
        grid.check(images, prompts)
        mentions = [self._mentions(prompt) for prompt in prompts]
        pictures, group = images.flatten(0, 1), images.shape[1]
        found = self._detect(pictures, [mentions[i // group] for i in range(len(pictures))])
        values, reasons = [], []
        for i, boxes in enumerate(found):
            asked = mentions[i // group]
            values.append(self.rules.score(asked, boxes) if asked.nouns else 1.0)
            seen = ", ".join(f"{noun} {len(boxes[noun])}" for noun in dict.fromkeys(asked.nouns))
            reasons.append(f"boxes: {seen}" if seen else "no nouns")
        return grid.fold(torch.tensor(values), images, prompts, reasons, (0.0, 1.0), "gdino")

    def _surest(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The highest probability of a box of the first noun, `[P, G]`, whatever the threshold is."""
        group = images.shape[1]
        asked = [self._mentions(prompt) for prompt in prompts for _ in range(group)]
        pictures, most = images.flatten(0, 1), max(len(mentions.nouns) for mentions in asked)
        rows = self.batches.run(
            lambda batch: self._forward(pictures, asked, batch, most), list(range(len(asked)))
        )
        return rows[..., 4].amax(1).reshape(-1, group)

    def _mentions(self, prompt: Prompt) -> Mentions:
        mentions = read_mentions(prompt)
        try:
            self.rules.check(mentions)
            text, spans = caption(mentions.nouns)
            if mentions.nouns:
                self._tokens(text, spans)
        except ValueError as error:
            raise ValueError(
                f"the prompt {prompt.text!r} (number {prompt.id}) cannot be scored: {error}"
            ) from error
        return mentions

    def _tokens(self, text: str, spans: list[list[tuple[int, int]]]) -> list[list[int]]:
        """The numbers of the tokens of each noun."""
        encoding, numbers = self.tokenizer(text), []
        limit = int(self.model.config.max_text_len)
        if len(encoding["input_ids"]) > limit:
            raise ValueError(f"all nouns of a prompt fit into {limit} tokens, got {text!r}; name fewer")
        for words in spans:
            if self.rules.released:
                words = [words[0], words[-1]]
            tokens = {encoding.char_to_token(place) for start, end in words for place in range(start, end)}
            numbers.append(sorted(token for token in tokens if token is not None))
        if not all(numbers):
            raise ValueError(f"every noun has tokens of its own, got {text!r}; write nouns with letters")
        return numbers

    def _detect(self, pictures: Tensor, asked: list[Mentions]) -> list[dict[str, Boxes]]:
        """The boxes of each noun in each picture `[N, H, W, 3]`."""
        busy = [i for i, mentions in enumerate(asked) if mentions.nouns]
        found: list[dict[str, Boxes]] = [{} for _ in asked]
        if not busy:
            return found
        most = max(len(asked[i].nouns) for i in busy)
        rows = self.batches.run(lambda batch: self._forward(pictures, asked, batch, most), busy).cpu()
        for i, row in zip(busy, rows, strict=True):
            for noun in dict.fromkeys(asked[i].nouns):
                columns = [4 + k for k, name in enumerate(asked[i].nouns) if name == noun]
                if self.rules.released and noun.count(" ") > 1:
                    columns = []
                kept = [(row[:, k] > self.threshold, row[:, k]) for k in columns]
                found[i][noun] = Boxes(
                    places=torch.cat([row[:0, :4], *(row[mask, :4] for mask, _ in kept)]),
                    scores=torch.cat([row[:0, 0], *(scores[mask] for mask, scores in kept)]),
                )
        return found

    def _forward(self, pictures: Tensor, asked: list[Mentions], batch: list[int], most: int) -> Tensor:
        """For each picture of a batch `[queries, 4 + most]`: box, then the probability of each noun, 0 beyond."""
        captions = [caption(asked[i].nouns) for i in batch]
        encoding = self.tokenizer([text for text, _ in captions], padding=True, return_tensors="pt")
        length = encoding["input_ids"].shape[1]
        shares = torch.zeros(len(batch), most, length)
        for row, (text, spans) in enumerate(captions):
            for column, tokens in enumerate(self._tokens(text, spans)):
                # As groundingdino/util/vl_utils.py divides.
                shares[row, column, tokens] = 1 / (len(tokens) + 1e-6)
        output = self.model(
            pixel_values=self.pixels(pictures[batch], self.device, self.dtype),
            input_ids=encoding["input_ids"].to(self.device),
            attention_mask=encoding["attention_mask"].to(self.device),
        )
        probabilities = output.logits[..., :length].float().sigmoid()
        nouns = probabilities @ shares.to(self.device).transpose(1, 2)
        return torch.cat([output.pred_boxes.float(), nouns], dim=-1)
