"""Pairs of tokens by similarity, against a loop over all of them."""

from __future__ import annotations

import math

import pytest
import torch

from stage.diagnostics.conflict import conflict_by_similarity

EDGES = (-1.0, -0.5, 0.0, 0.5, 1.0)


def test_two_samples_by_hand() -> None:
    """Three positions: the same token, a right angle and opposite codes; the advantages are opposed."""
    codes = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]])[None]
    tokens = torch.tensor([[[5, 1, 2], [5, 3, 4]]])
    found = conflict_by_similarity(torch.tensor([[1.0, -0.5]]), codes, tokens, EDGES)
    assert found.pairs.tolist() == [1, 0, 1, 1] and found.opposed.tolist() == [1, 0, 1, 1]
    assert (found.same, found.same_opposed, found.total) == (1, 1, 3)
    alike = conflict_by_similarity(torch.tensor([[1.0, 0.5]]), codes, tokens, EDGES)
    assert alike.opposed.tolist() == [0, 0, 0, 0] and alike.same_opposed == 0
    assert math.isnan(alike.share[1]) and alike.share[3] == 0


def test_an_advantage_of_zero_opposes_nothing() -> None:
    codes = torch.ones(1, 2, 1, 2)
    found = conflict_by_similarity(
        torch.tensor([[0.0, -1.0]]), codes, torch.zeros(1, 2, 1, dtype=torch.long), EDGES
    )
    assert found.same == 1 and found.same_opposed == 0


def test_against_a_loop() -> None:
    torch.manual_seed(3)
    prompts, group, length = 3, 5, 7
    codes = torch.randn(prompts, group, length, 4)
    tokens = torch.randint(0, 3, (prompts, group, length))
    advantages = torch.randn(prompts, group)
    found = conflict_by_similarity(advantages, codes, tokens, EDGES)
    pairs, opposed, same, same_opposed = [0] * 4, [0] * 4, 0, 0
    for p in range(prompts):
        for i in range(group):
            for j in range(i):
                against = advantages[p, i].item() * advantages[p, j].item() < 0
                for t in range(length):
                    a, b = codes[p, i, t].double(), codes[p, j, t].double()
                    value = float(a @ b / (a.norm() * b.norm()))
                    place = min(int((value + 1) / 0.5), 3)
                    pairs[place] += 1
                    opposed[place] += against
                    equal = bool(tokens[p, i, t] == tokens[p, j, t])
                    same, same_opposed = same + equal, same_opposed + (equal and against)
    assert found.pairs.tolist() == pairs and found.opposed.tolist() == opposed
    assert (found.same, found.same_opposed) == (same, same_opposed)
    assert found.total == prompts * length * group * (group - 1) // 2


@pytest.mark.parametrize("edges", [(-1.0, 0.0), (0.0, 1.0), (-1.0, 0.5, 0.5, 1.0), (1.0,)])
def test_edges_must_ascend_from_end_to_end(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="edges must ascend from -1 to 1"):
        conflict_by_similarity(torch.zeros(1, 2), torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1), edges)
