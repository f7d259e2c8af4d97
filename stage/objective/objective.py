"""`Objective`: five slots composed into `credit()`, once a rollout, and `loss()`, for each micro-batch.

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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stage.objective import advantage as advantages_of
from stage.objective import entropy
from stage.objective.advantage import Advantages
from stage.objective.checks import check_rollout
from stage.objective.credit import Credit, PlanCredit
from stage.objective.metrics import TensorMetrics, merge_metrics, to_floats
from stage.objective.plan import plan_loss, plan_metrics
from stage.objective.similarity import TokenWeights
from stage.objective.slots import check_slots, check_switches
from stage.objective.surrogate import Surrogate
from stage.types import Metrics, Rollout, Scores, TokenScores, map_tensors

__all__ = ["Objective", "merge_metrics"]


class Objective:
    """Credit and loss of one algorithm, composed of five slots.

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
        advantage: called with `scores`, `bonus`, `tied_groups`; returns `Advantages`.
        token_weights: called with `advantages`, `kept`, `codes`; returns `TokenWeights`; null where nothing
            is weighed.
        ratio: called with `scores`, `old_logps`, `advantages`, `clip_low`, `clip_high`; returns `Surrogate`.
        divergence: called with `scores`, `reference`; returns `[P, G, L]`; null where beta is 0.
        aggregation: called with `weights`, `like`; returns divisors `[P]`.

    Any callable that takes its keywords fits a slot; one with a method `check(switches)` gets all switches
    above as a mapping when the objective is built and raises ValueError where it cannot work with them.

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
        advantage: Callable[..., Advantages],
        token_weights: Callable[..., TokenWeights] | None,
        ratio: Callable[..., Surrogate],
        divergence: Callable[..., Tensor] | None,
        aggregation: Callable[..., Tensor],
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
        switches = dict(vars(self))
        check_switches(switches)
        self.advantage = advantage
        self.token_weights = token_weights
        self.ratio = ratio
        self.divergence = divergence
        self.aggregation = aggregation
        check_slots({name: slot for name, slot in vars(self).items() if name not in switches}, switches)

    @property
    def needs_reference(self) -> bool:
        """Whether the KL term or the entropy reward is on, so that a rollout must hold reference scores."""
        return self.beta != 0 or self.entropy_coefficient != 0

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
        groups, group_size, num_tokens = old.shape
        credit = Credit(
            advantages=found.values.to(dtype),
            token_weights=token_weights.to(dtype) if token_weights is not None else None,
            kl_weights=weights.kl.to(dtype) if weights and self.reweight_kl else None,
            similarity=weights.similarity.to(dtype) if weights else None,
            old_logps=old,
            reference=rollout.reference
            and map_tensors(rollout.reference, lambda score: score.detach().to(dtype)),
            divisors=self.aggregation(weights=token_weights, like=old).to(dtype),
            kl_divisors=self.aggregation(weights=None, like=old).to(dtype),
            num_groups=groups,
            group_size=group_size,
            num_tokens=num_tokens,
            plan=PlanCredit.of(rollout, dtype),
        )
        metrics = _credit_metrics(rollout, found, credit)
        if self.entropy_coefficient != 0:
            metrics["reward/entropy_active_groups"] = _share_of_active(found)
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
            takes the largest policy/ratio_max). loss/total = loss/policy + beta * loss/kl; loss/kl is
            weighted by m, policy/kl is not. With plans, loss/total has their term too, which is
            plan/loss times its weight; the others named loss/ and policy/ stay those of the images.

        Raises:
            ValueError: scores of other shapes than the credit.
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
        gain = _mean_over_groups(surrogate.values, credit.token_weights, credit.divisors, credit.num_groups)
        policy = -gain
        metrics = _policy_metrics(scores, surrogate, credit)
        total = policy
        if self.divergence is not None and credit.reference is not None:
            divergence = self.divergence(scores=scores, reference=credit.reference)
            if self.beta != 0:
                kl = _mean_over_groups(divergence, credit.kl_weights, credit.kl_divisors, credit.num_groups)
                total = policy + self.beta * kl
                metrics["loss/kl"] = kl.detach()
            metrics["policy/kl"] = _share(divergence, credit)
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
            scores=scores.plan,
            old_logps=plan.old_logps,
            advantages=credit.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        divergence = None
        if self.divergence is not None and plan.reference_logps is not None:
            reference = TokenScores(plan.reference_logps, scores.plan.entropy)
            divergence = self.divergence(scores=scores.plan, reference=reference)
        loss = plan_loss(
            surrogate.values,
            divergence if self.beta != 0 else None,
            plan.mask,
            plan.divisors,
            beta=self.beta,
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

    def _advantages(self, rollout: Rollout) -> Advantages:
        bonus = None
        if self.entropy_coefficient != 0:
            assert rollout.reference is not None  # checked by `check_rollout`
            close = entropy.closeness(rollout.old.entropy, rollout.reference.entropy)
            bonus = partial(entropy.entropy_reward, closeness=close, coefficient=self.entropy_coefficient)
        return self.advantage(scores=rollout.scores, bonus=bonus, tied_groups=self.tied_groups)

    def _token_weights(self, rollout: Rollout, found: Advantages) -> TokenWeights | None:
        if self.token_weights is None or not (self.reweight_advantage or self.reweight_kl):
            return None
        return self.token_weights(advantages=found.values, kept=found.kept, codes=rollout.codes)


def _mean_over_groups(values: Tensor, weights: Tensor | None, divisors: Tensor, num_groups: int) -> Tensor:
    """This part's share of the mean over groups of `Σ_it weights * values / divisor`; values `[P, G, L]`."""
    weighted = values if weights is None else weights * values
    return (weighted.sum(dim=(1, 2)) / divisors).sum() / num_groups


def _share(values: Tensor, credit: Credit) -> Tensor:
    """This part's share of the plain mean of values `[P, G, L]` over the whole rollout, detached."""
    return values.detach().sum() / (credit.num_groups * credit.group_size * credit.num_tokens)


def _policy_metrics(scores: TokenScores, surrogate: Surrogate, credit: Credit) -> TensorMetrics:
    return {
        "policy/entropy": _share(scores.entropy, credit),
        "policy/ratio_mean": _share(surrogate.ratio, credit),
        "policy/ratio_max": surrogate.ratio.detach().amax(),
        "policy/clip_fraction": _share(surrogate.clipped.to(scores.logps.dtype), credit),
    }


def _share_of_active(found: Advantages) -> Tensor:
    """Share of the groups in which the entropy reward was not 0 throughout."""
    bonus = torch.zeros_like(found.values) if found.bonus is None else found.bonus
    return (bonus != 0).any(dim=-1).double().mean()


def _credit_metrics(rollout: Rollout, found: Advantages, credit: Credit) -> TensorMetrics:
    rewards = advantages_of.task_rewards(rollout.scores)
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(dim=-1).mean(),
        "reward/informative_groups": (~advantages_of.tied(rewards)).double().mean(),
        "advantage/abs_mean": found.values.abs().mean(),
        "advantage/max": found.values.abs().amax(),
        "policy/sampling_gap": (rollout.sampled_logps - rollout.old.logps).abs().mean(),
    }
    metrics |= _part_metrics(rollout.scores, found.contributions)
    if rollout.reference is not None:
        metrics["reference/entropy"] = rollout.reference.entropy.mean()
    if rollout.plans is not None and credit.plan is not None:
        gap = credit.plan.mask * (rollout.plans.logps - credit.plan.old_logps).abs()
        metrics["plan/sampling_gap"] = gap.sum() / credit.plan.total
    weights = {
        "weights/advantage_mean": credit.token_weights,
        "weights/kl_mean": credit.kl_weights,
        "weights/similarity_mean": credit.similarity,
    }
    return metrics | {name: tensor.mean() for name, tensor in weights.items() if tensor is not None}


def _part_metrics(scores: Scores, contributions: Tensor | None) -> TensorMetrics:
    """Each part as the scorer gave it and, where there are several, what was added up of it."""
    metrics = {f"reward/{name}": scores.parts[..., i].double().mean() for i, name in enumerate(scores.names)}
    if len(scores.names) > 1:
        added = advantages_of.weighted_parts(scores) if contributions is None else contributions
        for i, name in enumerate(scores.names):
            metrics[f"contribution/{name}"] = added[..., i].mean()
            metrics[f"contribution_std/{name}"] = added[..., i].std(dim=-1).mean()
    return metrics
