"""A Llama of transformers run token by token over preallocated keys and values, in plain torch.

`run_layers` is the model, the same for every device; what differs is handed in: the products and norms (`Operations`)
and the attention with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel

from stage.policy.janus import JanusPolicy
from stage.policy.rollout_weights import Affine, RolloutWeights, VisitingWeights

Weights = RolloutWeights | VisitingWeights


class Operations(Protocol):
    """What a layer does besides attention. `hidden` `[M, D]` may be changed in place."""

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, affine: Affine) -> Tensor: ...

    def add_norm(self, hidden: Tensor, x: Tensor, affine: Affine, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden + affine(x), its RMSNorm)."""

    def gate(self, x: Tensor, affine: Affine) -> Tensor:
        """activation(first half) * second half of affine(x)."""


@dataclass(frozen=True)
class TorchOperations:
    """Plain torch. eps: of the norms. activation: of the gate."""

    eps: float
    activation: Callable[[Tensor], Tensor]

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.eps)

    def linear(self, x: Tensor, affine: Affine) -> Tensor:
        return F.linear(x, affine.weight, affine.bias)

    def add_norm(self, hidden: Tensor, x: Tensor, affine: Affine, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.addmm(hidden, x, affine.weight.t())
        if affine.bias is not None:
            hidden += affine.bias
        return hidden, self.norm(hidden, weight)

    def gate(self, x: Tensor, affine: Affine) -> Tensor:
        gate, up = self.linear(x, affine).chunk(2, -1)
        return self.activation(gate).mul_(up)


def torch_operations(model: LlamaModel) -> TorchOperations:
    """The operations of a model, with its epsilon and activation."""
    layer: Any = model.layers[0]
    return TorchOperations(model.norm.variance_epsilon, layer.mlp.act_fn)


def run_layers(
    weights: Weights, hidden: Tensor, attend: Callable[[int, Tensor], Tensor], operations: Operations
) -> Tensor:
    """Normalised last hidden states `[M, D]` of M tokens with embeddings `hidden` `[M, D]`.

    `attend(layer, qkv)` takes queries, keys and values `[M, (heads + 2 kv heads) D]` of a layer and returns
    `[M, heads * D]`.
    """
    layers: Sequence[Any] = weights.layers
    following = [*(layer.attention_norm for layer in layers[1:]), weights.norm]
    normed = operations.norm(hidden, layers[0].attention_norm)
    for index, layer in enumerate(layers):
        attended = attend(index, operations.linear(normed, layer.qkv))
        hidden, normed = operations.add_norm(hidden, attended, layer.out, layer.mlp_norm)
        inner = operations.gate(normed, layer.gate_up)
        hidden, normed = operations.add_norm(hidden, inner, layer.down, following[index])
    return normed


@dataclass(frozen=True)
class Prefixes:
    """The different prompt rows of a batch, each once, and which of them stands before each row of the batch.

    embeddings `[U, T, D]`; mask `[U, T]`, 1 on real tokens; positions `[U, T + steps]` of the prompt and the tokens
    after it; of_row `[R]` in [0, U); at_most: the number of prompt rows, whether different or not.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    of_row: Tensor
    at_most: int


def find_prefixes(
    ids: Tensor,
    embeddings: Tensor,
    mask: Tensor,
    position_ids: Callable[[Tensor], Tensor],
    group: int,
    steps: int,
) -> Prefixes:
    """Prefixes of prompt rows `[R, T]` that begin `group` samples each, with `steps` tokens to follow.

    Rows of the same ids under the same mask are one prefix: with prompts of one length that makes all unconditional
    rows one.
    """
    keys, of_row = torch.cat([ids, mask], 1).unique(dim=0, return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    # The last row with each key, by which the others are represented.
    found = rows.new_zeros(len(keys)).scatter_reduce(0, of_row, rows, "amax")
    positions = position_ids(F.pad(mask[found], (0, steps), value=1))
    return Prefixes(embeddings[found], mask[found], positions, of_row.repeat_interleave(group), len(ids))


def rope_table(model: LlamaModel, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[length, D]` by position, the first half of the sine negated.

    Rotation is x cos + swap(x) sin with the halves of x swapped, so the first half of sin carries the sign.
    """
    embedding: Tensor = model.embed_tokens.weight
    positions = torch.arange(length, device=embedding.device).unsqueeze(0)
    with torch.autocast(embedding.device.type, enabled=False):
        cos, sin = model.rotary_emb(embedding, positions)
    first, second = sin[0].chunk(2, -1)
    return cos[0].to(dtype), torch.cat([-first, second], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding along the last axis; `sin` has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Prefill:
    """Runs prompts through the layers and keeps their keys and values.

    Attributes:
        keys_values: a layer, `[U, T, 2, kv heads, D]`, rotated keys before values.
    """

    def __init__(self, model: LlamaModel, weights: Weights, prefixes: Prefixes) -> None:
        config: Any = model.config
        self.heads, self.kv_heads, self.size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.model, self.weights, self.prefixes = model, weights, prefixes
        self.scale: float = getattr(model.layers[0], "self_attn").scaling  # noqa: B009  a Module to mypy
        self.keys_values: list[Tensor] = []

    def run(self, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states `[U, D]` of the last token of each prefix, with `rope` by position."""
        rows, length, _ = self.prefixes.embeddings.shape
        mask, device = self.prefixes.mask.bool(), self.prefixes.mask.device
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        # Padding still attends to itself: a softmax over no key at all would be NaN.
        others = ~torch.eye(length, dtype=torch.bool, device=device)
        allowed = ~((later | ~mask[:, None, None]) & others)
        cos, sin = (part[self.prefixes.positions[:, :length]].unsqueeze(2) for part in rope)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            turned, values = self._split(qkv.view(rows, length, -1, self.size), cos, sin)
            keys = turned[:, :, self.heads :]
            self.keys_values.append(torch.stack([keys, values], 2))
            query, keys, values = (
                part.transpose(1, 2) for part in (turned[:, :, : self.heads], keys, values)
            )
            repeats = self.heads // self.kv_heads
            keys, values = (part.repeat_interleave(repeats, 1) for part in (keys, values))
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=self.scale)
            return out.transpose(1, 2).reshape(rows * length, -1)

        embeddings = self.prefixes.embeddings.to(self.weights.dtype).flatten(0, 1)
        hidden = run_layers(self.weights, embeddings, attend, torch_operations(self.model))
        return hidden.view(rows, length, -1)[:, -1]

    def _split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys beside each other, and values, of `[..., heads + 2 kv heads, D]`."""
        turned, values = qkv.split([self.heads + self.kv_heads, self.kv_heads], -2)
        return rotate(turned, cos, sin), values


def compute_dtype(policy: JanusPolicy) -> torch.dtype:
    """The type that scoring computes in: that of autocast where it is on, else that of the weights."""
    device = policy.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    weight: Tensor = policy.language_model.norm.weight
    return weight.dtype


def image_logits(policy: JanusPolicy, hidden: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Guided logits of hidden states, in their type; see `JanusPolicy.image_logits`."""
    with _in_type_of(hidden, policy.model.model.generation_head):
        return policy.image_logits(hidden, guidance_scale)


def text_logits(policy: JanusPolicy, hidden: Tensor) -> Tensor:
    """Logits over the text vocabulary `[..., W]` of hidden states `[..., D]`, in their type."""
    with _in_type_of(hidden, policy.model.lm_head):
        return policy.text_logits(hidden)


def _in_type_of(hidden: Tensor, head: nn.Module) -> torch.autocast:
    """Where weights are kept in a wider type than the sampler computes in, autocast narrows those of the head."""
    wider = next(head.parameters()).dtype != hidden.dtype
    return torch.autocast(hidden.device.type, hidden.dtype, enabled=wider, cache_enabled=False)


class CachedDecoder:
    """Decodes R rows in plain torch, each with a copy of its prefix in front of its own keys and values.

    Nothing of it is a module or a buffer: no checkpoint and no copy of a policy holds it.
    """

    def __init__(self, model: LlamaModel, weights: Weights, prefixes: Prefixes) -> None:
        self.prefill = Prefill(model, weights, prefixes)
        self.weights, self.prefixes = weights, prefixes
        self.operations = torch_operations(model)
        total = prefixes.positions.shape[1]
        self.filled = prefixes.mask.shape[1]
        self.table = rope_table(model, total, weights.dtype)
        self.caches: list[Tensor] = []  # a layer, [R, 2, kv heads, T + steps, D]
        self.rope: tuple[Tensor, Tensor]  # [R, steps, 1, D]
        self.bias: Tensor | None = None  # what hides padding, [R, 1, 1, T + steps]

    def start(self) -> Tensor:
        """Run the prefixes; returns the last hidden state of every row, `[R, D]`."""
        hidden = self.prefill.run(self.table)
        of_row, length = self.prefixes.of_row, self.filled
        total = self.prefixes.positions.shape[1]
        for found in self.prefill.keys_values:
            prompt = found.permute(0, 2, 3, 1, 4)[of_row]
            room = prompt.new_empty(*prompt.shape[:3], total, prompt.shape[4])
            room[:, :, :, :length] = prompt
            self.caches.append(room)
        self.prefill.keys_values.clear()
        later = self.prefixes.positions[:, length:]
        cos, sin = (part[later][of_row].unsqueeze(2) for part in self.table)
        self.rope = cos, sin
        if not bool(self.prefixes.mask.all()):
            hidden_ones = F.pad(~self.prefixes.mask.bool(), (0, total - length))[of_row, None, None]
            self.bias = torch.zeros_like(hidden_ones, dtype=self.weights.dtype).masked_fill_(
                hidden_ones, -torch.inf
            )
        return hidden[of_row]

    def step(self, embeddings: Tensor) -> Tensor:
        """Run the next token of every row, embeddings `[R, D]`; returns hidden states `[R, D]`."""
        shape = self.prefill
        at, end = self.filled, self.filled + 1
        cos, sin = (part[:, at - self.prefixes.mask.shape[1]] for part in self.rope)
        bias = None if self.bias is None else self.bias[..., :end]
        rows, repeats = len(embeddings), shape.heads // shape.kv_heads

        def attend(layer: int, qkv: Tensor) -> Tensor:
            turned, values = shape._split(qkv.view(rows, -1, shape.size), cos, sin)
            cache = self.caches[layer]
            cache[:, 0, :, at], cache[:, 1, :, at] = turned[:, shape.heads :], values
            # Query heads that share a key head become query positions of that head, so keys are never repeated.
            query = turned[:, : shape.heads].unflatten(1, (-1, repeats))
            keys, kept = cache[:, 0, :, :end], cache[:, 1, :, :end]
            out = F.scaled_dot_product_attention(query, keys, kept, attn_mask=bias, scale=shape.scale)
            return out.reshape(rows, -1)

        hidden = run_layers(self.weights, embeddings, attend, self.operations)
        self.filled = end
        return hidden
