"""`Objective`: slots composed into `credit()`, once a rollout, and `loss()`, for each micro-batch.

    credit:  rewards ─▶ advantage ─▶ A [P,G] ─▶ token weights ─▶ w, m [P,G,L] ─▶ aggregation ─▶ divisors [P]
    loss:    policy ─┬▶ ratio ─▶ surrogate [P,G,L] ─┐
                     └▶ divergence ─▶ kl [P,G,L] ───┴▶ weighted sums / divisors ─▶ mean over groups

For one group, with samples i and positions t (STAGE, arXiv 2509.25027; all off it is GRPO, arXiv 2402.03300):

    r_i  += λ (e_i - mean of e over the best samples), for the best samples               entropy.py
    A_i   = (r_i - mean r) / (std r + 1e-4)                                               advantage.py
    w, m  = weights of the similarity s_it to samples of the opposite advantage           similarity.py
    pg    = - Σ_it w min(ρ A, clip(ρ) A) / (Σ_it w + 1e-6), the mean without weights      surrogate.py
    kl    = mean_it(m k3)                                                                 divergence.py
    loss  = mean over groups of pg + β kl

What other objectives change: the baseline (baselines.py), the ratio (ratios.py), the estimator of the KL and a bound
on it (divergence.py) or whole distributions in its place (distributions.py), its coefficient over the updates
(`beta_schedule`), the divisors (aggregation.py), which tokens count at all (critical.py), and a term on the entropy
itself (penalty.py). Each is a slot, so each combines with STAGE's three switches; what does not fit raises when the
objective is built.

With reasoning, a rollout has plans, and the loss of their tokens is added with a weight      plan.py

Departures of `algorithm=stage` from the published code (krennic999/STAGE, grpo_trainer.py, `compute_loss`):
 1. Each group has its own baseline, maximum and similarity; the published code mixes the prompts of a rank.
 2. A threshold that the published code reads and never sets is gone, with the branch that depends on it.
 3. Ties, best samples and samples at the mean are decided with a tolerance; a tied group is not normalised.
 4. The entropy reward acts whatever the reward is called, and no reward column is dropped.
 5. A sample is never its own opponent; one without opponents has s = 0.
 6. The ratio is clipped and taken against the rollout's policy, so a rollout may serve several updates.
 7. Each group has its own divisor, so prompts, processes and micro-batches do not change the loss.
 8. `loss/total` is the loss; what the published code logs as its loss is the KL (here `loss/kl`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stage.objective.advantage import Advantages
from stage.objective.checks import check_rollout
from stage.objective.credit import Credit, PlanCredit
from stage.objective.credit_metrics import credit_metrics, share_of_active
from stage.objective.critical import CriticalTokens
from stage.objective.metrics import TensorMetrics, merge_metrics, to_floats
from stage.objective.plan import plan_loss, plan_metrics
from stage.objective.similarity import TokenWeights
from stage.objective.slots import check_slots, check_switches
from stage.objective.sums import mean_over_groups, policy_metrics, share
from stage.objective.surrogate import Surrogate
from stage.types import Metrics, Rollout, TokenScores, map_tensors

__all__ = ["Objective", "merge_metrics"]


class Objective:
    """Credit and loss of one algorithm, composed of slots.

    Args:
        reweight_advantage: weigh the policy term by w.
        reweight_kl: weigh the KL term by m.
        entropy_coefficient: λ of the entropy reward, in units of the reward; 0 turns it off.
        beta: β, coefficient of the KL term; 0 turns it off.
        clip_low, clip_high: bounds `[1 - clip_low, 1 + clip_high]` of the ratio, null for one without a clip.
        tied_groups: what happens in a group of equal rewards: raw, zero or normalise.
        updates_per_rollout: optimizer steps a rollout serves (read by the training module).
        micro_batch: samples a forward pass, null for all of them (read by the training module).
        distribution: conditional or guided, what the training module scores tokens with.
        resampling_rounds: how often the training module draws other prompts in place of groups whose rewards are
            all equal; 0 keeps them (read by the training module).
        advantage: called with `scores`, `bonus`, `tied_groups`; returns `Advantages`.
        token_weights: called with `advantages`, `kept`, `codes`; returns `TokenWeights`; null where nothing
            is weighed.
        ratio: called with `scores`, `old_logps`, `advantages`, `clip_low`, `clip_high`; returns `Surrogate`.
        divergence: called with `scores`, `reference`; returns `[P, G, L]`; null where beta is 0.
        aggregation: called with `weights`, `like`; returns divisors `[P]`.
        entropy_reward: called with `best`, `entropy`, `reference_entropy`, `coefficient`; returns the bonus `[P, G]`;
            null where entropy_coefficient is 0.
        critical_tokens: called with `old`, `reference`, `codes`; returns `CriticalTokens`; null takes every token.
        penalty: called with `scores`, `reference`; returns a term of the loss `[P, G, L]`; null adds none.
        beta_schedule: called with `update`, rollouts done; returns a factor of beta; null is 1 throughout.

    Any callable that takes its keywords fits a slot; one with a method `check(switches)` gets all switches
    above as a mapping when the objective is built and raises ValueError where it cannot work with them. An advantage
    with a method `at(update)` is asked for the one of each rollout. A slot with a true `needs_reference` makes rollouts
    hold reference scores, one with a true `compares_batch` sees the groups of all processes, and token weights with
    `features` name the method of the policy that gives their `codes`. A divergence with `compared` has tokens scored
    with it, see distributions.py.

    Raises:
        ValueError: a switch out of range, or a slot that cannot be called as above or work with the switches.
    """

    def __init__(
        self,
        *,
        reweight_advantage: bool,
        reweight_kl: bool,
        entropy_coefficient: float,
        beta: float,
        clip_low: float | None,
        clip_high: float | None,
        tied_groups: str,
        updates_per_rollout: int,
        micro_batch: int | None,
        distribution: str,
        resampling_rounds: int,
        advantage: Callable[..., Advantages],
        token_weights: Callable[..., TokenWeights] | None,
        ratio: Callable[..., Surrogate],
        divergence: Callable[..., Tensor] | None,
        aggregation: Callable[..., Tensor],
        entropy_reward: Callable[..., Tensor] | None,
        critical_tokens: Callable[..., CriticalTokens] | None,
        penalty: Callable[..., Tensor] | None,
        beta_schedule: Callable[[int], float] | None,
    ) -> None:
        self.reweight_advantage = reweight_advantage
        self.reweight_kl = reweight_kl
        self.entropy_coefficient = entropy_coefficient
        self.beta = beta
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.tied_groups = tied_groups
        self.updates_per_rollout = updates_per_rollout
        self.micro_batch = micro_batch
        self.distribution = distribution
        self.resampling_rounds = resampling_rounds
        switches = dict(vars(self))
        check_switches(switches)
        self.advantage = advantage
        self.token_weights = token_weights
        self.ratio = ratio
        self.divergence = divergence
        self.aggregation = aggregation
        self.entropy_reward = entropy_reward
        self.critical_tokens = critical_tokens
        self.penalty = penalty
        self.beta_schedule = beta_schedule
        check_slots({name: slot for name, slot in vars(self).items() if name not in switches}, switches)

    @property
    def needs_reference(self) -> bool:
        """Whether KL term, entropy reward or a slot looks back, so that a rollout must hold reference scores."""
        slots = (self.critical_tokens, self.penalty)
        return (
            self.beta != 0
            or self.entropy_coefficient != 0
            or any(getattr(slot, "needs_reference", False) for slot in slots)
        )

    @property
    def compares_batch(self) -> bool:
        """Whether the credit of a group depends on the others of an update, so that it is that of all of them."""
        weighed = self.reweight_advantage or self.reweight_kl or self.critical_tokens is not None
        slots = (self.advantage, *((self.token_weights, self.aggregation) if weighed else ()))
        return any(getattr(slot, "compares_batch", False) for slot in slots)

    @property
    def features(self) -> str:
        """The method of the policy whose vectors a rollout holds as `codes`."""
        reweighted = self.reweight_advantage or self.reweight_kl
        return getattr(self.token_weights, "features", "codes") if reweighted else "codes"

    @property
    def compared(self) -> Any:
        """How whole distributions of policy and reference are compared while tokens are scored, None where they are
        not; see distributions.py.
        """
        return getattr(self.divergence, "compared", None) if self.beta != 0 else None

    @torch.no_grad()
    def credit(self, rollout: Rollout) -> tuple[Credit, Metrics]:
        """Advantages, token weights and divisors of a rollout, and its metrics as floats (one device sync).

        Slots compute in float64; the credit is stored in the dtype of the log-probabilities, or float32.

        Returns:
            Credit, and means over the rollout. Across ranks average them, but take the largest where
            `metrics.is_maximum(name)`. reward/mean and reward/std (of a group, ddof 1, mean over groups) are
            of the task reward; reward/informative_groups and reward/entropy_active_groups are shares of the
            groups; reward/PART is the mean of each part as it was scored; with several parts, contribution/PART and
            contribution_std/PART are the mean of what was added up of it (weight, gate and normalisation included)
            and its std in a group, mean over groups; advantage/max is the largest |A|;
            policy/sampling_gap is the mean |log-probability when sampled - when scored|, nats, and
            plan/sampling_gap that of the plans.

        Raises:
            ValueError: shapes that do not match, a reward that is not finite, a missing reference, G = 1.
        """
        check_rollout(rollout, self.needs_reference)
        device = rollout.old.logps.device  # a scorer may have answered from the CPU
        rollout = replace(rollout, scores=map_tensors(rollout.scores, lambda parts: parts.to(device)))
        found = self._advantages(rollout)
        weights = self._token_weights(rollout, found)
        dtype = torch.promote_types(rollout.old.logps.dtype, torch.float32)
        old = rollout.old.logps.detach().to(dtype)
        token_weights = weights.advantage if weights and self.reweight_advantage else None
        kl_weights = weights.kl if weights and self.reweight_kl else None
        critical = self._critical_tokens(rollout)
        mask, gain = (None, None) if critical is None else (critical.mask, critical.gain)
        token_weights = _product(token_weights, mask)
        groups, group_size, num_tokens = old.shape
        credit = Credit(
            advantages=found.values.to(dtype),
            token_weights=_stored(_product(token_weights, gain), dtype),
            kl_weights=_stored(_product(kl_weights, mask), dtype),
            similarity=weights.similarity.to(dtype) if weights else None,
            old_logps=old,
            reference=rollout.reference
            and map_tensors(
                replace(rollout.reference, features=None), lambda score: score.detach().to(dtype)
            ),
            divisors=self.aggregation(weights=token_weights, like=old).to(dtype),
            kl_divisors=self.aggregation(weights=mask, like=old).to(dtype),
            num_groups=groups,
            group_size=group_size,
            num_tokens=num_tokens,
            beta=self.beta if self.beta_schedule is None else self.beta * self.beta_schedule(rollout.update),
            plan=PlanCredit.of(rollout, dtype),
        )
        metrics = credit_metrics(rollout, found, credit)
        if self.entropy_coefficient != 0:
            metrics["reward/entropy_active_groups"] = share_of_active(found)
        if self.beta_schedule is not None:
            metrics["loss/beta"] = old.new_tensor(credit.beta)
        if mask is not None:
            metrics["weights/critical_share"] = mask.mean()
        return credit, to_floats(metrics)

    def loss(self, scores: TokenScores, credit: Credit) -> tuple[Tensor, TensorMetrics]:
        """The loss of a rollout or of a micro-batch of it, with gradient in `scores.logps`.

        The mean runs over the groups of this rank; gradients averaged over ranks of equal P are those of all.

        Args:
            scores: of the present policy, `[P, G, L]`, the same part of the rollout as the credit.
            credit: of the rollout, or `credit.micro_batch(...)`.

        Returns:
            The loss, 0-d, and metrics as detached 0-d tensors, so that no micro-batch waits for the device.
            Each metric is this part's contribution: `metrics.merge_metrics` adds those of all parts (and
            takes the largest policy/ratio_max). loss/total = loss/policy + beta * loss/kl + loss/penalty, the
            last where there is one; loss/kl is weighted by m, policy/kl is not. With plans, loss/total has
            their term too, which is plan/loss times its weight; the others named loss/ and policy/ stay those
            of the images.

        Raises:
            ValueError: scores of other shapes than the credit, or a penalty on an entropy without gradient.
        """
        if scores.logps.shape != credit.old_logps.shape:
            raise ValueError(
                f"scores and credit must hold the same samples: scores {tuple(scores.logps.shape)}, credit "
                f"{tuple(credit.old_logps.shape)}; cut the credit with micro_batch as the tokens were cut"
            )
        surrogate = self.ratio(
            scores=scores,
            old_logps=credit.old_logps,
            advantages=credit.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        gain = mean_over_groups(surrogate.values, credit.token_weights, credit.divisors, credit.num_groups)
        policy = -gain
        metrics = policy_metrics(scores, surrogate, credit)
        total = policy
        if self._compares and credit.reference is not None:
            assert self.divergence is not None
            divergence = self.divergence(scores=scores, reference=credit.reference)
            if self.beta != 0:
                kl = mean_over_groups(divergence, credit.kl_weights, credit.kl_divisors, credit.num_groups)
                total = policy + credit.beta * kl
                metrics["loss/kl"] = kl.detach()
            metrics["policy/kl"] = share(divergence, credit)
        if self.penalty is not None:
            term = self._penalty(scores, credit)
            total = total + term
            metrics["loss/penalty"] = term.detach()
        if credit.plan is not None:
            term, found = self._plan_loss(scores, credit, credit.plan)
            total = total + credit.plan.weight * term
            metrics |= found
        return total, {"loss/total": total.detach(), "loss/policy": policy.detach(), **metrics}

    def _plan_loss(
        self, scores: TokenScores, credit: Credit, plan: PlanCredit
    ) -> tuple[Tensor, TensorMetrics]:
        """The plans' term by the same ratio and divergence, without weights of tokens, and its metrics."""
        if scores.plan is None or scores.plan.logps.shape != plan.mask.shape:
            found = None if scores.plan is None else tuple(scores.plan.logps.shape)
            raise ValueError(
                f"scores must hold those of the plans {tuple(plan.mask.shape)}, got {found}; score the tokens with "
                "their plans, and cut all alike"
            )
        surrogate = self.ratio(
            scores=replace(scores.plan, mask=plan.mask),
            old_logps=plan.old_logps,
            advantages=credit.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        divergence = None
        if self._compares and plan.reference_logps is not None:
            assert self.divergence is not None
            reference = TokenScores(plan.reference_logps, scores.plan.entropy)
            divergence = self.divergence(scores=scores.plan, reference=reference)
        loss = plan_loss(
            surrogate.values,
            divergence if self.beta != 0 else None,
            plan.mask,
            plan.divisors,
            beta=credit.beta,
            num_groups=credit.num_groups,
        )
        metrics = plan_metrics(
            entropy=scores.plan.entropy,
            ratio=surrogate.ratio,
            clipped=surrogate.clipped,
            divergence=divergence,
            mask=plan.mask,
            total=plan.total,
            num_samples=credit.num_groups * credit.group_size,
        )
        return loss, {"plan/loss": loss.detach(), **metrics}

    @property
    def _compares(self) -> bool:
        """Whether the divergence is computed: where β is 0 for the log alone, if that costs nothing."""
        return self.divergence is not None and (
            self.beta != 0 or getattr(self.divergence, "compared", None) is None
        )

    def _advantages(self, rollout: Rollout) -> Advantages:
        bonus = None
        if self.entropy_coefficient != 0:
            assert rollout.reference is not None  # checked by `check_rollout`
            assert self.entropy_reward is not None  # checked by `check_slots`
            bonus = _Bonus(
                self.entropy_reward,
                rollout.old.entropy,
                rollout.reference.entropy,
                self.entropy_coefficient,
            )
        at = getattr(self.advantage, "at", None)
        slot = self.advantage if at is None else at(rollout.update)
        return slot(scores=rollout.scores, bonus=bonus, tied_groups=self.tied_groups)

    def _token_weights(self, rollout: Rollout, found: Advantages) -> TokenWeights | None:
        if self.token_weights is None or not (self.reweight_advantage or self.reweight_kl):
            return None
        return self.token_weights(advantages=found.values, kept=found.kept, codes=rollout.codes)

    def _critical_tokens(self, rollout: Rollout) -> CriticalTokens | None:
        if self.critical_tokens is None:
            return None
        return self.critical_tokens(old=rollout.old, reference=rollout.reference, codes=rollout.codes)

    def _penalty(self, scores: TokenScores, credit: Credit) -> Tensor:
        """This part's share of the mean of the penalty over all tokens, with gradient."""
        assert self.penalty is not None
        if scores.logps.requires_grad and not scores.entropy.requires_grad:
            raise ValueError(
                "a penalty on the entropy needs its gradient, got a detached entropy; score tokens with "
                "stage.objective.logprobs, or set penalty to null"
            )
        values = self.penalty(scores=scores, reference=credit.reference)
        return values.sum() / (credit.num_groups * credit.group_size * credit.num_tokens)


@dataclass(frozen=True)
class _Bonus:
    """The entropy reward of a rollout, waiting for the best samples."""

    slot: Callable[..., Tensor]
    entropy: Tensor
    reference_entropy: Tensor
    coefficient: float

    def __call__(self, best: Tensor) -> Tensor:
        return self.slot(
            best=best,
            entropy=self.entropy,
            reference_entropy=self.reference_entropy,
            coefficient=self.coefficient,
        )


def _product(weights: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """Weights times a factor, either of which may be missing and then is 1."""
    if weights is None or factor is None:
        return factor if weights is None else weights
    return weights * factor


def _stored(weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weights is None else weights.to(dtype)
