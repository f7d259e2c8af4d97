"""Callbacks that let the reference follow the policy: at set updates, or a little with each one.

KL and entropy reward then look back at a policy of some updates ago. What the reference holds is saved with a
checkpoint, so that a resumed run goes on with it.

Under fsdp each process moves the slices that it has. What is trained outside of the layers lies whole in the reference,
and is gathered from the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stage.gradients import local
from stage.policy.lora import AdaptersOff
from stage.policy.rollout_weights import whole
from stage.strategy import sliced


class FollowingReference(Callback):
    """What both ways have in common: the trained weights of the reference, by name, and their place in a checkpoint."""

    def __init__(self) -> None:
        self._pairs: list[
            tuple[str, Tensor, nn.Parameter]
        ] = []  # name, weights of the reference, of the policy
        self._loaded: Mapping[str, Tensor] = {}
        self._writes = True  # whether this process writes checkpoints

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Raises ValueError without a reference, or with one that has no weights of its own."""
        reference = pl_module.reference
        if reference is None or isinstance(reference, AdaptersOff) or pl_module.reference_on_cpu:
            found = "adapters" if isinstance(reference, AdaptersOff) else "none, or one kept on the CPU"
            raise ValueError(
                f"a reference that follows the policy needs weights of its own on the device, got {found}; set "
                "model/adapter=none, reference_on_cpu=false and beta above 0, or leave callbacks.reference out"
            )
        self._writes = pl_module.ranks.first
        weights = dict(reference.named_parameters())
        trained = [(name, p) for name, p in pl_module.policy.named_parameters() if p.requires_grad]
        self._pairs = [(name, weights[name].data, parameter) for name, parameter in trained]
        for name, mine, _ in self._pairs:
            if name in self._loaded:
                mine.copy_(sliced(self._loaded[name], mine))
        self._loaded = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.follow(pl_module.update)

    def follow(self, update: int) -> None:
        """Move the reference after `update` rollouts."""
        raise NotImplementedError

    def move(self, share: float) -> None:
        """`reference += share * (policy - reference)`, in place."""
        with torch.no_grad():
            for _, mine, parameter in self._pairs:
                local(mine).lerp_(as_sliced(parameter.detach(), mine), share)

    def state_dict(self) -> dict[str, Any]:
        found = {}
        for name, mine, _ in self._pairs:
            full = whole(mine, mine.dtype, local(mine).device)
            found[name] = full.to("cpu", copy=True) if self._writes else full.new_empty(0)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def as_sliced(weights: Tensor, like: Tensor) -> Tensor:
    """Weights of the policy as this process has `like`, those of the reference: a slice or all of them, in its type."""
    if isinstance(weights, DTensor) and not isinstance(like, DTensor):
        return whole(weights, like.dtype, like.device)
    mine = local(like)
    return local(weights).to(mine.device, mine.dtype)


class RefreshedReference(FollowingReference):
    """The reference becomes the policy every `every` updates.

    The release's `update_ref` loads older checkpoints into the reference, those of steps 500 and 900 at 800 and 1200
    (krennic999/STAGE, grpo_trainer.py, `maybe_update_ref_model`); here it is the policy of the moment.
    """

    def __init__(self, *, every: int) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"a reference is refreshed every 1 or more updates, got {every!r}; raise it")
        self.every = every

    def follow(self, update: int) -> None:
        if update % self.every == 0:
            self.move(1.0)


class MovingReference(FollowingReference):
    """The reference is a moving average of the policy: `reference = decay * reference + (1 - decay) * policy`."""

    def __init__(self, *, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(
                f"the decay of a moving reference lies in [0, 1), got {decay!r}; 0.99 forgets in 100"
            )
        self.decay = decay

    def follow(self, update: int) -> None:
        self.move(1.0 - self.decay)
