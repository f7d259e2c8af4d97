"""How much device memory a training run will take, part by part, counted before it starts.

Weights, reference, gradients, optimizer and caches are counted exactly; activations are what transformers' Llama keeps
for the backward pass, an estimate that `tests/test_memory.py` holds against what a small one really keeps. Letters:
rows of a forward pass N, tokens of a row S, hidden width D, width of the MLP I, bytes a number b. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import Tensor, nn

from stage.objective.logprobs import ROWS
from stage.policy.lora import has_adapters

SLACK = 1.05  # what an allocator needs beyond the tensors: rounding, gaps, workspaces of libraries
FLOAT = 4  # bytes of a float32 number, in which norms, adapters and logits are computed


class Reference(Enum):
    """Where the reference's weights are."""

    NONE = "none"  # neither KL nor entropy reward wants one
    SHARED = "adapters off"  # the policy's own
    COPY = "copy"  # a second set of all that is trained
    ON_CPU = "layers on the CPU"  # the same, but of the layers only one at a time


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a policy that memory depends on.

    weights: bytes of all parameters. trained: numbers that are trained, trained_bytes: their bytes. layer_trained:
    bytes of what is trained in one layer. adapted: whether it has adapters. rollout_copy: bytes of the weights that a
    sampler has in storage of its own. width: b of the base weights. kv_width: key-value heads times their width,
    head_width: query heads times theirs. head_trained: whether the last layer of the image head is trained.
    """

    weights: int
    trained: int
    trained_bytes: int
    layer_trained: int
    adapted: bool
    rollout_copy: int
    width: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_width: int
    kv_width: int
    codebook: int
    head_hidden: int
    head_trained: bool
    image_tokens: int


@dataclass(frozen=True)
class Workload:
    """What a run does with a policy.

    images: drawn at once, P times G. micro_batch: images a pass with gradient. prompt_tokens: T, a plan included.
    rollout_rows, scored_rows: rows an image in sampling and scoring, 2 with guidance, else 1. optimizer_bytes: what
    the optimizer keeps in all. full_attention: the kernel keeps its S x S scores (`eager`).
    """

    images: int
    micro_batch: int
    prompt_tokens: int
    rollout_rows: int
    scored_rows: int
    optimizer_bytes: int
    reference: Reference
    checkpointing: bool
    full_attention: bool


def memory_parts(shape: ModelShape, run: Workload) -> dict[str, int]:
    """Bytes of each part. That of the rollout is given back before the backward pass, and counted all the same."""
    return {
        "weights": shape.weights,
        "reference": _reference(shape, run.reference),
        "gradients": shape.trained_bytes,
        "optimizer": run.optimizer_bytes,
        "rollout": rollout_bytes(shape, run),
        "activations": activation_bytes(shape, run),
    }


def _reference(shape: ModelShape, reference: Reference) -> int:
    if reference in (Reference.NONE, Reference.SHARED):
        return 0
    waiting = (shape.layers - 1) * shape.layer_trained if reference is Reference.ON_CPU else 0
    return shape.trained_bytes - waiting


def rollout_bytes(shape: ModelShape, run: Workload) -> int:
    """Keys and values of all rows for T + L tokens, and the weights that the sampler joins or merges."""
    tokens = run.images * run.rollout_rows * (run.prompt_tokens + shape.image_tokens)
    return tokens * shape.layers * 2 * shape.kv_width * shape.width + shape.rollout_copy


def activation_bytes(shape: ModelShape, run: Workload) -> int:
    """What a pass of a micro-batch keeps for its backward, and the largest that the backward adds.

    With checkpointing that is the input of every layer and one layer in full; the backward of a layer makes
    gradients of about the size of what it kept.
    """
    rows = run.micro_batch * run.scored_rows
    length = run.prompt_tokens + shape.image_tokens - 1
    layer = layer_bytes(shape, rows, length, full_attention=run.full_attention)
    inputs = rows * length * shape.hidden * shape.width
    kept = shape.layers * inputs + layer if run.checkpointing else shape.layers * layer
    return kept + layer + _head_bytes(shape, run)


def layer_bytes(shape: ModelShape, rows: int, length: int, *, full_attention: bool) -> int:
    """What one decoder layer keeps for its backward pass.

    A token: inputs and roots of two norms in float32; queries, keys, values and attended values; three tensors of the
    MLP's width. Then the inputs of the seven matrices, and of the norms' weights, where these are trained; adapters
    keep a float32 copy of the input of each matrix instead.
    """
    b, hidden = shape.width, shape.hidden
    token = 2 * FLOAT * (hidden + 1) + FLOAT * shape.heads
    token += b * (2 * shape.head_width + 2 * shape.kv_width + 3 * shape.intermediate)
    inputs = 2 * hidden + shape.head_width + shape.intermediate
    if not shape.adapted:
        token += b * (inputs + 2 * hidden)
    elif b == FLOAT:
        token += FLOAT * inputs
    else:
        token += FLOAT * (
            inputs + 3 * hidden
        )  # q, k, v share one input, gate and up another, and copy it each
    scores = FLOAT if b == FLOAT else FLOAT + b
    return rows * length * token + (rows * shape.heads * length**2 * scores if full_attention else 0)


def _head_bytes(shape: ModelShape, run: Workload) -> int:
    """The image head: its inputs, three float32 chunks of logits, and the sum of a trained layer's gradient."""
    features = run.micro_batch * run.scored_rows * shape.image_tokens * shape.head_hidden * shape.width
    logits = min(ROWS, run.micro_batch * shape.image_tokens) * shape.codebook * FLOAT
    trained = shape.codebook * shape.head_hidden * FLOAT if shape.head_trained else 0
    return 4 * features + 3 * logits + trained


def remedies(shape: ModelShape, run: Workload) -> Iterator[tuple[str, int]]:
    """(settings, bytes in all under them): what makes a run smaller without changing its result, more and more."""
    settings: dict[str, object] = {}

    def text() -> str:
        return " ".join(f"{name}={value}" for name, value in settings.items())

    if not run.checkpointing:
        run, settings["model.gradient_checkpointing"] = replace(run, checkpointing=True), "true"
        yield text(), needed(shape, run)
    if run.reference is Reference.COPY:
        run, settings["reference_on_cpu"] = replace(run, reference=Reference.ON_CPU), "true"
        yield text(), needed(shape, run)
    while run.micro_batch > 1:
        run = replace(run, micro_batch=run.micro_batch // 2)
        settings["algorithm.micro_batch"] = run.micro_batch
        yield text(), needed(shape, run)


def needed(shape: ModelShape, run: Workload) -> int:
    """Bytes in all, with slack."""
    return round(SLACK * sum(memory_parts(shape, run).values()))


def shape_of(policy: Any) -> ModelShape:
    """The sizes of a policy; nothing is read but shapes and types."""
    config, trained = policy.language_model.config, [p for p in policy.parameters() if p.requires_grad]
    layers, last = policy.language_model.layers, policy.model.model.generation_head.vision_head
    return ModelShape(
        weights=_bytes(policy.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        trained_bytes=_bytes(trained),
        layer_trained=_bytes(p for p in layers[0].parameters() if p.requires_grad),
        adapted=has_adapters(policy),
        rollout_copy=sum(_copied(layer) for layer in layers),
        width=last.weight.element_size(),
        layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        head_width=config.num_attention_heads * config.head_dim,
        kv_width=config.num_key_value_heads * config.head_dim,
        codebook=policy.codebook_size,
        head_hidden=last.weight.shape[1],
        head_trained=last.weight.requires_grad,
        image_tokens=policy.num_image_tokens,
    )


def _copied(layer: Any) -> int:
    """Bytes of a layer that `stage.policy.rollout_weights` copies: joined matrices, and whatever has an adapter."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    merged = (linear for linear in (attention.o_proj, mlp.down_proj) if hasattr(linear, "lora_A"))
    return _bytes(getattr(linear, "base_layer", linear).weight for linear in (*joined, *merged))


def _bytes(tensors: Iterator[nn.Parameter] | list[nn.Parameter] | Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
