"""Prompt, plan and sign for pretraining, drawn as tensors.

Some letters of the corpus are wrong on purpose, for the reason given in `stage.shapes.corpus`: a model of it misspells,
and that is the room reinforcement learning has. Colours and row are never wrong: a picture always follows its plan in
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stage.shapes.sign_prompts import FORMS, INSTRUCTION, WORDS, ask, plan, word_splits
from stage.shapes.signs import (
    BLANK,
    LETTERS,
    LONGEST,
    ROWS,
    SCHEMES,
    SHORTEST,
    contents,
    place,
    read,
    spell,
)
from stage.shapes.tiny import BOI, END, SPECIAL


@dataclass(frozen=True)
class Requests:
    """N signs to be made, on the CPU.

    asked, planned, shown int64 `[N, LONGEST]`: the word of the prompt, of the plan and of the picture; form, scheme,
    row int64 `[N]`: sentence of the prompt, colours and place of the word; thinks bool `[N]`: is there a plan?
    """

    asked: Tensor
    planned: Tensor
    shown: Tensor
    form: Tensor
    scheme: Tensor
    row: Tensor
    thinks: Tensor

    @classmethod
    def draw(cls, count: int, noise: float, faithful: bool, generator: torch.Generator) -> Requests:
        """Half of them with a plan; half of the words from the list, the others random letters.

        Args:
            noise: chance that a letter of the picture is another one than the prompt asks for. With a plan, half of
                these errors happen between prompt and plan, the others between plan and picture.
            faithful: pictures show their plan or, without one, their prompt to the letter; plans err as before.
        """

        def choice(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        asked, thinks = _words(count, generator), choice(2) == 0
        half = 1 - (1 - noise) ** 0.5
        planned = misspell(asked, half, generator)
        source = torch.where(thinks[:, None], planned, asked)
        wrong = torch.where(
            thinks[:, None], misspell(source, half, generator), misspell(source, noise, generator)
        )
        shown = source if faithful else wrong
        return cls(asked, planned, shown, choice(len(FORMS)), choice(len(SCHEMES)), choice(len(ROWS)), thinks)

    def texts(self) -> list[str]:
        """What the language model reads before the picture, image start token last."""
        asked, planned = read(self.asked), read(self.planned)
        form, scheme, row = self.form.tolist(), self.scheme.tolist(), self.row.tolist()
        return [
            ask(asked[i], form[i])
            + (f"{INSTRUCTION}{plan(planned[i], scheme[i], row[i])}{SPECIAL[END]}" if thinks else "")
            + SPECIAL[BOI]
            for i, thinks in enumerate(self.thinks.tolist())
        ]


def misspell(letters: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Replaces each letter of `letters` `[N, LONGEST]` by another one with the given chance.

    A word that would become a held-out one stays as it is.
    """
    wrong = (torch.rand(letters.shape, generator=generator) < chance) & (letters != BLANK)
    step = torch.randint(1, len(LETTERS), letters.shape, generator=generator)
    found = torch.where(wrong, (letters + step) % len(LETTERS), letters)
    return torch.where(held_out(found)[:, None], letters, found)


def held_out(letters: Tensor) -> Tensor:
    """bool `[N]`: is the word one of the held-out split?"""
    base = (BLANK + 1) ** torch.arange(LONGEST)
    return torch.isin((letters * base).sum(dim=1), (spell(word_splits()["heldout"]) * base).sum(dim=1))


def _words(count: int, generator: torch.Generator) -> Tensor:
    """Letters `[N, LONGEST]`: half from the list, half random, none of them held out."""
    known = word_splits()
    pool = spell(known["train"] + known["validation"])
    listed = pool[torch.randint(len(pool), (count,), generator=generator)]
    length = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=generator)
    free = torch.randint(len(LETTERS), (count, LONGEST), generator=generator)
    free = torch.where(torch.arange(LONGEST) < length, free, BLANK)
    keep = (torch.rand(count, generator=generator) < 0.5) | held_out(free)
    return torch.where(keep[:, None], listed, free)


@dataclass(frozen=True)
class Pages:
    """Requests as tokens, on the training device.

    ids int64 `[N, T]`, left-padded, from the begin token to the image start token; said bool `[N, T]`, the tokens of
    the plan and the end token after it; tokens int16 `[N, L]`, the picture.
    """

    ids: Tensor
    said: Tensor
    tokens: Tensor

    @classmethod
    def write(
        cls, requests: Requests, tokenizer: PreTrainedTokenizerFast, length: int, device: torch.device
    ) -> Pages:
        """With T = `length`. The codec has one code a content, so pictures need not be drawn to be encoded."""
        ids = tokenizer(
            requests.texts(), padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        glyph = place(requests.shown, requests.row)
        scheme = requests.scheme[:, None].expand_as(glyph)
        tokens = contents(glyph, scheme).to(torch.int16)
        return cls(ids.to(device), said(ids, tokenizer).to(device), tokens.to(device))


def said(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """bool `[N, T]`: what follows INSTRUCTION, without the image start token."""
    colon = tokenizer.encode(INSTRUCTION)[-1]
    after = (ids == colon).cumsum(dim=1).bool()
    return after & (ids != colon) & (ids != BOI)


def vocabulary_texts() -> list[str]:
    """Every word that prompts and plans are made of, for the tokenizer; no held-out word."""
    prompts = [ask(word, form) for word in WORDS[:8] for form in range(len(FORMS))]
    plans = [
        INSTRUCTION + plan(LETTERS[start : start + 2], scheme, row)
        for start in range(len(LETTERS) - 1)
        for scheme in range(len(SCHEMES))
        for row in range(len(ROWS))
    ]
    return prompts + plans
