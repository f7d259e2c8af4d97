"""`Credit`: what a rollout has earned, frozen until the last update that learns from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from stage.types import TokenScores, map_tensors


@dataclass(frozen=True)
class Credit:
    """Everything the loss needs beside the scores of the policy; computed once a rollout, without gradient.

    Shapes: `advantages` `[P, G]`; `token_weights` w, `kl_weights` m, `similarity` s `[P, G, L]`, None where
    nothing is reweighted; `old_logps` `[P, G, L]`; `reference` scores of `[P, G, L]` or None; `divisors` and
    `kl_divisors` `[P]`. `num_groups`, `group_size` and `num_tokens` are P, G and L of the whole rollout, also
    in a micro-batch.
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
        )
