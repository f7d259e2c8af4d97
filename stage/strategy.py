"""How a run is spread over processes: conf/strategy/*.yaml.

`single` is Lightning's own for one process. `ddp` gives every process all weights and averages gradients. `fsdp` slices
weights, gradients and optimizer over the processes.

Checkpoints are of one format, whatever the strategy and the number of processes: the first process writes all of it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from stage.code_version import code_sha256
from stage.policy.drawing import reasons
from stage.policy.gathered import Gathered
from stage.policy.lora import AdaptersOff
from stage.policy.rollout_weights import whole
from stage.policy.sharded import computed_in, shard
from stage.ranks import ALONE, Ranks, connect, divide
from stage.training_checkpoint import trained_names

ROLLOUTS = ("copy", "layers")
IDLE = ("model.model.vision_model.", "model.model.aligner.", "model.model.vqmodel.")
OF_THE_FIRST = (
    "output",
    "trainer",
    "logger",
    "callbacks",
)  # settings with folders, which the first process has alone


class Replicated(DDPStrategy):
    """Every process has all weights; gradients are averaged while the backward pass runs (conf/strategy/ddp.yaml).

    Args:
        timeout_seconds: how long a process waits for another before all of them end.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        # Buffers are frozen, so alike everywhere.
        super().__init__(
            broadcast_buffers=False, gradient_as_bucket_view=True, timeout=limit(timeout_seconds)
        )
        self.timeout_seconds = timeout_seconds

    def configure_ddp(self) -> None:
        # To look for parameters without a gradient takes time, and a warning where there are none.
        module: Any = self.lightning_module
        self._ddp_kwargs["find_unused_parameters"] = idle(module.policy, reasons(module.sampler))
        super().configure_ddp()


class Sharded(ModelParallelStrategy):
    """Weights, gradients and optimizer are sliced over the processes, by decoder layers (conf/strategy/fsdp.yaml).

    Args:
        timeout_seconds: how long a process waits for another before all of them end.
        cpu_offload: keep the slices in CPU memory, and take the optimizer's step there.
        rollout: `copy` gathers all weights once before a rollout, into the storage that the sampler reads; `layers`
            gathers each layer whenever it is read, which is slow and needs no room.

    Raises ValueError for another rollout.
    """

    def __init__(self, *, timeout_seconds: float, cpu_offload: bool, rollout: str) -> None:
        if rollout not in ROLLOUTS:
            raise ValueError(
                f"trainer.strategy.rollout must be {' or '.join(ROLLOUTS)}; got {rollout!r}. Name one of them."
            )
        super().__init__(save_distributed_checkpoint=False, timeout=limit(timeout_seconds))
        self.timeout_seconds, self.cpu_offload, self.rollout = timeout_seconds, cpu_offload, rollout

    def setup_environment(self) -> None:
        self._tensor_parallel_size, self._data_parallel_size = 1, self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, policy: Any, reference: Any, *, reference_on_cpu: bool) -> Gathered:
        """Slice a policy and its reference, in place; what the sampler reads in place of the policy."""
        dtype = computed_in(policy)
        gathered = Gathered(policy, dtype, copied=self.rollout == "copy")
        mesh = self.device_mesh["data_parallel"]
        shard(policy, mesh, dtype, offload=self.cpu_offload)
        if reference is not None and not isinstance(reference, AdaptersOff):
            shard(reference, mesh, dtype, offload=reference_on_cpu)
        return gathered

    def model_to_device(self) -> None:
        """Move what is not sliced; slices are where they belong."""
        module: Any = self.lightning_module
        move(module.policy, self.root_device)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, in CPU memory of the first process."""
        module: Any = self.lightning_module
        state = module.policy.state_dict()
        return {f"policy.{name}": self._whole(state[name]) for name in sorted(trained_names(module.policy))}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `Optimizer.state_dict()` of one process, in CPU memory of the first."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        found: dict[str, Any] = inner.state_dict()
        states = {
            number: {name: self._whole(value) for name, value in state.items()}
            for number, state in found["state"].items()
        }
        return {**found, "state": states}

    def _whole(self, value: Any) -> Any:
        """A value whole; of the others than the first process, which do not write, nothing of a slice is kept."""
        if not isinstance(value, DTensor):
            return value
        full = whole(value, value.dtype, self.root_device)
        return full.cpu() if self.is_global_zero else full.new_empty(0)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)
        return found

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its slice of whole weights; `StageModule` has compared the names."""
        module: Any = self.lightning_module
        state = module.state_dict()
        for name, value in checkpoint["state_dict"].items():
            state[name].copy_(sliced(value, state[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                number: {name: sliced(value, parameters[number]) for name, value in state.items()}
                for number, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})


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


def connected(strategy: Any, prompts: int, group_size: int, config: Mapping[str, Any]) -> Ranks:
    """The processes of a run, each with its part of `prompts` x `group_size` samples.

    Raises ValueError, on all processes, where samples cannot be dealt out or processes are not alike.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return ALONE
    rank, world = strategy.global_rank, strategy.world_size
    span = divide(rank, world, prompts, group_size).span
    ranks = connect(rank, world, span, timedelta(seconds=getattr(strategy, "timeout_seconds", 1800)))
    ranks.agree(versions() | {"configuration": {k: v for k, v in config.items() if k not in OF_THE_FIRST}})
    return ranks


def versions() -> dict[str, str]:
    """What must be alike in all processes: the program, by its hash, and the libraries that numbers come from."""
    return {
        "the code of stage": code_sha256(Path(__file__).parents[1])[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def check_processes(ranks: Ranks, objective: Any) -> None:
    """Raise ValueError for what several processes cannot do."""
    if ranks.world > 1 and objective.resampling_rounds:
        raise ValueError(
            f"groups of equal rewards are replaced in one process alone; got {ranks.world} processes and "
            f"algorithm.resampling_rounds={objective.resampling_rounds}. Set it to 0, or strategy=single."
        )
