"""BLIP-VQA, T2I-CompBench's measure of attributes: is every noun phrase of the prompt in the image?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from stage import weights
from stage.batches import Batches
from stage.rewards import grid
from stage.rewards.pixels import CLIP_MEAN, CLIP_STD
from stage.types import Prompt, Scores

HOME = weights.Home("Salesforce/blip-vqa-capfilt-large")
MAX_TOKENS = 35  # of a question


class BlipVQAReward:
    """Product over the noun phrases of the prompt of the probability of "yes" against "no", in [0, 1].

    A question is a phrase with a question mark: "a green bench?". The answer is the first token of the decoder.

    Source: arXiv 2307.06350, section 4.1; Karine-Huang/T2I-CompBench BLIPvqa_eval/BLIP_vqa.py and
    BLIPvqa_eval/models/blip_vqa.py (`vqa_prob`).

    Departures:
        1. The vision tower sees each image once, not once a phrase. Pairs whose questions have the same number of
           tokens go through together, so that nothing is padded and no mask decides.
        2. Probabilities are not rounded to four decimals before they are multiplied.
        3. A prompt without a noun phrase is an error; there it scores 1.

    Args:
        path, revision: folder or repository in the layout of transformers.
        phrases: the noun phrases of a prompt, in order; see `stage.rewards.phrases`.
        most: phrases beyond this number are left out (T2I-CompBench: 8).
        side: pixels to which an image is resized, bicubically and to a square (T2I-CompBench: 480).
        device, dtype: of the model.
        batch_size: most pairs of image and question, or images, in one forward pass.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        phrases: Callable[[str], Sequence[str]],
        most: int,
        side: int,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        if most < 1 or side < 1:
            raise ValueError(
                f"most and side are at least 1, got {most} and {side}; T2I-CompBench has 8 and 480"
            )
        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, "blip_vqa")
        self.phrases, self.most, self.side = phrases, most, side
        folder = weights.locate(path, revision, HOME)
        # Imported after what is quick to refuse.
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        model = weights.pretrained(BlipForQuestionAnswering.from_pretrained, folder, "blip", self.dtype)
        self.model = model.to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.yes, self.no = (self.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        if self.tokenizer.unk_token_id in (self.yes, self.no):
            raise ValueError(
                f"'yes' and 'no' are tokens of BLIP, the tokenizer in {folder} lacks them; give the model's own folder"
            )
        # BLIP's tokens for the beginning of an answer and of a question; tokenizers of the hub lack the second.
        self.begin = int(model.config.text_config.bos_token_id)
        self.ask = self.begin + 1
        self.provenance = {**weights.provenance(folder, path, revision), "dtype": dtype}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)
        for prompt in prompts:
            self._questions(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or a prompt cannot be scored.
        """
        grid.check(images, prompts)
        asked = [self._questions(prompt) for prompt in prompts]
        group, pictures = images.shape[1], images.flatten(0, 1)
        seen = self.batches.run(self._look, pictures)
        rows = [(i, text) for i in range(len(pictures)) for text in asked[i // group]]
        yes = self._ask(seen, rows)
        values = torch.ones(len(pictures), dtype=torch.float64)
        answers: list[list[str]] = [[] for _ in pictures]
        for (i, text), value in zip(rows, yes, strict=True):
            values[i] *= value
            answers[i].append(f"{text} {value:.3f}")
        reasons = [", ".join(found) for found in answers]
        return grid.fold(values, images, prompts, reasons, (0.0, 1.0), "blip_vqa")

    def _questions(self, prompt: Prompt) -> list[str]:
        found = [f"{phrase}?" for phrase in self.phrases(prompt.text)][: self.most]
        if not found:
            raise ValueError(
                f"BLIP-VQA asks about the noun phrases of a prompt, {prompt.text!r} has none; leave it out"
            )
        return found

    def _look(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 `[N, H, W, 3]` to the states of the vision tower `[N, tokens, width]`."""
        found = pictures.to(self.device).permute(0, 3, 1, 2)
        size = [self.side, self.side]
        found = functional.resize(found, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)
        )
        pixels = ((found.float() / 255 - mean) / std).to(self.dtype)
        states: Tensor = self.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        return states

    def _ask(self, seen: Tensor, rows: list[tuple[int, str]]) -> list[float]:
        """The probability of yes against no for each (picture number, question)."""
        tokens = {text: self._tokens(text) for _, text in rows}
        lengths: dict[int, list[int]] = {}
        for place, (_, text) in enumerate(rows):
            lengths.setdefault(len(tokens[text]), []).append(place)
        found = [0.0] * len(rows)
        for places in lengths.values():
            alike = [(rows[place][0], tokens[rows[place][1]]) for place in places]
            values = self.batches.run(lambda batch: self._yes(seen, batch), alike)
            for place, value in zip(places, values.tolist(), strict=True):
                found[place] = value
        return found

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [self.ask, *ids[1:]]

    def _yes(self, seen: Tensor, rows: list[tuple[int, list[int]]]) -> Tensor:
        """Probabilities `[N]` of yes against no for N rows of (picture number, tokens), all equally many."""
        states = seen[[i for i, _ in rows]]
        question = self.model.text_encoder(
            input_ids=torch.tensor([ids for _, ids in rows], device=self.device), encoder_hidden_states=states
        ).last_hidden_state
        begin = torch.full((len(rows), 1), self.begin, device=self.device)
        logits = self.model.text_decoder(input_ids=begin, encoder_hidden_states=question).logits[:, 0]
        return torch.sigmoid((logits[:, self.yes] - logits[:, self.no]).float())
