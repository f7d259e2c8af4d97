"""Answers of a visual question answering model: is what the prompt mentions in the picture?"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stage import weights
from stage.batches import Batches
from stage.rewards import grid, known_answers
from stage.rewards.mentions import Mentions, read_mentions
from stage.rewards.pixels import from_processor
from stage.types import Prompt, Scores

HOME = weights.Home("microsoft/git-large-vqav2")
# Tasks whose answer GIT is not asked for: relations and counts.
OTHER_TASKS = ("spatial", "numeracy")


class Seen(nn.Module):
    """Stands where GIT has its image encoder, for pictures that the encoder has seen before."""

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        """Features `[N, 1, patches, width]`, in four axes as GIT expects of pixels."""
        return SimpleNamespace(last_hidden_state=pixel_values.squeeze(1))


class GITReward:
    """Mean probability of "yes" against "no" over the questions of a prompt, in [0, 1].

    A prompt asks one question for each of its attributes ("purple elephant?"), or for each noun where it has no
    attributes. All images of a spatial or numeracy prompt get 0 and of a prompt without nouns 1, so that they
    have no say within a group.

    Source: CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_git.py, which the release of STAGE imports; questions as
    in krennic999/STAGE src/grpo/src/open_r1/grpo.py.

    Departures:
        1. All pairs of image and question go through the model in batches, padded behind the question, which
           the model reads from left to right. The image encoder sees each image once, however many are its questions.
        2. Every tensor of the file is accounted for; there, what does not fit is skipped.
        3. GenEval's metadata are read too: a colour makes an attribute.
        4. An empty list of attributes is none, the nouns are asked for; there its mean is NaN.

    Args:
        path, revision: folder or repository in the layout of transformers.
        device, dtype: of the model. On random weights bfloat16 moves a score by less than 0.15, by 0.02 on average,
            and float16 by less than 2e-2, by 2e-3 on average.
        batch_size: most pairs of image and question in one forward pass.
    """

    def __init__(self, path: str, revision: str | None, device: str, dtype: str, batch_size: int) -> None:
        self.device, self.dtype = weights.placement(device, dtype)
        self.batches = Batches(batch_size, "git")
        folder = weights.locate(path, revision, HOME)
        # Imported after what is quick to refuse.
        from transformers import AutoTokenizer, GitForCausalLM

        model = weights.pretrained(GitForCausalLM.from_pretrained, folder, "git", self.dtype)
        self.model = model.to(self.device)
        self.encoder, self.model.git.image_encoder = self.model.git.image_encoder, Seen()
        self.pixels = from_processor(weights.read_json(folder, "preprocessor_config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.yes, self.no = (self._answer(word) for word in ("yes", "no"))
        self.provenance = {**weights.provenance(folder, path, revision), "dtype": dtype}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)
        for prompt in prompts:
            read_mentions(prompt)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_own_picture(known_answers.totals(self), "git")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts with nouns to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or a prompt cannot be scored.
        """
        grid.check(images, prompts)
        asked = [questions(read_mentions(prompt)) for prompt in prompts]
        group, pictures = images.shape[1], images.flatten(0, 1)
        rows = [(i, text) for i in range(len(pictures)) for text in asked[i // group][0]]
        yes = self._ask(pictures, rows)
        answers: list[list[str]] = [[] for _ in pictures]
        sums = torch.zeros(len(pictures))
        for (i, text), value in zip(rows, yes, strict=True):
            sums[i] += value / len(asked[i // group][0])
            answers[i].append(f"{text} {value:.3f}")
        for i in range(len(pictures)):
            if not answers[i]:
                sums[i] = asked[i // group][1]
                answers[i].append("no question")
        return grid.fold(sums, images, prompts, [", ".join(found) for found in answers], (0.0, 1.0), "git")

    def _ask(self, pictures: Tensor, rows: list[tuple[int, str]]) -> list[float]:
        """The probability of yes against no for each (picture number, question)."""
        if not rows:
            return []
        used = sorted({i for i, _ in rows})
        seen = self.batches.run(self._see, pictures[used])
        places = [used.index(i) for i, _ in rows]
        questions = [text for _, text in rows]
        return self.batches.run(
            lambda batch, texts: self._yes(seen[batch], texts), places, questions
        ).tolist()

    def _see(self, pictures: Tensor) -> Tensor:
        """What the image encoder makes of pictures, `[N, patches, width]`."""
        found: Tensor = self.encoder(self.pixels(pictures, self.device, self.dtype)).last_hidden_state
        return found

    def _yes(self, seen: Tensor, questions: list[str]) -> Tensor:
        """Probabilities `[N]` for N pictures, as the encoder has seen them, and a question about each."""
        texts = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        ids = [torch.tensor([self.tokenizer.cls_token_id, *text]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(
            ids, batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        length = torch.tensor([len(text) for text in ids])
        mask = torch.arange(padded.shape[1]) < length.unsqueeze(1)
        logits = self.model(
            input_ids=padded.to(self.device),
            attention_mask=mask.long().to(self.device),
            pixel_values=seen.unsqueeze(1),
            logits_to_keep=padded.shape[1],
        ).logits
        # The answer follows a question's last token.
        last = (length - 1).to(self.device)
        answer = logits[torch.arange(len(questions), device=self.device), last].float()
        return torch.sigmoid(answer[:, self.yes] - answer[:, self.no])

    def _answer(self, word: str) -> int:
        """The token of an answer. Raises ValueError if the tokenizer has no single one."""
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{word!r} is one token of GIT, this tokenizer has {ids}; give the model's own folder"
            )
        return int(ids[0])


def questions(mentions: Mentions) -> tuple[tuple[str, ...], float]:
    """The questions of a prompt, and the value of its images where there are none."""
    if mentions.task in OTHER_TASKS:
        return (), 0.0
    subjects = mentions.attributes or mentions.nouns
    return tuple(f"{subject}?" for subject in subjects), 1.0
