"""A policy whose weights are sliced over processes: FSDP2, a decoder layer at a time, then what is outside of them.

Departures from torch's example:
1. What is frozen outside of the layers (embeddings of images, the VQ model, heads; 1 to 3 GB of a 7B) stays whole in
   every process, so that sampling and decoding need no other process.
2. Weights that are trained become float32 masters before they are sliced, whatever type they were loaded in; forward
   and backward see them in that type, and gradients are reduced in float32.
3. `score` is a forward of its own: FSDP gathers around `forward` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

FORWARDS = ("score",)  # public methods that run sharded layers


def computed_in(policy: Any) -> torch.dtype:
    """The type of the weights as they were loaded, which forward and backward compute in."""
    dtype: torch.dtype = policy.language_model.norm.weight.dtype
    return dtype


def shard(
    policy: Any, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool, reshard_after_forward: bool
) -> None:
    """Slice a policy or a reference over the processes of `mesh`, in place.

    Args:
        dtype: that is computed in.
        offload: keep the slices of a GPU in CPU memory, with the optimizer's step there.
        reshard_after_forward: slice a layer again as soon as it has run, not after its backward pass.
    """
    wide = torch.promote_types(dtype, torch.float32)
    layers = policy.language_model.layers
    inside = {id(parameter) for parameter in layers.parameters()}
    frozen = {p for p in policy.parameters() if not p.requires_grad and id(p) not in inside}
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide),
        "offload_policy": CPUOffloadPolicy() if offload and mesh.device_type == "cuda" else OffloadPolicy(),
    }
    trained = any(parameter.requires_grad for parameter in policy.parameters())
    for layer in layers:
        widen(layer, wide)
        fully_shard(layer, **settings, reshard_after_forward=reshard_after_forward)
        if not reshard_after_forward:
            layer.register_forward_hook(reshard_without_backward)
    for part in policy.modules():
        widen(part, wide, recurse=False)
    # A backward pass needs the outermost weights again at once; a reference has none.
    fully_shard(policy, **settings, ignored_params=frozen, reshard_after_forward=not trained)
    for name in FORWARDS:
        register_fsdp_forward_method(policy, name)


def reshard_without_backward(layer: Any, *_: Any) -> None:
    """Slice a layer again where no backward pass will: it would still have these weights after the optimizer's step."""
    if not torch.is_grad_enabled():
        layer.reshard()


def widen(module: nn.Module, dtype: torch.dtype, *, recurse: bool = True) -> None:
    """Turn what is trained, and not yet sliced, into `dtype`."""
    for parameter in module.parameters(recurse):
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)
