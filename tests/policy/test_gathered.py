"""A sliced policy as the sampler reads it: the very numbers of whole weights, for as long as somebody draws."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stage.policy.gathered import Gathered
from stage.policy.janus import JanusPolicy
from stage.policy.lora import add_lora, merged_weight
from stage.policy.rollout_weights import Affine, RolloutWeights, VisitingWeights, whole
from stage.policy.sampler import Sampler, uniforms
from stage.policy.sharded import shard
from tests.policy.conftest import PROMPTS, load
from tests.policy.tiny_model import build_tiny_janus
from tests.processes import run
from tests.tiny_training import FROZEN

CPU = torch.device("cpu")
# 131 rows and 33 words are odd; biases and fewer key heads are other matrices.
ODD = {"intermediate_size": 131, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}


def sliced(base: Path, lora: bool, copied: bool = True) -> tuple[JanusPolicy, Gathered]:
    """A bfloat16 policy with float32 masters that bfloat16 does not hold exactly, over all processes."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(5)
    policy = load(base, FROZEN).to(torch.bfloat16)
    if lora:
        add_lora(policy, rank=3, alpha=6.0, targets=("q_proj", "o_proj", "down_proj"))
    gathered = Gathered(policy, torch.bfloat16, copied=copied)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard(policy, mesh, torch.bfloat16, offload=False, reshard_after_forward=True)
    stray(policy)
    return policy, gathered


def stray(policy: JanusPolicy) -> None:
    """Move what is trained, as an optimizer does."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 if "lora_B" in name else 0.01)


def one_by_one(policy: JanusPolicy) -> list[Tensor]:
    """The sampler's tensors in order, each parameter gathered by a collective of its own."""

    def weight(module: Any) -> Tensor:
        base = getattr(module, "base_layer", module).weight

        def read(parameter: Tensor) -> Tensor:
            return whole(parameter, torch.bfloat16 if parameter is base else torch.float32, CPU)

        return merged_weight(module, read)

    def affine(*modules: Any) -> list[Tensor]:
        plain = [getattr(module, "base_layer", module) for module in modules]
        weights, biases = [weight(module) for module in modules], [module.bias for module in plain]
        found = [torch.cat(weights)]
        return (
            found
            if biases[0] is None
            else [*found, torch.cat([whole(b, torch.bfloat16, CPU) for b in biases])]
        )

    found, layers = [], policy.language_model.layers
    for layer in layers:
        attention, mlp = getattr(layer, "self_attn"), getattr(layer, "mlp")  # noqa: B009
        found += [whole(getattr(layer, "input_layernorm").weight, torch.bfloat16, CPU)]  # noqa: B009
        found += affine(attention.q_proj, attention.k_proj, attention.v_proj) + affine(attention.o_proj)
        found += [whole(getattr(layer, "post_attention_layernorm").weight, torch.bfloat16, CPU)]  # noqa: B009
        found += affine(mlp.gate_proj, mlp.up_proj) + affine(mlp.down_proj)
    return [*found, whole(policy.language_model.norm.weight, torch.bfloat16, CPU)]


def tensors_of(weights: RolloutWeights | VisitingWeights) -> list[Tensor]:
    """In the same order."""
    found = []
    for layer in weights.layers:
        for part in (layer.attention_norm, layer.qkv, layer.out, layer.mlp_norm, layer.gate_up, layer.down):
            found += [each for each in part if each is not None] if isinstance(part, Affine) else [part]
    return [*found, weights.norm]


def _bits(base: Path, lora: bool) -> dict[str, bool]:
    policy, gathered = sliced(base, lora)
    found: dict[str, bool] = {}
    for step in range(2):
        with torch.no_grad():
            expected = one_by_one(policy)
        with gathered.filled() as lent:
            tensors = tensors_of(lent.rollout_weights)
            assert len(tensors) == len(expected)
            found[f"copy {step}"] = all(map(torch.equal, tensors, expected))
            words = policy.get_parameter("model.model.language_model.embed_tokens.weight")
            mine = lent.language_model.embed_tokens.weight
            found[f"words {step}"] = torch.equal(mine, whole(words, torch.bfloat16, CPU))
        visiting = VisitingWeights(gathered.policy.language_model, torch.bfloat16)
        with torch.no_grad():
            found[f"layers {step}"] = all(map(torch.equal, tensors_of(visiting), expected))
        stray(policy)
    # A forward without a backward leaves the outermost weights whole, which must not be taken for the sampler's own.
    prompt, tokens = (
        policy.tokenize(PROMPTS[:1]),
        torch.zeros(1, 2, policy.num_image_tokens, dtype=torch.long),
    )
    with torch.no_grad():
        policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    found["left whole"] = lora or not isinstance(policy.language_model.norm.weight, DTensor)
    with gathered.filled() as lent:
        found["sliced again"] = lora or isinstance(policy.language_model.norm.weight, DTensor)
        with torch.no_grad():
            expected = one_by_one(policy)
        found["after a forward"] = all(map(torch.equal, tensors_of(lent.rollout_weights), expected))
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_copy_has_the_bits_of_parameters_gathered_one_by_one(lora: bool, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    base = build_tiny_janus(tmp_path / "janus", **ODD)
    for found in run(2, tmp_path / "results", _bits, base, lora):
        assert len(found) == 9 and all(found.values()), found


def _lives(base: Path) -> dict[str, Any]:
    policy, gathered = sliced(base, lora=False)
    collective, count = dist.all_gather_into_tensor, [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return collective(*arguments, **options)

    dist.all_gather_into_tensor = counted
    sampler, draws = Sampler(2.0, 1.0), uniforms(7, 0, range(2), 2, policy.num_image_tokens)
    gc.collect()
    gc.disable()  # what only a search for cycles finds would pile up, a model a rollout
    found: dict[str, Any] = {"meetings": [], "tokens": []}

    def draw() -> None:
        count[0] = 0
        with gathered.filled() as lent:
            found["tokens"].append(sampler(lent, lent.tokenize(PROMPTS[:2]), draws).tokens)
        found["meetings"].append(count[0])

    draw()
    copy = weakref.ref(gathered.policy.rollout_weights)
    draw()
    found["shared"] = gathered.policy.rollout_weights is copy()
    stray(policy)
    draw()
    found["one alone"] = copy() is None
    copy = weakref.ref(gathered.policy.rollout_weights)
    with gathered.filled():
        gathered.release()
        found["kept while somebody draws"] = copy() is not None
    gathered.release()
    found["gone"] = copy() is None and all(mine.numel() == 0 for _, mine in gathered._own)
    draw()
    gc.enable()
    return found


def test_a_copy_serves_all_who_draw_from_the_same_weights_and_then_is_gone(tmp_path: Path) -> None:
    """Two layers and what is outside of them are three meetings, whenever weights have moved or were given back."""
    base = build_tiny_janus(tmp_path / "janus")
    for found in run(2, tmp_path / "results", _lives, base):
        assert found["meetings"] == [3, 0, 3, 3]
        assert found["shared"] and found["one alone"] and found["kept while somebody draws"] and found["gone"]
        first, again, moved, last = found["tokens"]
        assert torch.equal(first, again) and torch.equal(moved, last) and not torch.equal(first, moved)
