"""A reference stays what the policy was, and shares what is never trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.policy.janus import JanusPolicy
from stage.policy.reference import frozen_reference, place_reference
from stage.types import TokenScores
from tests.policy.conftest import PROMPTS, load

FROZEN = ("vision_model", "aligner", "vqmodel", "generation_head", "language_model.embed_tokens")


def score(policy: Any, base: JanusPolicy) -> TokenScores:
    tokens = torch.arange(4 * 2 * 16, device=base.device).view(4, 2, 16) % base.codebook_size
    with torch.no_grad():
        return policy.score(base.tokenize(PROMPTS), tokens, guidance_scale=1.0, temperature=1.0)


def change(policy: JanusPolicy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def storages(module: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def test_a_copy_of_what_is_trained_around_what_is_not(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint, FROZEN)
    before = score(policy, policy)
    reference = frozen_reference(policy)
    assert not any(p.requires_grad for p in reference.parameters())
    assert any(p.requires_grad for p in policy.parameters())
    for (name, own), (_, other) in zip(policy.named_parameters(), reference.named_parameters(), strict=True):
        assert (own.data_ptr() == other.data_ptr()) == (not own.requires_grad), name
    change(policy)
    assert torch.equal(score(reference, policy).logps, before.logps)
    assert not torch.equal(score(policy, policy).logps, before.logps)


def test_shared_parameters_move_together(random_checkpoint: Path) -> None:
    """A change of type stands for a change of device: both assign new data to the same parameter."""
    policy = load(random_checkpoint, FROZEN)
    reference = frozen_reference(policy)
    policy.to(torch.bfloat16)
    types = {p.dtype for p in reference.parameters()}
    assert types == {torch.float32, torch.bfloat16}
    reference.to(torch.bfloat16)
    assert len(storages(policy) & storages(reference)) == sum(
        not p.requires_grad for p in policy.parameters()
    )


def test_adapters_need_no_second_model(random_checkpoint: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from stage.policy.lora import add_lora

    policy = load(random_checkpoint)
    before = score(policy, policy)
    add_lora(policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    reference = frozen_reference(policy)
    place_reference(reference, policy, torch.device("cpu"), layers_on_cpu=True)
    assert list(reference.parameters()) == []
    change(policy)
    assert torch.equal(score(reference, policy).logps, before.logps)
    assert not torch.equal(score(policy, policy).logps, before.logps)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="moving weights between devices needs a CUDA device"
)
def test_layers_on_the_cpu_visit_the_device(random_checkpoint: Path) -> None:
    device = torch.device("cuda")
    policy = load(random_checkpoint, FROZEN)
    reference, plain = frozen_reference(policy), copy.deepcopy(policy).to(device)
    policy.to(device)
    place_reference(reference, policy, device, layers_on_cpu=True)
    language_model: Any = reference.language_model
    layers = language_model.layers
    assert {p.device.type for p in layers.parameters()} == {"cpu"}
    for _ in range(2):
        torch.testing.assert_close(score(reference, policy).logps, score(plain, policy).logps)
    assert {p.device.type for p in layers.parameters()} == {"cpu"}


def test_placing_on_a_cpu_is_plain(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint, FROZEN)
    reference = frozen_reference(policy)
    before = score(reference, policy).logps
    place_reference(reference, policy, torch.device("cpu"), layers_on_cpu=True)
    assert torch.equal(score(reference, policy).logps, before)
