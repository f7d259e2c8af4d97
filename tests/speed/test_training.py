"""A measured step is a real one: it trains, its parts add up, and the plain step scores the same."""

from __future__ import annotations

import pytest
import torch

from stage.policy.lora import has_adapters
from stage.speed.models import build_policy, speed_prompts
from stage.speed.plain_step import measure_plain_step, plain_rollout, plain_scores
from stage.speed.training import PARTS, RandomTokens, measure_step

CPU = torch.device("cpu")


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
    assert set(step.seconds) == {*PARTS, "total"} and min(step.seconds.values()) > 0
    assert step.seconds["total"] == pytest.approx(sum(step.seconds[part] for part in PARTS))
    assert step.row()["name"] == kind


def test_an_unknown_kind_is_an_error() -> None:
    policy = build_policy("tiny", CPU, torch.float32)
    with pytest.raises(ValueError, match="lora or full; got 'half'"):
        measure_step(policy, "half", sampler=RandomTokens(), images=4, repeats=1)


def test_the_plain_step_scores_what_the_policy_scores() -> None:
    policy = build_policy("tiny", CPU, torch.float32)
    prompt = policy.tokenize(speed_prompts(1))
    tokens = plain_rollout(policy, prompt, 3, policy.num_image_tokens)
    assert tokens.shape == (1, 3, policy.num_image_tokens)
    with torch.no_grad():
        logps, entropy = plain_scores(policy, prompt, tokens)
        scores = policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    torch.testing.assert_close(logps, scores.logps[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, scores.entropy[0], atol=1e-5, rtol=0)
    step = measure_plain_step(policy, images=2, timed_tokens=4)
    assert step.seconds["total"] == pytest.approx(
        sum(step.seconds[p] for p in ("sample", "reference", "policy"))
    )
