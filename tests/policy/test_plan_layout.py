"""Rows of prompt, plan and image start token, by hand."""

from __future__ import annotations

import torch

from stage.policy.plan_layout import append_plans, before_plans
from stage.types import Plans, PromptTokens


def test_rows_have_no_gap_and_end_in_the_start_token() -> None:
    """bos 1, words 7 8, end 2, image start 4, padding 0: prompts of 2 and 1 words, plans of 1 and 3, 2 and 1 tokens."""
    prompt = PromptTokens(
        ids=torch.tensor([[1, 7, 8], [0, 1, 7]]),
        unconditional_ids=torch.tensor([[1, 0, 0], [0, 1, 0]]),
        mask=torch.tensor([[1, 1, 1], [0, 1, 1]]),
    )
    tokens = torch.tensor([[[2, 0, 0, 0], [5, 1, 4, 0]], [[6, 2, 0, 0], [2, 0, 0, 0]]])
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 1, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]])
    rows = append_plans(prompt, Plans(tokens, mask, torch.zeros(2, 2, 4)), start=4, pad=0)
    assert rows.ids.tolist() == [
        [0, 0, 1, 7, 8, 2, 4],
        [1, 7, 8, 5, 1, 4, 4],
        [0, 0, 1, 7, 6, 2, 4],
        [0, 0, 0, 1, 7, 2, 4],
    ]
    # A bos or image start token inside a plan is a word like any other: the free rows do not keep it.
    assert rows.unconditional_ids.tolist() == [
        [0, 0, 1, 0, 0, 0, 4],
        [1, 0, 0, 0, 0, 0, 4],
        [0, 0, 1, 0, 0, 0, 4],
        [0, 0, 0, 1, 0, 0, 4],
    ]
    assert rows.mask.tolist() == [
        [0, 0, 1, 1, 1, 1, 1],
        [1] * 7,
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1],
    ]
    row, column = before_plans(mask.flatten(0, 1).bool(), 7)
    assert row.tolist() == [0, 1, 1, 1, 2, 2, 3]
    # The last word of the prompt predicts the first of the plan, and so on.
    assert column.tolist() == [4, 2, 3, 4, 3, 4, 4]
    assert torch.equal(rows.ids[row, column + 1], tokens.flatten(0, 1)[mask.flatten(0, 1).bool()])
