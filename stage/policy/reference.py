"""The frozen policy that KL and entropy reward look back at, with no weight in memory twice that need not be."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stage.policy.lora import AdaptersOff, has_adapters


def frozen_reference(policy: nn.Module) -> nn.Module:
    """The policy as it is now, for good.

    Under adapters it is the policy with its adapters off. Otherwise it is a copy of what is trained, in the type of
    the policy, around the very parameters that are not: these have one storage and move between devices together.
    """
    if has_adapters(policy):
        return AdaptersOff(policy)
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    return copy.deepcopy(policy, dict(shared)).requires_grad_(False).eval()


def place_reference(reference: Any, policy: nn.Module, device: torch.device, layers_on_cpu: bool) -> None:
    """Move a reference to the device of its policy; with `layers_on_cpu` its own layers stay in CPU memory.

    Each such layer is copied to the device for the length of its own forward pass, from pinned memory. That takes as
    long as the weights need through the bus (12 GB in about a quarter of a second), once a micro-batch. Adapters have
    no layers of their own, and a CPU needs no copies: there `layers_on_cpu` changes nothing.
    """
    if not layers_on_cpu or device.type == "cpu" or isinstance(reference, AdaptersOff):
        reference.to(device)
        return
    language_model, shared = reference.language_model, set(policy.parameters())
    layers, language_model.layers = language_model.layers, nn.ModuleList()
    reference.to(device)
    language_model.layers = layers
    for layer in layers:
        _visit(layer, [parameter for parameter in layer.parameters() if parameter not in shared], device)


def _visit(layer: nn.Module, own: list[nn.Parameter], device: torch.device) -> None:
    """Keep a layer's own weights in CPU memory, and on the device only while its forward pass runs."""
    kept = {parameter: parameter.data.cpu() for parameter in own}
    if device.type == "cuda":
        kept = {parameter: weights.pin_memory() for parameter, weights in kept.items()}

    def arrive(*_: Any) -> None:
        for parameter, weights in kept.items():
            parameter.data = weights.to(device, non_blocking=True)

    def leave(*_: Any) -> None:
        for parameter, weights in kept.items():
            parameter.data = weights

    leave()
    layer.register_forward_pre_hook(arrive)
    layer.register_forward_hook(leave, always_call=True)
