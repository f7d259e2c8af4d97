"""Weights that are sharded over processes, as a sampler reads them.

Under FSDP a process has a slice of every trained weight. A rollout reads all weights once a token, so they are
gathered once before it, in the type that is computed in (`Gathered`). Whoever draws from the same weights shares that
copy; the rollout gives it back as soon as its tokens are drawn. Where it does not fit, each layer is gathered whenever
it is read (`VisitingWeights`): slow, and every process must draw in step with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stage.policy.flat_gather import gathered
from stage.policy.rollout_weights import RolloutWeights, VisitingWeights


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
        self._versions: list[int] | None = (
            None  # of all parameters when they were gathered; None where nothing is
        )
        self._drawing = 0  # blocks of `filled` that are entered

    def to(self, device: torch.device) -> None:
        """Move what is not shared with the policy."""
        model = self.policy.language_model
        layers, model.layers = model.layers, nn.ModuleList()
        self.policy.to(device)
        model.layers = layers

    @torch.no_grad()
    def fill(self) -> None:
        """Take over the weights of this moment, unless it has them. Every process must call it."""
        self._policy.reshard()  # a forward without a backward leaves whole what is outside of the layers
        versions = [parameter._version for parameter in self._policy.parameters()]
        if self._versions == versions:
            return
        self.release()
        device = self.policy.language_model.rotary_emb.inv_freq.device
        trained = [self._policy.get_parameter(name) for name, _ in self._own]
        for group in gathered([[(parameter, self.dtype) for parameter in trained]], device):
            for parameter, (_, mine) in zip(trained, self._own, strict=True):
                mine.data = group.read(
                    parameter, torch.empty(parameter.shape, dtype=self.dtype, device=device)
                )
        make: Any = RolloutWeights if self.copied else VisitingWeights
        self.policy.rollout_weights = make(self.policy.language_model, self.dtype)
        self._versions = versions

    def release(self) -> None:
        """Give the memory back, unless somebody draws at the moment."""
        if self._drawing:
            return
        self.policy.rollout_weights = self._versions = None
        for _, mine in self._own:
            mine.data = mine.data.new_empty(0)

    @contextmanager
    def filled(self) -> Iterator[Any]:
        """The policy to draw from, with the weights of this moment, for the length of a `with` block.

        What was gathered stays, for others who draw from the same weights; see `release`.
        """
        self.fill()
        self._drawing += 1
        try:
            yield self.policy
        finally:
            self._drawing -= 1
