"""A measured step is a real one: it trains, its parts add up, and the plain step scores the same."""

from __future__ import annotations

import pytest
import torch

from stage.policy.lora import has_adapters
from stage.policy.sampler import Sampler
from stage.speed.models import build_policy, speed_prompts
from stage.speed.plain_step import pairwise_ranks, plain_scores, plain_steps
from stage.speed.rollout import plain_loop
from stage.speed.training import PARTS, RandomTokens, measure_step

CPU = torch.device("cpu")
COLUMNS = ("rollout_seconds", "reference_seconds", "policy_seconds", "update_seconds")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_trains_what_it_should(kind: str) -> None:
    if kind == "lora":
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    policy = build_policy("tiny", CPU, torch.bfloat16)
    step = measure_step(policy, kind, sampler=RandomTokens(), images=4, repeats=2)
    assert has_adapters(policy) == (kind == "lora")
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for _, p in trained)
    assert all("language_model" in name for name, _ in trained)
    assert set(step.seconds) == set(PARTS) and min(step.seconds.values()) > 0
    row = step.row("tiny", kind, 4)
    assert row["seconds"] == pytest.approx(sum(float(row[name]) for name in COLUMNS))


def test_a_step_with_its_rollout() -> None:
    policy = build_policy("tiny", CPU, torch.float32)
    step = measure_step(policy, "full", sampler=Sampler(5.0, 1.0), images=2, repeats=1)
    assert step.seconds["sample"] > 0


def test_an_unknown_kind_is_an_error() -> None:
    policy = build_policy("tiny", CPU, torch.float32)
    with pytest.raises(ValueError, match="lora or full; got 'half'"):
        measure_step(policy, "half", sampler=RandomTokens(), images=4, repeats=1)


def test_the_plain_step_scores_what_the_policy_scores() -> None:
    policy = build_policy("tiny", CPU, torch.float32)
    prompt = policy.tokenize(speed_prompts(1))
    drawn, _ = plain_loop(policy, prompt, 3, policy.num_image_tokens)
    tokens = drawn.unsqueeze(0)
    with torch.no_grad():
        logps, entropy = plain_scores(policy, prompt, tokens)
        scores = policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    torch.testing.assert_close(logps, scores.logps[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, scores.entropy[0], atol=1e-5, rtol=0)
    for row in plain_steps(policy, 2, 1):
        assert row["seconds"] == pytest.approx(sum(float(row[name]) for name in COLUMNS[:3]))


def test_ranks_of_the_release() -> None:
    """Two samples of one token: 5 is sample 0's second best and not among sample 1's; 7 is the best of both."""
    best = torch.tensor([[[7, 5]], [[7, 2]]])
    assert pairwise_ranks(best, torch.tensor([[5], [7]])).tolist() == [[[1], [0]], [[-1], [0]]]
