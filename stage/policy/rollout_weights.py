"""The language model's weights as the sampler reads them: few large matrices, in storage that stays in place.

Four ways fill them, chosen weight by weight:
1. shared storage, where the sampler wants the parameter as it is: nothing is copied, an optimizer's step shows at once;
2. copied, where several parameters become one matrix (query, key and value; gate and up) or another type is wanted;
3. merged, where a layer has an adapter: base weight and adapter are added into a buffer of the sampler's own;
4. gathered, where parameters are sharded over processes: a layer by one collective, then into its place of the copy.

Nothing here refers back to what holds it, so that a copy that nobody reads is gone at once, and not when Python next
looks for cycles: it has the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaModel

from stage.policy.flat_gather import FlatGroup, Wanted, gathered
from stage.policy.lora import factors, merged_weight


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
class Source:
    """The parameter `name` of a module; the weight of a linear layer with an adapter is the merged one."""

    module: Any
    name: str = "weight"

    @property
    def parameter(self) -> Tensor:
        """That of the layer itself, as it is now: an adapter wraps the layer and leaves its bias alone."""
        found: Tensor = getattr(getattr(self.module, "base_layer", self.module), self.name)
        return found

    @property
    def adapted(self) -> bool:
        """Whether something has to be computed."""
        return self.name == "weight" and hasattr(self.module, "lora_A") and not self.module.disable_adapters

    def wanted(self, dtype: torch.dtype) -> list[Wanted]:
        """What has to be read for it: a weight in `dtype`, float32 adapters as they are."""
        added = factors(self.module) if self.adapted else ()
        wide = [(part, part.dtype if part.dtype == torch.float32 else dtype) for part in added]
        return [(self.parameter, dtype), *wide]

    def write(self, group: FlatGroup, into: Tensor) -> None:
        """Its values of this moment, from a group that has what is wanted."""
        if self.adapted:
            into.copy_(merged_weight(self.module, group.read))
        else:
            group.read(self.parameter, into)

    def shared(self, dtype: torch.dtype) -> Tensor | None:
        """The parameter itself, where the sampler can read it as it is."""
        found = self.parameter
        whole = not self.adapted and not isinstance(found, DTensor)
        return found.detach() if whole and found.dtype == dtype else None


@dataclass(frozen=True)
class _Entry:
    """A tensor and the sources that it consists of, row after row; `shared` where it is the one parameter itself."""

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
        self.device: torch.device = model.rotary_emb.inv_freq.device
        self._groups: list[list[_Entry]] = []  # what is gathered together
        decoders: Any = model.layers
        self.layers = [self._layer(layer) for layer in decoders]
        self.norm = self._tensor(Source(model.norm))
        self._fill()

    def refresh(self) -> bool:
        """Take over the weights of this moment; False if a shared parameter was moved or replaced.

        Then whoever holds an address of these weights, a CUDA graph for one, builds them anew.
        """
        for entry in (entry for group in self._groups for entry in group if entry.shared):
            now = entry.sources[0].shared(self.dtype)
            if now is None or now.data_ptr() != entry.tensor.data_ptr():
                return False
        self._fill()
        return True

    def _layer(self, layer: Any) -> LayerWeights:
        self._groups.append([])
        attention, mlp = layer.self_attn, layer.mlp
        return LayerWeights(
            attention_norm=self._tensor(Source(layer.input_layernorm)),
            qkv=self._affine(attention.q_proj, attention.k_proj, attention.v_proj),
            out=self._affine(attention.o_proj),
            mlp_norm=self._tensor(Source(layer.post_attention_layernorm)),
            gate_up=self._affine(mlp.gate_proj, mlp.up_proj),
            down=self._affine(mlp.down_proj),
        )

    def _affine(self, *modules: Any) -> Affine:
        weight = self._tensor(*map(Source, modules))
        biases = biases_of(modules)
        return Affine(weight, self._tensor(*biases) if biases else None)

    def _tensor(self, *sources: Source) -> Tensor:
        """A tensor for these sources, in the group of the last layer."""
        shared = sources[0].shared(self.dtype) if len(sources) == 1 else None
        tensor = room_for(sources, self.dtype, self.device) if shared is None else shared
        self._groups[-1].append(_Entry(tensor, sources, shared is not None))
        return tensor

    @torch.no_grad()
    def _fill(self) -> None:
        """Copy all that is not shared into its place, layer by layer."""
        copied = [[entry for entry in group if not entry.shared] for group in self._groups]
        wanted = [
            [found for entry in group for source in entry.sources for found in source.wanted(self.dtype)]
            for group in copied
        ]
        for entries, group in zip(copied, gathered(wanted, self.device), strict=True):
            for entry in entries:
                write(entry.sources, group, entry.tensor)


def room_for(sources: Sequence[Source], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for the rows of all sources."""
    parameters = [source.parameter for source in sources]
    rows = sum(len(parameter) for parameter in parameters)
    return torch.empty((rows, *parameters[0].shape[1:]), dtype=dtype, device=device)


def write(sources: Sequence[Source], group: FlatGroup, into: Tensor) -> None:
    """The sources' values of this moment, row after row."""
    start = 0
    for source in sources:
        rows = len(source.parameter)
        source.write(group, into[start : start + rows])
        start += rows


def biases_of(modules: Sequence[Any]) -> list[Source]:
    """The biases of linear layers, which have all of them one or none."""
    found = [Source(module, "bias") for module in modules]
    return [] if found[0].parameter is None else found


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


class VisitingLayer:
    """The same record of a layer whose matrices are gathered each time that they are read, and then forgotten."""

    def __init__(self, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._layer, self._dtype, self._device = layer, dtype, device
        self.attention_norm = whole(layer.input_layernorm.weight, dtype, device)
        self.mlp_norm = whole(layer.post_attention_layernorm.weight, dtype, device)

    @torch.no_grad()
    def _affine(self, *modules: Any) -> Affine:
        parts = [list(map(Source, modules)), biases_of(modules)]
        wanted = [found for sources in parts for source in sources for found in source.wanted(self._dtype)]
        (group,) = gathered([wanted], self._device)
        rooms = [room_for(sources, self._dtype, self._device) if sources else None for sources in parts]
        for sources, room in zip(parts, rooms, strict=True):
            if room is not None:
                write(sources, group, room)
        weight, bias = rooms
        assert weight is not None
        return Affine(weight, bias)

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
