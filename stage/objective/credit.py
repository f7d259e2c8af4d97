"""`Credit`: what a rollout has earned, frozen until the last update that learns from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage.types import Rollout, TokenScores, map_tensors

Batch = tuple[
    Rollout, slice
]  # the groups of all processes, as far as advantages need them, and which are one's own


@dataclass(frozen=True)
class PlanCredit:
    """What the loss of the plans needs beside the scores of the policy; `Credit.advantages` serve them too.

    Shapes: `mask` (1 on a plan's own tokens), `old_logps` and `reference_logps` `[P, G, R]`, the last None without a
    reference; `divisors` `[P]`, the tokens of all plans of a group; `total` 0-d, those of all groups. `weight` is that
    of the plans' term in the loss.
    """

    mask: Tensor
    old_logps: Tensor
    reference_logps: Tensor | None
    divisors: Tensor
    total: Tensor
    weight: float

    @classmethod
    def of(cls, rollout: Rollout, dtype: torch.dtype) -> PlanCredit | None:
        """That of a rollout, numbers in `dtype`; None for a rollout without plans."""
        if rollout.plans is None or rollout.old.plan is None or rollout.plan_weight is None:
            return None
        mask = rollout.plans.mask.to(dtype)
        reference = None if rollout.reference is None else rollout.reference.plan
        return cls(
            mask=mask,
            old_logps=rollout.old.plan.logps.detach().to(dtype),
            reference_logps=None if reference is None else reference.logps.detach().to(dtype),
            divisors=mask.sum(dim=(1, 2)),
            total=mask.sum(),
            weight=rollout.plan_weight,
        )

    def counted_as(self, total: float) -> PlanCredit:
        """The same with another number of tokens, by which metrics are divided and no loss."""
        return replace(self, total=torch.full_like(self.total, total))

    def micro_batch(self, prompts: slice, samples: slice) -> PlanCredit:
        """The part of some prompts and some samples, with the divisors of the whole rollout."""
        reference = self.reference_logps
        return replace(
            self,
            mask=self.mask[prompts, samples],
            old_logps=self.old_logps[prompts, samples],
            reference_logps=None if reference is None else reference[prompts, samples],
            divisors=self.divisors[prompts],
        )


@dataclass(frozen=True)
class Credit:
    """Everything the loss needs beside the scores of the policy; computed once a rollout, without gradient.

    Shapes: `advantages` `[P, G]`; `token_weights` w, `kl_weights` m, `similarity` s `[P, G, L]`, None where
    nothing is weighed; w and m hold critical tokens too. `old_logps` `[P, G, L]`; `reference` scores of `[P, G, L]` or
    None; `divisors` and `kl_divisors` `[P]`. `num_groups`, `group_size` and `num_tokens` are P, G and L of the whole
    rollout, also in a micro-batch. `beta` is the coefficient of the KL in this rollout. `plan` is what the plans before
    the images add, None without reasoning.
    """

    advantages: Tensor
    token_weights: Tensor | None
    kl_weights: Tensor | None
    similarity: Tensor | None
    old_logps: Tensor
    reference: TokenScores | None
    divisors: Tensor
    kl_divisors: Tensor
    num_groups: int
    group_size: int
    num_tokens: int
    beta: float
    plan: PlanCredit | None = None

    @property
    def reference_logps(self) -> Tensor | None:
        """Log-probabilities of the reference `[P, G, L]`, nats, or None without a reference."""
        return None if self.reference is None else self.reference.logps

    def micro_batch(self, prompts: slice, samples: slice) -> Credit:
        """The part of some prompts and some samples of each group, with the divisors of the whole rollout.

        The losses of parts that cover the rollout once, of whatever sizes, sum to the loss of the whole, and
        so do their gradients: call `backward` on each without scaling.
        """

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[prompts, samples]

        return replace(
            self,
            advantages=self.advantages[prompts, samples],
            token_weights=cut(self.token_weights),
            kl_weights=cut(self.kl_weights),
            similarity=cut(self.similarity),
            old_logps=self.old_logps[prompts, samples],
            reference=None if self.reference is None else map_tensors(self.reference, cut),
            divisors=self.divisors[prompts],
            kl_divisors=self.kl_divisors[prompts],
            plan=self.plan and self.plan.micro_batch(prompts, samples),
        )
