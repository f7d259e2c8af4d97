"""The sampler's copy of the weights: fused rows, shared storage where nothing is to be done, always those of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stage.policy.decoder import compute_dtype, find_prefixes, rope_table, rotate
from stage.policy.janus import JanusPolicy
from stage.policy.lora import add_lora
from stage.policy.rollout_weights import RolloutWeights
from stage.policy.sampler import Sampler, uniforms
from tests.policy.conftest import PROMPTS, load
from tests.policy.reference import tolerance
from tests.policy.tiny_model import build_tiny_janus


def test_fused_rows(tmp_path: Path) -> None:
    """One product with the fused matrix is the products with its parts, biases included."""
    biased = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    policy = load(build_tiny_janus(tmp_path, **biased))
    weights, x = RolloutWeights(policy.language_model, torch.float32), torch.randn(3, 64)
    modules: Any = policy.language_model.layers
    for layer, module in zip(weights.layers, modules, strict=True):
        attention, mlp = module.self_attn, module.mlp
        wanted = torch.cat([part(x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
        torch.testing.assert_close(F.linear(x, *layer.qkv), wanted)
        wanted = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)
        torch.testing.assert_close(F.linear(x, *layer.gate_up), wanted)
        assert layer.out.weight.data_ptr() == attention.o_proj.weight.data_ptr()
        assert layer.down.bias is not None and torch.equal(layer.down.bias, mlp.down_proj.bias)


def test_refresh(policy: JanusPolicy) -> None:
    """Values follow an optimizer's step in the same storage; a parameter that was replaced is noticed."""
    model: Any = policy.language_model
    weights = RolloutWeights(model, torch.float32)
    attention, layer = model.layers[1].self_attn, weights.layers[1]
    places = [entry.tensor.data_ptr() for group in weights._groups for entry in group]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(layer.qkv.weight[:64], attention.q_proj.weight)
    assert weights.refresh()
    assert torch.equal(layer.qkv.weight[:64], attention.q_proj.weight)
    assert torch.equal(layer.out.weight, attention.o_proj.weight)
    assert torch.equal(weights.norm, model.norm.weight)
    assert places == [entry.tensor.data_ptr() for group in weights._groups for entry in group]
    attention.o_proj.weight.data = attention.o_proj.weight.data.clone()
    assert not weights.refresh()


def test_another_type(policy: JanusPolicy) -> None:
    """Nothing is shared with parameters of another type, so an optimizer's step must be copied."""
    model = policy.language_model
    weights = RolloutWeights(model, torch.bfloat16)
    assert {entry.tensor.dtype for group in weights._groups for entry in group} == {torch.bfloat16}
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    assert weights.norm[0] != 3 and weights.refresh() and (weights.norm == 3).all()


def test_adapters_are_merged(policy: JanusPolicy) -> None:
    """A step on the adapters changes samples; their log-probabilities are those of a replay with adapters."""
    add_lora(policy, rank=2, alpha=4.0, targets=("q_proj", "o_proj", "down_proj"))
    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "lora_B")]
    attention: Any = policy.language_model.layers[0].self_attn
    assert len(layers) == 6
    weights = RolloutWeights(policy.language_model, torch.float32)
    sampler, prompt = Sampler(3.0, 1.0), policy.tokenize(PROMPTS)
    draws, seen = uniforms(7, 0, range(4), 2, policy.num_image_tokens), []
    for step in range(2):
        for module in layers:
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3 * step)
        assert weights.refresh()  # merged into storage of its own, so nothing shared has moved
        base = attention.o_proj.base_layer.weight
        assert torch.equal(weights.layers[0].out.weight, base) is (step == 0)
        samples = sampler(policy, prompt, draws)
        with torch.no_grad():
            scores = policy.score(prompt, samples.tokens, guidance_scale=3.0, temperature=1.0)
        torch.testing.assert_close(samples.logps, scores.logps, **tolerance(5.0))
        seen.append(samples)
    assert not torch.equal(seen[0].tokens, seen[1].tokens)


def test_the_type_of_autocast(policy: JanusPolicy) -> None:
    """Under autocast the sampler computes as scoring does: in bfloat16 from float32 weights, the head included."""
    prompt, draws = policy.tokenize(PROMPTS), uniforms(7, 0, range(4), 2, policy.num_image_tokens)
    assert compute_dtype(policy) == torch.float32
    exact = Sampler(2.0, 1.0)(policy, prompt, draws)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compute_dtype(policy) == torch.bfloat16
        narrow = Sampler(2.0, 1.0)(policy, prompt, draws)
        replayed = policy.score(prompt, narrow.tokens, guidance_scale=2.0, temperature=1.0)
    assert not torch.equal(exact.logps, narrow.logps)
    assert (narrow.logps - replayed.logps).abs().mean() < 0.1


def test_prefixes_are_found_once(policy: JanusPolicy) -> None:
    """Rows with the same tokens under the same mask share a prefix; each row of the batch gets its own prompt back."""
    prompt = policy.tokenize([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]])
    embeddings, mask = policy.prompt_rows(prompt, 2.0)
    ids = torch.cat([prompt.ids, prompt.unconditional_ids])
    found = find_prefixes(ids, embeddings, mask, policy.position_ids, 3, 5)
    # Prompts 0 and 2 are of one length: conditional rows 0, 1, 2 and unconditional rows of two lengths.
    assert len(found.embeddings) == 5 and found.at_most == 8
    assert torch.equal(found.embeddings[found.of_row], embeddings.repeat_interleave(3, 0))
    assert torch.equal(found.mask[found.of_row], mask.repeat_interleave(3, 0))
    assert found.positions.shape == (5, ids.shape[1] + 5)
    assert torch.equal(found.positions[:, -1], found.mask.sum(1) + 4)


@pytest.mark.parametrize("position", [0, 3])
def test_rotation(policy: JanusPolicy, position: int) -> None:
    """Each pair (x_d, x_{d + D/2}) turns by the angle position / 10000^(2d/D), as a complex number."""
    cos, sin = rope_table(policy.language_model, 5, torch.float32)
    x = torch.randn(16)
    angle = position * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    turned = torch.complex(x[:8].double(), x[8:].double()) * torch.polar(torch.ones(8).double(), angle)
    wanted = torch.cat([turned.real, turned.imag]).float()
    torch.testing.assert_close(rotate(x, cos[position], sin[position]), wanted)
