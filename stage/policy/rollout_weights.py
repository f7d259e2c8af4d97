"""The language model's weights as the sampler reads them: few large matrices, in storage that stays in place.

Four ways fill them, chosen weight by weight:
1. shared storage, where the sampler wants the parameter as it is: nothing is copied, an optimizer's step shows at once;
2. copied, where several parameters become one matrix (query, key and value; gate and up) or another type is wanted;
3. merged, where a layer has an adapter: base weight and adapter are added into a buffer of the sampler's own;
4. gathered, where parameters are sharded over processes: one parameter after the other, into its place of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
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


def whole(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in `dtype`, all of it where it is sharded over processes, which all must call this.

    A slice that waits in CPU memory is moved to `device` first, and narrowed before it is sent.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(dtype)
    mine = tensor.to_local().detach().to(device, dtype)
    shape: Any = {"shape": tensor.shape, "stride": tensor.stride()}
    placed = DTensor.from_local(mine, tensor.device_mesh, tensor.placements, run_check=False, **shape)
    return placed.full_tensor()


def effective(module: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The effective weight `[out, in]` of a linear layer, its own parameter where nothing has to be computed."""

    def read(weight: Tensor) -> Tensor:
        narrow = torch.float32 if weight.dtype == torch.float32 and weight is not base else dtype
        return whole(weight, narrow, device) if isinstance(weight, DTensor) else weight

    base = getattr(module, "base_layer", module).weight
    return merged_weight(module, read)


class RolloutWeights:
    """Weights of a Llama, filled at construction and by every `refresh`.

    Attributes:
        layers: one record a layer.
        norm: of the last hidden state.
    """

    def __init__(self, model: LlamaModel, dtype: torch.dtype) -> None:
        """`dtype` of all weights; parameters of another type are copied into it."""
        self.dtype = dtype
        self.device: torch.device = model.rotary_emb.inv_freq.device
        self._entries: list[_Entry] = []
        decoders: Any = model.layers
        self.layers = [self._layer(layer) for layer in decoders]
        self.norm = self._tensor(lambda: model.norm.weight)

    @torch.no_grad()
    def refresh(self) -> bool:
        """Take over the weights of this moment; False if a shared parameter was moved or replaced.

        Then whoever holds an address of these weights, a CUDA graph for one, builds them anew.
        """
        for entry in self._entries:
            if entry.shared and entry.sources[0]().data_ptr() != entry.tensor.data_ptr():
                return False
        for entry in self._entries:
            self._fill(entry)
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
        sources = [lambda module=module: effective(module, self.dtype, self.device) for module in modules]
        # An adapter wraps its layer, whose bias it leaves alone.
        plain = [getattr(module, "base_layer", module) for module in modules]
        weight = self._tensor(*sources, rows=[len(layer.weight) for layer in plain])
        if plain[0].bias is None:
            return Affine(weight, None)
        return Affine(weight, self._tensor(*(lambda module=module: module.bias for module in plain)))

    @torch.no_grad()
    def _tensor(self, *sources: Source, rows: Sequence[int] | None = None) -> Tensor:
        """A tensor filled from these sources, which have `rows` rows, and entered for `refresh`."""
        first = sources[0]()
        if len(sources) == 1 and self._as_it_is(first):
            entry = _Entry(first.detach(), sources, shared=True)
        else:
            shape = (
                sum(len(source()) for source in sources) if rows is None else sum(rows),
                *first.shape[1:],
            )
            entry = _Entry(torch.empty(shape, dtype=self.dtype, device=self.device), sources, shared=False)
            self._fill(entry, first)
        self._entries.append(entry)
        return entry.tensor

    def _as_it_is(self, tensor: Tensor) -> bool:
        is_parameter = isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor, DTensor)
        return is_parameter and tensor.dtype == self.dtype

    @torch.no_grad()
    def _fill(self, entry: _Entry, first: Tensor | None = None) -> None:
        """Copy the sources into their places; `first` is what the first of them gives, where that is known."""
        if entry.shared:
            return
        start = 0
        for source in entry.sources:
            part = source() if first is None else first
            first = None
            part = whole(part, self.dtype, self.device) if isinstance(part, DTensor) else part
            entry.tensor[start : start + len(part)].copy_(part)
            start += len(part)


class VisitingLayer:
    """The same record of a layer whose matrices are gathered each time that they are read, and then forgotten."""

    def __init__(self, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._layer, self._dtype, self._device = layer, dtype, device
        self.attention_norm = whole(layer.input_layernorm.weight, dtype, device)
        self.mlp_norm = whole(layer.post_attention_layernorm.weight, dtype, device)

    def _affine(self, *modules: Any) -> Affine:
        dtype, device = self._dtype, self._device
        plain = [getattr(module, "base_layer", module) for module in modules]
        weight = torch.cat([effective(module, dtype, device).to(dtype) for module in modules])
        if plain[0].bias is None:
            return Affine(weight, None)
        return Affine(weight, torch.cat([whole(module.bias, dtype, device) for module in plain]))

    @property
    def qkv(self) -> Affine:
        attention = self._layer.self_attn
        return self._affine(attention.q_proj, attention.k_proj, attention.v_proj)

    @property
    def out(self) -> Affine:
        return self._affine(self._layer.self_attn.o_proj)

    @property
    def gate_up(self) -> Affine:
        return self._affine(self._layer.mlp.gate_proj, self._layer.mlp.up_proj)

    @property
    def down(self) -> Affine:
        return self._affine(self._layer.mlp.down_proj)


class VisitingWeights:
    """Weights of a Llama without storage for its matrices. Every process must read them in step with the others."""

    def __init__(self, model: LlamaModel, dtype: torch.dtype) -> None:
        device: Any = model.rotary_emb.inv_freq.device
        decoders: Any = model.layers
        self.dtype = dtype
        with torch.no_grad():
            self.layers: Sequence[VisitingLayer] = [VisitingLayer(layer, dtype, device) for layer in decoders]
            self.norm = whole(model.norm.weight, dtype, device)


def rollout_weights(policy: Any, dtype: torch.dtype) -> RolloutWeights | VisitingWeights:
    """Those that a policy brings along (`stage.policy.gathered`), else its parameters of this moment."""
    found = getattr(policy, "rollout_weights", None)
    return RolloutWeights(policy.language_model, dtype) if found is None else found
