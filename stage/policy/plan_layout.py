"""Where a plan stands in a row: behind the prompt, in front of the image start token, without a gap."""

from __future__ import annotations

import torch
from torch import Tensor

from stage.types import Plans, PromptTokens


def append_plans(prompt: PromptTokens, plans: Plans, start: int, pad: int) -> PromptTokens:
    """Left-padded rows `[P * G, T']` of prompt, plan and the token `start`; T' is the longest of them.

    Args:
        prompt: left-padded, `[P, T]`, ending where the plans begin.
        plans: `[P, G, R]`.
        start: image start token. pad: padding token, which replaces the plan in the unconditional rows, under the
            mask of the conditional ones.
    """
    group = plans.tokens.shape[1]
    tokens, mask = plans.tokens.flatten(0, 1), plans.mask.flatten(0, 1)
    last = torch.full_like(tokens[:, :1], start)
    ids = torch.cat([prompt.ids.repeat_interleave(group, 0), tokens, last], dim=1)
    free = torch.cat(
        [prompt.unconditional_ids.repeat_interleave(group, 0), torch.full_like(tokens, pad), last], dim=1
    )
    mask = torch.cat([prompt.mask.repeat_interleave(group, 0), mask, torch.ones_like(last)], dim=1)
    order = mask.argsort(dim=1, stable=True)  # padding first, then the real tokens as they came
    order = order[:, -int(mask.sum(1).max()) :]
    return PromptTokens(ids.gather(1, order), free.gather(1, order), mask.gather(1, order))


def before_plans(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(row, column), each `[n]`, of the hidden states that predict the n real tokens of plans, row by row.

    Args:
        mask: bool `[P * G, R]` of the plans.
        width: T' of the rows that `append_plans` made of them.
    """
    # The last column is the image start token; the plan ends before it, and a token is predicted by the one before.
    first = width - 2 - mask.sum(1, keepdim=True)
    columns = first + torch.arange(mask.shape[1], device=mask.device)
    row, place = mask.nonzero(as_tuple=True)
    return row, columns[row, place]
