"""Decoding on CUDA: one graph holds a whole token, from the embedding of the last to the draw of the next.

All buffers have fixed addresses. The number of tokens so far is itself a number on the device, so one graph serves
every token of an image, and prompts of other lengths. Kernels read prefixes where they are, once for all rows that
share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage.policy import triton_decode
from stage.policy.decoder import (
    Prefill,
    Prefixes,
    TorchOperations,
    image_logits,
    rope_table,
    run_layers,
    torch_operations,
)
from stage.policy.graph_recorder import recorder
from stage.policy.janus import JanusPolicy
from stage.policy.rollout_weights import Affine, RolloutWeights, rollout_weights
from stage.policy.triton_draw import draw
from stage.policy.triton_linear import MAX_ROWS, linear_parts

PREFIX_STEP = 32  # room for prefixes grows by so many tokens, so that most batches share a graph


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for: R rows, N images of L tokens, at most U prefixes of `prefix_room` tokens.

    Guidance scale and temperature are None where each image has its own, in a buffer that the graph reads.
    """

    rows: int
    images: int
    length: int
    prefixes: int
    prefix_room: int
    guidance_scale: float | None
    temperature: float | None
    dtype: torch.dtype


@dataclass(frozen=True)
class TritonOperations:
    """The operations of a decode step in Triton and cuBLAS, falling back on `torch` where a layer has biases."""

    torch: TorchOperations
    silu: bool

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return triton_decode.add_norm(None, hidden, weight, self.torch.eps)

    def linear(self, x: Tensor, affine: Affine) -> Tensor:
        return self.torch.linear(x, affine)

    def add_norm(self, hidden: Tensor, x: Tensor, affine: Affine, weight: Tensor) -> tuple[Tensor, Tensor]:
        if affine.bias is None and len(x) <= MAX_ROWS and x.dtype in (torch.bfloat16, torch.float16):
            added = linear_parts(x, affine.weight)
        else:
            added = self.torch.linear(x, affine)
        return hidden, triton_decode.add_norm(added, hidden, weight, self.torch.eps)

    def gate(self, x: Tensor, affine: Affine) -> Tensor:
        if not self.silu:
            return self.torch.gate(x, affine)
        return triton_decode.silu_multiply(self.torch.linear(x, affine))


class GraphedDecoder:
    """Static buffers of one shape and the graph of one token over them."""

    def __init__(self, policy: JanusPolicy, weights: RolloutWeights, shape: Shape) -> None:
        self.policy, self.weights, self.shape = policy, weights, shape
        model = policy.language_model
        config: Any = model.config
        self.heads: int = config.num_attention_heads
        activation = torch_operations(model)
        silu = isinstance(activation.activation, torch.nn.SiLU) or "silu" in config.hidden_act
        self.operations = TritonOperations(activation, silu)
        self.scale: float = getattr(model.layers[0], "self_attn").scaling  # noqa: B009
        self._allocate(config)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _allocate(self, config: Any) -> None:
        shape, device = self.shape, self.policy.device
        layers, kv_heads, size = len(self.weights.layers), config.num_key_value_heads, config.head_dim
        empty = lambda *sizes: torch.empty(sizes, dtype=shape.dtype, device=device)  # noqa: E731
        self.prefix = empty(layers, 2, shape.prefixes, kv_heads, shape.prefix_room, size)
        self.cache = empty(layers, 2, shape.rows, kv_heads, max(1, shape.length - 1), size)
        self.rope = (
            empty(shape.prefix_room + shape.length, size),
            empty(shape.prefix_room + shape.length, size),
        )
        self.table = empty(self.policy.codebook_size, config.hidden_size)
        integers = lambda *sizes: torch.zeros(sizes, dtype=torch.long, device=device)  # noqa: E731
        self.prefix_of_row = integers(shape.rows)
        self.prefix_lengths, self.first_positions = integers(shape.prefixes), integers(shape.prefixes)
        self.counters = integers(2)  # tokens in the cache, column to be drawn: one more
        self.tokens = integers(shape.images, shape.length)
        self.logps = torch.zeros(shape.images, shape.length, device=device)
        self.uniforms = torch.zeros(shape.images, shape.length, dtype=torch.float64, device=device)
        self.scales, self.temperatures = torch.ones(2, shape.images, device=device)

    def run(
        self, prefixes: Prefixes, uniforms: Tensor, scales: float | Tensor, temperatures: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities `[N, L]` for uniforms `[N, L]`; `prefixes` has the rows of the shape."""
        if isinstance(scales, Tensor):
            self.scales.copy_(scales)
        if isinstance(temperatures, Tensor):
            self.temperatures.copy_(temperatures)
        self.table.copy_(self.policy.image_embeddings())
        self.uniforms.copy_(uniforms)
        hidden = self._prefill(prefixes)
        token = self._captured() if self.shape.length > 1 else self._token
        self.counters.zero_()
        self._draw(hidden)
        self.counters[1] = 1
        for _ in range(self.shape.length - 1):
            token()
        return self.tokens.clone(), self.logps.clone()

    def _prefill(self, prefixes: Prefixes) -> Tensor:
        """Fill the prefix buffers with the real tokens of each prefix; hidden states `[R, D]` of their last."""
        model, (count, length) = self.policy.language_model, prefixes.mask.shape
        for buffer, part in zip(
            self.rope, rope_table(model, len(self.rope[0]), self.shape.dtype), strict=True
        ):
            buffer.copy_(part)
        prefill = Prefill(model, self.weights, prefixes)
        hidden = prefill.run(self.rope)
        order = prefixes.mask.argsort(dim=1, descending=True, stable=True)
        rows = torch.arange(count, device=order.device).unsqueeze(1)
        for layer, found in enumerate(prefill.keys_values):
            self.prefix[layer, :, :count, :, :length] = found[rows, order].permute(2, 0, 3, 1, 4)
        self.prefix_lengths[:count] = prefixes.mask.sum(1)
        if self.shape.length > 1:
            self.first_positions[:count] = prefixes.positions[:, length]
        self.prefix_of_row.copy_(prefixes.of_row)
        return hidden[prefixes.of_row]

    def _token(self) -> None:
        """One token: read the last one drawn, run the model, draw the next, count on."""
        sides = self.shape.rows // self.shape.images
        last = self.tokens.index_select(1, self.counters[:1])[:, 0]
        embeddings = self.table.index_select(0, last).repeat(sides, 1)
        self._draw(run_layers(self.weights, embeddings, self._attend, self.operations))
        self.counters.add_(1)

    def _uncount(self) -> None:
        self.counters.sub_(1)

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        prefix, cache = self.prefix[layer], self.cache[layer]
        return triton_decode.attend(
            qkv,
            self.rope,
            self.counters[:1],
            (prefix[0], prefix[1]),
            self.prefix_of_row,
            self.prefix_lengths,
            self.first_positions,
            (cache[0], cache[1]),
            self.heads,
            self.scale,
        )

    def _draw(self, hidden: Tensor) -> None:
        scale, temperature = self.shape.guidance_scale, self.shape.temperature
        logits = image_logits(self.policy, hidden, self.scales if scale is None else scale)
        if temperature is None:
            logits, temperature = logits.float() / self.temperatures[:, None], 1.0
        draw(logits, self.uniforms, self.counters[1:], temperature, self.tokens, self.logps)

    def _captured(self) -> Callable[[], None]:
        """`_token` as a graph, recorded the first time. What it writes while it warms up is written again later."""
        if self.policy.device.type != "cuda":
            return self._token  # Triton's interpreter: the same path without a graph
        if self.graph is None:
            self.counters[1] = 1
            self.graph = recorder(self.tokens.device).record(self._token, self._uncount, self.shape)
        return self.graph.replay


class GraphedDecoders:
    """The decoder in use, kept between rollouts of one shape; a copy or a pickle of it is empty.

    A policy whose weights were moved, another policy or another shape gets a new one. `seconds` is what the last
    capture and compilation took.
    """

    def __init__(self) -> None:
        self._kept: tuple[JanusPolicy, tuple[int, ...], GraphedDecoder] | None = None

    def __deepcopy__(self, memo: Any) -> GraphedDecoders:
        return GraphedDecoders()

    def __reduce__(self) -> Any:
        return GraphedDecoders, ()

    def release(self) -> None:
        """Give back keys and values, fused weights and the graph's memory."""
        self._kept = None

    def run(
        self,
        policy: JanusPolicy,
        prefixes: Prefixes,
        uniforms: Tensor,
        guidance_scale: float | Tensor,
        temperature: float | Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities `[N, L]` for uniforms `[N, L]`, with the weights of this moment.

        Guidance scale and temperature may be `[N]`, one an image.
        """
        images, length = uniforms.shape
        rows = len(prefixes.of_row)
        room = -(-prefixes.mask.shape[1] // PREFIX_STEP) * PREFIX_STEP
        scale = None if isinstance(guidance_scale, Tensor) else guidance_scale
        heat = None if isinstance(temperature, Tensor) else temperature
        shape = Shape(rows, images, length, prefixes.at_most, room, scale, heat, dtype)
        return self._decoder(policy, shape).run(prefixes, uniforms, guidance_scale, temperature)

    def _decoder(self, policy: JanusPolicy, shape: Shape) -> GraphedDecoder:
        head = tuple(parameter.data_ptr() for parameter in policy.model.model.generation_head.parameters())
        if self._kept is not None:
            known, addresses, decoder = self._kept
            if known is policy and addresses == head and decoder.shape == shape and _current(policy, decoder):
                return decoder
            self._kept = None
            del decoder
        weights = rollout_weights(policy, shape.dtype)
        assert isinstance(weights, RolloutWeights)  # others are decoded without a graph
        self._kept = policy, head, GraphedDecoder(policy, weights, shape)
        return self._kept[2]


def _current(policy: JanusPolicy, decoder: GraphedDecoder) -> bool:
    """Whether a decoder has the weights of this moment, once it has taken over those that are not gathered for it."""
    brought = policy.rollout_weights
    return decoder.weights.refresh() if brought is None else decoder.weights is brought
