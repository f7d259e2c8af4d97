"""The update loop: one `training_step` is one rollout and the updates made from it.

Departures from Lightning's defaults:
1. Manual optimisation. `update` counts rollouts done; it is saved, and it is the x-axis of every log, limit
   and schedule, since `trainer.global_step` counts optimizer steps.
2. What the data loader yields is ignored: prompts are a function of (seed, update), so a resume cannot replay
   or skip any.
3. The reference, the scorer and the sampler lie outside the module tree: never trained, saved or wrapped by a
   strategy.
4. A checkpoint holds what training changes. Frozen weights are those of the base, which is recorded by its
   sha256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from stage.data import PromptStream, UpdateNumbers
from stage.gradients import check_finite, clip, gradient_norm
from stage.group_draws import Stopwatch, check_draws
from stage.joint_credit import joint_credit, num_parts
from stage.lender import Lender
from stage.loggers import UpdateLog
from stage.objective.metrics import is_maximum
from stage.objective.objective import merge_metrics
from stage.optimizer import made, state_bytes
from stage.policy import drawing
from stage.policy.reference import frozen_reference, place_reference
from stage.provenance import changed_files, scorer_record
from stage.ranks import ALONE, Division, Ranks
from stage.rollout import (
    Collected,
    check_comparison,
    collect,
    comparison,
    micro_batches,
    score_part,
    scored_distribution,
)
from stage.step_metrics import ToldStopwatch, is_largest, time_metrics
from stage.strategy import Sharded, connected, move
from stage.training_checkpoint import (
    check_base,
    check_names,
    from_text,
    random_states,
    restore_random_states,
    to_text,
    trained_names,
)
from stage.types import Metrics, Rollout, Scorer, TokenScores


class StageModule(LightningModule):
    """Trains a policy on rollouts.

    Args:
        policy: scores tokens with gradient; its trainable parameters are the ones optimised.
        sampler: draws tokens from the policy.
        scorer: turns images into reward parts.
        objective: credit and loss; also says how many updates a rollout serves, how many samples go into one
            forward, and whether a reference is needed. The reference is `policy` as it comes, frozen.
        prompts: `prompts.batch(update)` gives the prompts of an update.
        optimizer: called with the list of trainable parameters.
        scheduler: called with the optimizer; stepped once a rollout.
        group_size: images a prompt (G), at least 2.
        gradient_clip: largest norm of the gradient; None leaves it as it is.
        seed: of the sampling noise.
        updates: rollouts to do in all, counted from the start of the run and not from a resume.
        base: `{"path", "sha256"}` of the weights the policy was loaded from.
        reward_beside_reference: compute the reward in a thread while the reference scores (`stage.group_draws.judge`).
        reference_on_cpu: keep the layers of the reference in CPU memory and copy each to the device when it runs.
        config, overrides: the composed configuration and the command line behind it, kept in checkpoints.

    Raises ValueError for a group of one, a sampler that draws it all alike, an update count below 1, a policy without
    trainable parameters, or one that cannot write the plans that the sampler asks for.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        sampler: Any,
        scorer: Scorer,
        objective: Any,
        prompts: PromptStream,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        group_size: int,
        gradient_clip: float | None,
        seed: int,
        updates: int,
        base: Mapping[str, str],
        reward_beside_reference: bool,
        reference_on_cpu: bool,
        config: Mapping[str, Any],
        overrides: Sequence[str],
    ) -> None:
        super().__init__()
        if group_size < 2:
            raise ValueError(
                f"group_size must be at least 2: an advantage compares the samples of a prompt; got {group_size}"
            )
        if updates < 1:
            raise ValueError(f"updates must be at least 1; got {updates}. Raise it.")
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError(
                "the policy must have trainable parameters; all are frozen. Shorten model.freeze."
            )
        scored_distribution(objective, sampler)
        check_draws(objective, sampler)
        check_comparison(objective, sampler)
        drawing.check(policy, sampler)
        self.automatic_optimization = False
        self.strict_loading = (
            False  # a checkpoint lacks the frozen weights; on_load_checkpoint checks the names
        )
        self.policy = policy
        # nn.Module registers a module that is assigned to it; inside a tuple it stays out of the tree.
        self._reference = (frozen_reference(policy) if objective.needs_reference else None,)
        self.reward_beside_reference, self.reference_on_cpu = reward_beside_reference, reference_on_cpu
        self.sampler, self._scorer, self.objective, self.prompts = sampler, (scorer,), objective, prompts
        self._optimizer, self._scheduler = optimizer, scheduler
        self.group_size, self.gradient_clip = group_size, gradient_clip
        self.seed, self.updates = seed, updates
        self.base, self.config, self.overrides = dict(base), dict(config), list(overrides)
        self.reward_record = scorer_record(scorer)
        self.ranks: Ranks = ALONE
        self.lender = Lender(policy, sampler)
        self.update = 0
        self.latest: Metrics = {}  # of the last update; callbacks may add to it before it is logged
        self._random: Mapping[str, Any] | None = None
        # States of the generators after the last whole update; None while the weights stand between two updates.
        self._whole: Mapping[str, Any] | None = None

    @property
    def reference(self) -> nn.Module | None:
        """The frozen policy that KL and entropy reward look back at."""
        return self._reference[0]

    @property
    def scorer(self) -> Scorer:
        return self._scorer[0]

    @property
    def whole(self) -> bool:
        """Whether weights, optimizer and schedule are those of `update` whole updates, so that they can be saved.

        False before the first update of a process begins (a checkpoint may be half loaded then), and from the first
        optimizer step of an update to its end.
        """
        return self._whole is not None

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return [optimizer], [made("scheduler", self._scheduler, optimizer)]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the configuration for these parameters; raises ValueError for settings of a wrong kind."""
        found: torch.optim.Optimizer = made("optimizer", self._optimizer, parameters)
        return found

    def optimizer_bytes(self) -> int:
        """What the optimizer will keep of all trained parameters, bytes."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return round(sum(size * state_bytes(self.make_optimizer, dtype) for dtype, size in sizes.items()))

    def train_dataloader(self) -> UpdateNumbers:
        return UpdateNumbers(lambda: self.update)

    @property
    def division(self) -> Division:
        """Which samples of an update this process has."""
        return self.ranks.divide(self.prompts.prompts_per_update, self.group_size)

    def setup(self, stage: str) -> None:
        prompts = self.prompts.prompts_per_update
        self.ranks = connected(self.trainer.strategy, prompts, self.group_size, self.config)
        self._parts = num_parts(self.objective, self.ranks, self.division.span)

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            one_pass = len(self._cells(self.division.num_prompts)) == 1
            found = strategy.shard(
                self.policy, self.reference, reference_on_cpu=self.reference_on_cpu, one_pass=one_pass
            )
            self.lender = Lender(self.policy, self.sampler, found)

    def drawing(self) -> AbstractContextManager[Any]:
        """The policy as a sampler reads it, with the weights of this moment. Every process must enter."""
        return self.lender.lend()

    @property
    def draws_alone(self) -> bool:
        """Whether inside of `drawing` a process can draw without the others."""
        return self.lender.alone

    def on_fit_start(self) -> None:
        if self.lender.sliced:
            self.lender.to(self.device)
            if self.reference is not None:
                move(self.reference, self.device)
        elif self.reference is not None:
            place_reference(self.reference, self.policy, self.device, self.reference_on_cpu)

    def on_train_start(self) -> None:
        # As late as possible: whatever drew random numbers while the run was put together is undone here.
        if self._random is not None:
            restore_random_states(self._random)
            self._random = None

    def on_train_end(self) -> None:
        self.lender.release()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One rollout, its updates, and one row of metrics at x = rollouts done."""
        watch = ToldStopwatch(self.device, self.ranks, self.update, gathers=self.lender.sliced)
        self._whole = random_states()
        with watch("total"):
            collected = self._collect(watch)
            with self.ranks.together():
                watched = self._watched(collected.rollout)
            metrics = self._learn(collected) | watched
            self.lr_schedulers().step()  # type: ignore[union-attr]
        self.update += 1
        self._whole = random_states()
        images = self.prompts.prompts_per_update * self.group_size
        metrics |= time_metrics(watch.seconds, images, self.device, replayed=collected.scores is None)
        self.latest = self.ranks.mean(metrics, is_largest)
        if self.update >= self.updates:
            self.trainer.should_stop = True

    def configure_callbacks(self) -> list[Callback]:
        return [UpdateLog()]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Told to Lightning's own callbacks, early stopping for one. The loggers have the row already: `self.log` would
        # repeat a validation in every later row, and counts optimizer steps.
        self.log_dict(self.latest, logger=False)

    def _cells(self, num_prompts: int) -> list[tuple[slice, slice]]:
        """Which prompts and samples each micro-batch of this process has."""
        rows, columns = micro_batches(num_prompts, self.division.group_size, self.objective.micro_batch)
        return [(prompts, samples) for prompts in rows for samples in columns]

    def _collect(self, watch: Stopwatch) -> Collected:
        prompts = self.prompts.batch(self.update)[self.division.prompts]
        division = self.division
        return collect(
            self.policy,
            self.reference,
            self.sampler,
            self.scorer,
            self.objective,
            prompts,
            update=self.update,
            seed=self.seed,
            group_size=self.group_size,
            differentiable=len(self._cells(len(prompts))) == self.objective.updates_per_rollout == 1,
            beside=self.reward_beside_reference,
            watch=watch,
            spare=partial(self.prompts.spare, self.update),
            samples=division.samples,
            ranks=self.ranks,
            drawer=partial(self.lender.lend_last, watch),
        )

    def _watched(self, rollout: Rollout) -> Metrics:
        """Metrics of the callbacks that look at a rollout before anything is learned from it (`on_rollout`)."""
        metrics: Metrics = {}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_rollout"):
                metrics |= callback.on_rollout(self, rollout)
        return metrics

    def _learn(self, collected: Collected) -> Metrics:
        """All updates from one rollout; metrics of the last one, those of the gradient included."""
        credit, metrics = joint_credit(self.objective, collected.rollout, self.division.samples, self.ranks)
        if self.objective.resampling_rounds:
            metrics["reward/groups_drawn"] = float(collected.groups_drawn)
        for _ in range(self.objective.updates_per_rollout):
            metrics = metrics | self._step(collected.rollout, credit, collected.scores)
        return metrics

    def _step(self, rollout: Rollout, credit: Any, scores: TokenScores | None) -> Metrics:
        """One optimizer step from all micro-batches, whose losses add up to that of the full batch."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        cells = self._cells(len(rollout.prompts))
        losses, parts = [], []
        for index, cell in enumerate(cells):
            self.ranks.does("learning", waits=True)
            with self._gradient_sync(last=index == len(cells) - 1):
                loss, metrics = self._backward(rollout, credit, scores, *cell)
            losses.append(loss)
            parts.append(metrics)
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = gradient_norm(gradients, self._total)
        # All numbers of a step come from the device at once.
        checked = {"loss": torch.stack(losses).sum(), "gradient norm": norm}
        found = merge_metrics(parts, checked)
        for name in checked:  # the loss first: a norm is that of all processes, and not where the fault lies
            with self.ranks.together():
                check_finite(found[name], name, self.update)
        # What is one mean over several processes adds up; everything else is a mean over processes.
        merged = {n: v if is_maximum(n) else v * self._parts for n, v in found.items() if n not in checked}
        if self.gradient_clip is not None:
            clip(gradients, norm, self.gradient_clip)
        rate = optimizer.param_groups[0]["lr"]
        merged |= {"policy/gradient_norm": found["gradient norm"], "policy/learning_rate": rate}
        self._whole = None
        optimizer.step()
        optimizer.zero_grad()  # the next rollout has the memory
        return merged

    def _backward(
        self, rollout: Rollout, credit: Any, scores: TokenScores | None, prompts: slice, samples: slice
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and metrics of one micro-batch, after its backward pass.

        `scores` of the rollout, where they carry a graph, save the forward.
        """
        if scores is None:
            distribution = scored_distribution(self.objective, self.sampler).of(rollout)
            other = comparison(self.objective, self.reference, rollout.reference)
            drawn = rollout.prompt_tokens, rollout.tokens, rollout.plans
            scores = score_part(self.policy, *drawn, prompts, samples, distribution, other)
        loss, metrics = self.objective.loss(scores, credit.micro_batch(prompts, samples))
        self.manual_backward(loss * self._parts)  # gradients of processes are averaged
        return loss.detach(), metrics

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced once an optimizer step, with the last micro-batch.

        Slices are reduced with each: no process has room for whole gradients then.
        """
        strategy = self.trainer.strategy
        if not last and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def _total(self, number: Tensor) -> Tensor:
        """The sum of a number over the processes."""
        found: Tensor = self.trainer.strategy.reduce(number.to(self.device), reduce_op="sum")
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ranks.does("a checkpoint")
        kept = {f"policy.{name}" for name in trained_names(self.policy)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        # Those of now hold what an update that failed has drawn.
        random = random_states() if self._whole is None or not self.trainer.interrupted else self._whole
        checkpoint |= {"update": self.update, "base": self.base, "random": random}
        if self.ranks.world > 1:
            checkpoint["processes"] = [from_text(text) for text in self.ranks.exchange(to_text(random))]
        checkpoint |= {"config": self.config, "overrides": self.overrides, "reward": self.reward_record}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint belongs to other base weights or trained other parameters.

        A reward with other weight files is said, and trained on, as a changed setting is.
        """
        with self.ranks.together():
            check_base(checkpoint, self.base)
            check_names(checkpoint["state_dict"], {f"policy.{name}" for name in trained_names(self.policy)})
        everyone = checkpoint.get("processes", [])
        same = len(everyone) == self.ranks.world
        self.update = checkpoint["update"]
        self._random = everyone[self.ranks.rank] if same else checkpoint["random"]
        files = changed_files(checkpoint.get("reward", self.reward_record), self.reward_record)
        if files and self.trainer.is_global_zero:
            print(f"changed since the checkpoint: weights of the reward, {', '.join(files)}", flush=True)
