"""Models for measuring have the published shapes and run through the policy's own path."""

from __future__ import annotations

import pytest
import torch
from transformers import JanusForConditionalGeneration

from stage.speed.models import PROMPT_TOKENS, build_policy, model_config, speed_prompts


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "intermediate"), [("1b", 24, 2048, 5632), ("7b", 30, 4096, 11008)]
)
def test_published_sizes(size: str, layers: int, hidden: int, intermediate: int) -> None:
    """Weights read a token: in each layer four square matrices and three of the feed-forward part, and two norms."""
    with torch.device("meta"):
        model = JanusForConditionalGeneration(model_config(size))
    counted = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    assert counted == layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden)
    assert model.model.generation_head.vision_head.weight.shape == (16384, hidden)
    assert model.model.vqmodel.quantize.quant_state_dims == [24, 24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_scores(dtype: torch.dtype) -> None:
    policy = build_policy("tiny", "cpu", dtype)
    assert {parameter.dtype for parameter in policy.parameters()} == {dtype}
    assert policy.language_model.rotary_emb.inv_freq.dtype == torch.float32
    prompt = policy.tokenize(speed_prompts(3))
    assert prompt.ids.shape == (3, PROMPT_TOKENS) and bool(prompt.mask.all())
    assert len(prompt.ids.unique(dim=0)) == 3
    tokens = torch.randint(policy.codebook_size, (3, 2, policy.num_image_tokens))
    with torch.no_grad():
        scores = policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    assert bool(scores.logps.isfinite().all()) and scores.logps.std() > 1e-3


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="must be one of tiny, 1b, 7b"):
        build_policy("3b", "cpu", torch.float32)
