"""An adapter changes what it should, is gone when it is off, and merges into the weight it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.lora import (
    AdaptersOff,
    Lora,
    NoAdapter,
    adapters_off,
    add_lora,
    has_adapters,
    merged_weight,
)
from stage.types import TokenScores
from tests.policy.conftest import PLAIN, PROMPTS, load

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")

ATTENTION = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def adapted(path: Path, targets: tuple[str, ...] = ATTENTION + MLP) -> JanusPolicy:
    """A policy whose adapters are not zero."""
    policy = load(path)
    add_lora(policy, rank=3, alpha=6.0, targets=targets)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return policy


def score(policy: Any, base: JanusPolicy) -> TokenScores:
    tokens = torch.arange(4 * 2 * 16).view(4, 2, 16) % base.codebook_size
    return policy(base.tokenize(PROMPTS), tokens, guidance_scale=1.0, temperature=1.0)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    before = score(policy, policy).logps
    add_lora(policy, rank=4, alpha=8.0, targets=ATTENTION)
    assert has_adapters(policy)
    torch.testing.assert_close(score(policy, policy).logps, before, rtol=0, atol=0)
    trained = {name: p.shape for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # two layers, two targets, A and B
    assert all("language_model" in name and "lora_" in name for name in trained)


def test_the_vision_tower_has_layers_of_the_same_name_and_no_adapter(random_checkpoint: Path) -> None:
    policy = adapted(random_checkpoint)
    vision: Any = policy.model.model.vision_model
    assert hasattr(vision.encoder.layers[0].self_attn, "q_proj")
    assert not has_adapters(vision)


def test_off_is_the_base_and_gradients_come_back(random_checkpoint: Path) -> None:
    base, policy = load(random_checkpoint), adapted(random_checkpoint)
    expected = score(base, base).logps
    assert (score(policy, policy).logps - expected).abs().max() > 0.1
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    with adapters_off(policy):
        with adapters_off(policy):
            torch.testing.assert_close(score(policy, policy).logps, expected, rtol=0, atol=0)
        torch.testing.assert_close(score(policy, policy).logps, expected, rtol=0, atol=0)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    policy.requires_grad_(False)
    with adapters_off(policy):
        pass
    assert not any(p.requires_grad for p in policy.parameters())


def test_an_error_inside_turns_the_adapters_on_again(random_checkpoint: Path) -> None:
    policy = adapted(random_checkpoint)
    before = score(policy, policy).logps
    with pytest.raises(KeyError), adapters_off(policy):
        raise KeyError
    torch.testing.assert_close(score(policy, policy).logps, before, rtol=0, atol=0)


def test_the_reference_view(random_checkpoint: Path) -> None:
    base, policy = load(random_checkpoint), adapted(random_checkpoint)
    view = AdaptersOff(policy).to("cpu").eval().requires_grad_(False)
    scores = score(view, policy)
    torch.testing.assert_close(scores.logps, score(base, base).logps, rtol=0, atol=0)
    assert not scores.logps.requires_grad and score(policy, policy).logps.requires_grad
    assert not list(view.parameters()) and not view.state_dict()
    with pytest.raises(ValueError, match="needs a policy with adapters"):
        AdaptersOff(base)


def test_the_merged_weight_is_the_sum(random_checkpoint: Path) -> None:
    policy = adapted(random_checkpoint)
    block: Any = policy.language_model.layers[1]
    layer = block.mlp.down_proj
    weight, first, second = (
        part.weight.double() for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    expected = weight.clone()
    for row in range(weight.shape[0]):
        for rank in range(3):  # alpha / rank is 2
            expected[row] += 2 * second[row, rank] * first[rank]
    torch.testing.assert_close(merged_weight(layer).double(), expected, rtol=0, atol=1e-5)
    inputs = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(inputs @ merged_weight(layer).T, layer(inputs), rtol=0, atol=1e-4)
    with adapters_off(policy):
        assert merged_weight(layer) is layer.base_layer.weight
    plain = block.self_attn.k_proj
    assert merged_weight(plain) is plain.weight


def test_the_adapter_of_a_bfloat16_model_is_float32(random_checkpoint: Path) -> None:
    policy = load_policy(
        str(random_checkpoint),
        PLAIN,
        "bfloat16",
        (),
        True,
        Lora(rank=2, alpha=2.0, dropout=0, targets=["q_proj"]),
    )
    block: Any = policy.language_model.layers[0]
    layer = block.self_attn.q_proj
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert merged_weight(layer).dtype == torch.bfloat16
    score(policy, policy).logps.sum().backward()
    gradient = layer.lora_B["default"].weight.grad
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"alpha": 0.0}, "positive alpha"),
        ({"dropout": 0.1}, "no dropout"),
        ({"targets": []}, "got none"),
        ({"targets": ["q_proj", "fc1"]}, "got q_proj, fc1"),
    ],
)
def test_what_is_no_adapter(changes: dict[str, Any], message: str, policy: JanusPolicy) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**{"rank": 2, "alpha": 2.0, "dropout": 0, "targets": ["q_proj"], **changes})(policy)
    assert not has_adapters(policy)


def test_one_adapter_a_policy(policy: JanusPolicy) -> None:
    NoAdapter()(policy)
    add_lora(policy, rank=2, alpha=2.0, targets=["q_proj"])
    with pytest.raises(ValueError, match="one adapter"):
        add_lora(policy, rank=2, alpha=2.0, targets=["q_proj"])
