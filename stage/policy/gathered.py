"""Weights that are sharded over processes, as a sampler reads them.

Under FSDP a process has a slice of every trained weight. A rollout reads all weights once a token, so they are
gathered once before it, in the type that is computed in, and given back after it (`Gathered`). Where that copy does not
fit, each layer is gathered whenever it is read (`VisitingWeights`): slow, and every process must draw in step with the
others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stage.policy.rollout_weights import RolloutWeights, VisitingWeights, whole


class Gathered:
    """The policy as a sampler and a VQ decoder read it while the policy itself is sharded.

    It shares the layers and everything frozen with the policy; what is trained outside of the layers is a copy, filled
    together with the layers' weights. Make it before the policy is sharded.

    Args:
        policy: to be sharded.
        dtype: that is computed in.
        copied: gather everything once a rollout; else each layer when it is read.
    """

    def __init__(self, policy: Any, dtype: torch.dtype, *, copied: bool) -> None:
        self._policy, self.dtype, self.copied = policy, dtype, copied
        layers = policy.language_model.layers
        inside = {id(parameter) for parameter in layers.parameters()}
        memo: dict[int, Any] = {id(part): part for part in (layers, policy.tokenizer, policy.image_processor)}
        self._own: list[tuple[str, nn.Parameter]] = []
        for name, parameter in policy.named_parameters():
            if id(parameter) in inside:
                continue
            if parameter.requires_grad:
                empty = torch.empty(0, dtype=dtype, device=parameter.device)
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                self._own.append((name, memo[id(parameter)]))
            else:
                memo[id(parameter)] = parameter
        self.policy: Any = copy.deepcopy(policy, memo)

    def to(self, device: torch.device) -> None:
        """Move what is not shared with the policy."""
        model = self.policy.language_model
        layers, model.layers = model.layers, nn.ModuleList()
        self.policy.to(device)
        model.layers = layers

    @torch.no_grad()
    def fill(self) -> None:
        """Take over the weights of this moment. Every process must call it."""
        device = self.policy.language_model.rotary_emb.inv_freq.device
        for name, mine in self._own:
            mine.data = whole(self._policy.get_parameter(name), self.dtype, device)
        make: Any = RolloutWeights if self.copied else VisitingWeights
        self.policy.rollout_weights = make(self.policy.language_model, self.dtype)

    def release(self) -> None:
        """Give the memory back."""
        self.policy.rollout_weights = None
        for _, mine in self._own:
            mine.data = mine.data.new_empty(0)

    @contextmanager
    def filled(self) -> Iterator[Any]:
        """The policy to draw from, with the weights of this moment, for the length of a `with` block."""
        self.fill()
        try:
            yield self.policy
        finally:
            self.release()

    def copy_bytes(self) -> int:
        """Bytes of the gathered weights in their own storage, all layers together."""
        layers = self._policy.language_model.layers
        width = torch.empty(0, dtype=self.dtype).element_size()
        numbers = sum(p.numel() for n, p in layers.named_parameters() if "lora_" not in n)
        return width * (numbers + sum(self._policy.get_parameter(name).numel() for name, _ in self._own))
