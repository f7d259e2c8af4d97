"""The language model's weights as the sampler reads them: few large matrices, in storage that stays in place.

Three ways fill them, chosen weight by weight:
1. shared storage, where the sampler wants the parameter as it is: nothing is copied, an optimizer's step shows at once;
2. copied, where several parameters become one matrix (query, key and value; gate and up) or another type is wanted;
3. merged, where a layer has an adapter: base weight and adapter are added into a buffer of the sampler's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaModel

from stage.policy.lora import merged_weight

Source = Callable[[], Tensor]


class Affine(NamedTuple):
    """x Wᵀ + b with weight `[out, in]` and bias `[out]`, or no bias."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: `qkv` has the rows of query, key and value beside each other, `gate_up` those of gate and up."""

    attention_norm: Tensor
    qkv: Affine
    out: Affine
    mlp_norm: Tensor
    gate_up: Affine
    down: Affine


@dataclass(frozen=True)
class _Entry:
    """A tensor and the parameters it consists of, row after row; `shared` where it is the one parameter itself."""

    tensor: Tensor
    sources: Sequence[Source]
    shared: bool


class RolloutWeights:
    """Weights of a Llama, filled at construction and by every `refresh`.

    Attributes:
        layers: one record a layer.
        norm: of the last hidden state.
    """

    def __init__(self, model: LlamaModel, dtype: torch.dtype) -> None:
        """`dtype` of all weights; parameters of another type are copied into it."""
        self.dtype = dtype
        self._entries: list[_Entry] = []
        decoders: Any = model.layers
        self.layers = [self._layer(layer) for layer in decoders]
        self.norm = self._tensor(lambda: model.norm.weight)
        self._fill()

    @torch.no_grad()
    def refresh(self) -> bool:
        """Take over the weights of this moment; False if a shared parameter was moved or replaced.

        Then whoever holds an address of these weights, a CUDA graph for one, builds them anew.
        """
        for entry in self._entries:
            if entry.shared and entry.sources[0]().data_ptr() != entry.tensor.data_ptr():
                return False
        self._fill()
        return True

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        return LayerWeights(
            attention_norm=self._tensor(lambda: layer.input_layernorm.weight),
            qkv=self._affine(attention.q_proj, attention.k_proj, attention.v_proj),
            out=self._affine(attention.o_proj),
            mlp_norm=self._tensor(lambda: layer.post_attention_layernorm.weight),
            gate_up=self._affine(mlp.gate_proj, mlp.up_proj),
            down=self._affine(mlp.down_proj),
        )

    def _affine(self, *modules: Any) -> Affine:
        weight = self._tensor(*(lambda module=module: merged_weight(module) for module in modules))
        # An adapter wraps its layer, whose bias it leaves alone.
        plain = [getattr(module, "base_layer", module) for module in modules]
        if plain[0].bias is None:
            return Affine(weight, None)
        return Affine(weight, self._tensor(*(lambda module=module: module.bias for module in plain)))

    @torch.no_grad()
    def _tensor(self, *sources: Source) -> Tensor:
        """A tensor for these sources, entered for `_fill`, which gives it its values."""
        found = [source() for source in sources]
        first = found[0]
        if len(found) == 1 and isinstance(first, torch.nn.Parameter) and first.dtype == self.dtype:
            entry = _Entry(first.detach(), sources, shared=True)
        else:
            rows = sum(len(part) for part in found)
            entry = _Entry(first.new_empty(rows, *first.shape[1:], dtype=self.dtype), sources, shared=False)
        self._entries.append(entry)
        return entry.tensor

    @torch.no_grad()
    def _fill(self) -> None:
        for entry in self._entries:
            if not entry.shared:
                start = 0
                for source in entry.sources:
                    part = source()
                    entry.tensor[start : start + len(part)].copy_(part)
                    start += len(part)
