"""How a run is spread over processes: conf/strategy/*.yaml.

`single` is Lightning's own for one process. `ddp` gives every process all weights and averages gradients. `fsdp` slices
weights, gradients and optimizer over the processes.

A checkpoint is one file that the first process writes or, under `fsdp`, a folder that every process writes its part of.
Either goes on under any strategy, with any number of processes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from stage.code_version import code_sha256
from stage.heartbeat import SPARE, Heartbeat, begin
from stage.policy.drawing import reasons
from stage.policy.gathered import Gathered
from stage.policy.lora import AdaptersOff
from stage.policy.rollout_weights import whole
from stage.policy.sharded import computed_in, shard
from stage.ranks import ALONE, Ranks, connect, divide, known
from stage.sharded_checkpoint import Joined, Moments, write_sharded
from stage.training_checkpoint import trained_names

ROLLOUTS = ("copy", "layers")
CHECKPOINTS = ("sharded", "whole")
OF_THE_FIRST = ("output", "logger.")  # settings of the process that writes
WITH_FOLDERS = ("trainer.", "callbacks.")  # some of which lie in its output
IDLE = ("model.model.vision_model.", "model.model.aligner.", "model.model.vqmodel.")


class Watched:
    """What both strategies do where training begins and ends: meet the others, part from them, tell of an error."""

    lightning_module: Any

    def setup_environment(self) -> None:
        """Raises ConnectionError where the processes do not reach one another."""
        try:
            super().setup_environment()  # type: ignore[misc]
        except RuntimeError as error:  # gloo has no class of its own for it
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            raise ConnectionError(
                f"all processes must reach one another, got: {error}. Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to "
                "the network between the machines, and MASTER_ADDR to an address of the first one in it"
            ) from error

    def on_exception(self, exception: BaseException) -> None:
        """After the callbacks, which may have saved what was done."""
        super().on_exception(exception)  # type: ignore[misc]
        heart = self._heart
        if heart is None or isinstance(exception, KeyboardInterrupt) or known(exception):
            return
        if heart.fail(" ".join(f"{type(exception).__name__}: {exception}".split())):
            exception.on_all_ranks = True  # type: ignore[attr-defined]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """All processes read it, or none."""
        with self.lightning_module.ranks.together():
            found: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)  # type: ignore[attr-defined]
        return found

    def teardown(self) -> None:
        """Called however training ends."""
        if self._heart is not None:
            self._heart.stop()
        super().teardown()  # type: ignore[misc]

    @property
    def _heart(self) -> Heartbeat | None:
        ranks = getattr(self.lightning_module, "ranks", ALONE)
        found: Heartbeat | None = ranks.heart
        return found


class Replicated(Watched, DDPStrategy):
    """Every process has all weights; gradients are averaged while the backward pass runs (conf/strategy/ddp.yaml).

    Args:
        timeout_seconds: how long a process waits for another before all of them end.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        # Buffers are frozen, so alike everywhere.
        super().__init__(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            timeout=longer(timeout_seconds),
        )
        self.timeout_seconds = timeout_seconds

    def configure_ddp(self) -> None:
        # To look for parameters without a gradient takes time, and a warning where there are none.
        module: Any = self.lightning_module
        self._ddp_kwargs["find_unused_parameters"] = idle(module.policy, reasons(module.sampler))
        super().configure_ddp()


class Sharded(Watched, ModelParallelStrategy):
    """Weights, gradients and optimizer are sliced over the processes, by decoder layers (conf/strategy/fsdp.yaml).

    Args:
        timeout_seconds: how long a process waits for another before all of them end.
        cpu_offload: keep the slices in CPU memory, and take the optimizer's step there.
        rollout: `copy` gathers all weights once before a rollout, into the storage that the sampler reads; `layers`
            gathers each layer whenever it is read, which is slow and needs no room.
        checkpoint: `sharded` has every process write its slices into one folder; `whole` gathers them in the CPU memory
            of the first process, which writes one file.

    Raises ValueError for another rollout or checkpoint.
    """

    def __init__(self, *, timeout_seconds: float, cpu_offload: bool, rollout: str, checkpoint: str) -> None:
        for name, value, choices in (("rollout", rollout, ROLLOUTS), ("checkpoint", checkpoint, CHECKPOINTS)):
            if value not in choices:
                raise ValueError(
                    f"trainer.strategy.{name} must be {' or '.join(choices)}; got {value!r}. Name one of them."
                )
        super().__init__(save_distributed_checkpoint=False, timeout=longer(timeout_seconds))
        self.timeout_seconds, self.cpu_offload, self.rollout = timeout_seconds, cpu_offload, rollout
        self.in_parts, self._saving = checkpoint == "sharded", ALONE

    def setup_environment(self) -> None:
        self._tensor_parallel_size, self._data_parallel_size = 1, self.num_nodes * self.num_processes
        super().setup_environment()

    def keeps_layers(self, *, one_pass: bool) -> bool:
        """Whether layers stay whole between forward and backward, and are gathered once for both.

        They then take the room that the copy for the rollout had. With micro-batches gradients have it meanwhile.
        """
        return one_pass and self.rollout == "copy"

    def shard(self, policy: Any, reference: Any, *, reference_on_cpu: bool, one_pass: bool) -> Gathered:
        """Slice a policy and its reference, in place; what the sampler reads in place of the policy.

        Args:
            reference_on_cpu: keep the slices of the reference in CPU memory.
            one_pass: all samples of a process are learned from at once, in no micro-batches.
        """
        dtype = computed_in(policy)
        gathered = Gathered(policy, dtype, copied=self.rollout == "copy")
        mesh = self.device_mesh["data_parallel"]
        self._saving = connect(self.global_rank, self.world_size, 1, limit(self.timeout_seconds))
        kept = self.keeps_layers(one_pass=one_pass)
        shard(policy, mesh, dtype, offload=self.cpu_offload, reshard_after_forward=not kept)
        if reference is not None and not isinstance(reference, AdaptersOff):
            shard(reference, mesh, dtype, offload=reference_on_cpu, reshard_after_forward=True)
        return gathered

    def model_to_device(self) -> None:
        """Move what is not sliced; slices are where they belong."""
        module: Any = self.lightning_module
        move(module.policy, self.root_device)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained: slices, or whole in CPU memory of the first process."""
        module: Any = self.lightning_module
        state = module.policy.state_dict()
        return {f"policy.{name}": self._whole(state[name]) for name in sorted(trained_names(module.policy))}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `Optimizer.state_dict()`: of slices, or of one process in CPU memory of the first."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        found: dict[str, Any] = inner.state_dict()
        states = {
            number: {name: self._whole(value) for name, value in state.items()}
            for number, state in found["state"].items()
        }
        return {**found, "state": states}

    def _whole(self, value: Any) -> Any:
        """A value whole, gathered by itself; of the other processes, which do not write, nothing of a slice is kept."""
        if self.in_parts or not isinstance(value, DTensor):
            return value
        full = whole(value, value.dtype, self.root_device)
        return full.cpu() if self.is_global_zero else full.new_empty(0)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """All processes call it."""
        if self.in_parts:
            write_sharded(checkpoint, Path(filepath), self._saving)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its slice; `StageModule` has compared the names."""
        module: Any = self.lightning_module
        state, saved = module.state_dict(), checkpoint["state_dict"]
        if isinstance(saved, Joined):
            with self._saving.together():
                saved.parts.fill({name: state[name] for name in saved.parts.names}, self._saving)
            saved = saved.plain
        for name, value in saved.items():
            state[name].copy_(sliced(value, state[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if isinstance(saved["state"], Moments):
                states = self._moments(saved["state"], parameters)
            else:
                states = {
                    number: {name: sliced(value, parameters[number]) for name, value in state.items()}
                    for number, state in saved["state"].items()
                }
            optimizer.load_state_dict({**saved, "state": states})

    def _moments(self, saved: Moments, parameters: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
        """This process's slices of a folder, and what is not sliced."""
        slices = {
            key: torch.empty_like(parameters[number], dtype=saved.parts.dtype(key))
            for number, names in saved.sliced.items()
            for key in names.values()
        }
        with self._saving.together():
            saved.parts.fill(slices, self._saving)
        return {
            number: {**plain, **{value: slices[key] for value, key in saved.sliced[number].items()}}
            for number, plain in saved.plain.items()
        }


def sliced(value: Any, like: Tensor) -> Any:
    """A whole tensor as slices like those of `like`; other values as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    place = like.device_mesh.device_type
    full = value.to(place, like.dtype if value.is_floating_point() else value.dtype)
    found = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return found.to(like.to_local().device)


def move(policy: Any, device: torch.device) -> None:
    """Move what is not sliced to the device: the rest of a sliced policy, buffers included."""
    for module in policy.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def idle(policy: nn.Module, planning: bool) -> bool:
    """Whether something is trained that the loss does not depend on: what reads or decodes images, or a text head."""
    parts = IDLE if planning else (*IDLE, "model.lm_head.")
    return any(p.requires_grad and name.startswith(parts) for name, p in policy.named_parameters())


def limit(seconds: float) -> timedelta:
    """A time limit. Raises ValueError for none."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(
            f"trainer.strategy.timeout_seconds must be a positive number of seconds; got {seconds!r}"
        )
    return timedelta(seconds=seconds)


def longer(seconds: float) -> timedelta:
    """The limit of collectives where a process may let the others wait for `seconds`: the heartbeat knows who does."""
    return limit(seconds) + timedelta(seconds=SPARE)


def connected(strategy: Any, prompts: int, group_size: int, config: Mapping[str, Any]) -> Ranks:
    """The processes of a run, each with its part of `prompts` x `group_size` samples.

    Raises ValueError, on all processes, where samples cannot be dealt out or processes are not alike.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return ALONE
    rank, world = strategy.global_rank, strategy.world_size
    span = divide(rank, world, prompts, group_size).span
    seconds = getattr(strategy, "timeout_seconds", 1800)
    ranks = connect(rank, world, span, longer(seconds))
    ranks.agree(versions() | dict(settings(config)))
    if isinstance(strategy, Watched):  # which ends it, too
        ranks = replace(ranks, heart=begin(rank, world, seconds, ranks.exchange))
    return ranks


def settings(config: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of what must be alike in all processes: not what the first one alone logs, and where to."""
    for part, value in config.items():
        full = f"{name}.{part}" if name else str(part)
        if isinstance(value, Mapping) and value:
            yield from settings(value, full)
        elif not full.startswith(OF_THE_FIRST) and not (full.startswith(WITH_FOLDERS) and "/" in str(value)):
            yield full, value


def versions() -> dict[str, str]:
    """What must be alike in all processes: the program, by its hash, and the libraries that numbers come from."""
    return {
        "the code of stage": code_sha256(Path(__file__).parents[1])[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
