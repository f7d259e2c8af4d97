"""Memory counted before a run: by hand for the published sizes, and against the tensors of a small model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.memory import (
    ModelShape,
    Reference,
    Workload,
    activation_bytes,
    layer_bytes,
    memory_parts,
    needed,
    remedies,
    rollout_bytes,
    shape_of,
)
from stage.optimizer import MasterAdamW, state_bytes
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.lora import add_lora
from stage.policy.reference import frozen_reference
from stage.policy.template import Template
from stage.speed.models import build_policy
from stage.speed.training import FROZEN, LORA
from tests.policy.tiny_model import build_tiny_janus
from tests.tiny_training import tiny_base, tiny_policy

ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
RUN = Workload(
    images=8,
    micro_batch=8,
    prompt_tokens=24,
    rollout_rows=2,
    scored_rows=1,
    optimizer_bytes=0,
    reference=Reference.COPY,
    checkpointing=True,
    full_attention=False,
)


def published(size: str) -> ModelShape:
    """A published model without memory, frozen as the release freezes it."""
    policy = build_policy(size, "meta", torch.bfloat16)
    policy.freeze(FROZEN)
    return shape_of(policy)


def test_janus_pro_7b_by_hand() -> None:
    """30 layers of 4096 and 11008: 4 * 4096^2 + 3 * 4096 * 11008 + 2 * 4096 = 202,383,360 numbers each."""
    shape = published("7b")
    trained = 30 * 202_383_360 + 102_400 * 4096 + 4096  # layers, text embeddings, last norm: 6,490,935,296
    assert (shape.trained, shape.trained_bytes) == (trained, 2 * trained)
    parts = memory_parts(shape, replace(RUN, optimizer_bytes=12 * shape.trained))
    assert parts["gradients"] == parts["reference"] == 12_981_870_592
    assert parts["optimizer"] == 77_891_223_552
    assert 14.5e9 < parts["weights"] < 15e9
    # 8 images, guided: 16 rows of 600 tokens, 30 layers, keys and values of 4096 numbers of 2 bytes; and a copy of
    # query, key, value, gate and up
    copy = 30 * (3 * 4096**2 + 2 * 4096 * 11008) * 2
    assert parts["rollout"] == 16 * 600 * 30 * 2 * 4096 * 2 + copy
    # 8 rows of 599 tokens are 4792. A layer's input is 8192 bytes a token. A whole layer: norms 8 * 4097, softmax
    # 4 * 32, q k v and attended 2 * 4 * 4096, MLP 2 * 3 * 11008, inputs 2 * (3 * 4096 + 11008), norm weights 2 * 8192
    token = 8 * 4097 + 4 * 32 + 2 * 4 * 4096 + 2 * 3 * 11008 + 2 * (3 * 4096 + 11008) + 2 * 8192
    head = 4 * 8 * 576 * 4096 * 2 + 3 * 1024 * 16384 * 4  # features, and three chunks of logits
    assert parts["activations"] == 4792 * (30 * 8192 + 2 * token) + head
    assert 133e9 < sum(parts.values()) < 137e9  # fits an H200, which has 150e9


def test_janus_pro_1b_by_hand() -> None:
    """24 layers of 2048 and 5632: 4 * 2048^2 + 3 * 2048 * 5632 + 2 * 2048 = 51,384,320 numbers each."""
    shape = published("1b")
    assert shape.trained == 24 * 51_384_320 + 102_400 * 2048 + 2048
    copy = 24 * (3 * 2048**2 + 2 * 2048 * 5632) * 2
    assert rollout_bytes(shape, RUN) == 16 * 600 * 24 * 2 * 2048 * 2 + copy
    assert shape.layer_trained == 2 * 51_384_320


def test_what_a_reference_takes() -> None:
    shape = published("1b")
    found = {where: memory_parts(shape, replace(RUN, reference=where))["reference"] for where in Reference}
    assert found[Reference.NONE] == found[Reference.SHARED] == 0
    # layers on the CPU: embeddings, last norm, and one layer at a time
    assert found[Reference.ON_CPU] == 2 * (102_400 * 2048 + 2048 + 51_384_320)


def test_adapters_are_merged_into_a_copy_of_every_matrix() -> None:
    """4 * 2048^2 + 3 * 2048 * 5632 numbers of 2 bytes in each of 24 layers; trained are A and B in float32."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    policy = build_policy("1b", "meta", torch.bfloat16)
    add_lora(policy, rank=4, alpha=4.0, targets=LORA["targets"])
    shape = shape_of(policy)
    assert shape.rollout_copy == 24 * (4 * 2048**2 + 3 * 2048 * 5632) * 2
    # a layer: q k v o of 2048 + 2048, gate and up of 2048 + 5632, down of 5632 + 2048, times the rank
    assert shape.trained == 24 * 4 * (4 * 4096 + 3 * 7680)
    assert shape.trained_bytes == 4 * shape.trained


def small(folder: Path, dtype: str, layers: int, lora: bool, attention: str) -> JanusPolicy:
    path = build_tiny_janus(folder / f"{layers}", layers=layers)
    frozen = ("vision_model", "aligner", "vqmodel")
    policy = load_policy(str(path), Template("plain", "", ""), dtype, frozen, False, attention=attention)
    if lora:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
        add_lora(policy, rank=1, alpha=1.0, targets=LORA["targets"])
    return policy


def kept_bytes(policy: JanusPolicy) -> tuple[int, int]:
    """Bytes that the backward pass of 8 rows keeps beside the parameters, and the tokens of a row."""
    own = {parameter.data_ptr() for parameter in policy.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too, so that its memory is not used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    prompt, tokens = policy.tokenize(["red circle", "blue square"]), torch.zeros(2, 4, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    assert scores.logps.requires_grad
    return sum(size for size, _ in kept.values()), prompt.ids.shape[1] + 15


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_was_counted(tmp_path: Path, dtype: str, lora: bool, attention: str) -> None:
    """The difference between a model of three layers and one of one, halved; counted to six in a hundred."""
    few, many = (small(tmp_path, dtype, layers, lora, attention) for layers in (1, 3))
    (less, length), (more, _) = kept_bytes(few), kept_bytes(many)
    counted = layer_bytes(shape_of(few), 8, length, full_attention=attention == "eager")
    assert counted == pytest.approx((more - less) / 2, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_optimizer_and_reference_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    policy = tiny_policy(tiny_base(tmp_path)).to(dtype)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    shape, reference = shape_of(policy), frozen_reference(policy)
    make: Any = partial(MasterAdamW, **ADAM)
    run = replace(RUN, optimizer_bytes=round(state_bytes(make, dtype) * shape.trained))
    optimizer = make(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts = memory_parts(shape, run)
    assert parts["weights"] == sum(parameter.nbytes for parameter in policy.parameters())
    assert parts["gradients"] == sum(parameter.nbytes for parameter in trained)
    state = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    assert parts["optimizer"] == sum(value.nbytes for value in state)
    shared = {parameter.data_ptr() for parameter in policy.parameters()}
    assert parts["reference"] == sum(p.nbytes for p in reference.parameters() if p.data_ptr() not in shared)


def test_remedies_make_a_run_smaller_step_by_step() -> None:
    shape, run = published("1b"), replace(RUN, checkpointing=False)
    settings, sizes = zip(*remedies(shape, run), strict=True)
    before = "model.gradient_checkpointing=true reference_on_cpu=true"
    assert settings == (
        "model.gradient_checkpointing=true",
        before,
        *(f"{before} algorithm.micro_batch={size}" for size in (4, 2, 1)),
    )
    assert [needed(shape, run), *sizes] == sorted([needed(shape, run), *sizes], reverse=True)
    assert activation_bytes(shape, replace(run, checkpointing=True)) < activation_bytes(shape, run)
