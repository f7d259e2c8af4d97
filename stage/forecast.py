"""What a run will take: memory before it starts, hours from the first update."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from stage.memory import Reference, Workload, memory_parts, needed, remedies, shape_of
from stage.optimizer import keeps_masters, state_bytes
from stage.policy import drawing
from stage.policy.lora import has_adapters
from stage.ranks import divide
from stage.rollout import micro_batches, scored_distribution
from stage.sharded_memory import sharded_parts, sharded_peak, slices_of
from stage.strategy import Sharded

SETTLED = 0.8  # a second update below this share of the first shows how much of that was warming up


def memory_line(module: Any, device: torch.device, strategy: Any = None) -> str:
    """Memory of each part on the device, and what the device has. Ask before the weights are moved there.

    Raises ValueError with a setting that makes it fit, where it does not.
    """
    if isinstance(strategy, Sharded):
        return sharded_line(module, device, strategy)
    processes = 1 if strategy is None else getattr(strategy, "world_size", 1)
    shape, run, room = shape_of(module.policy), workload(module, processes), device_memory(device)
    total = needed(shape, run)
    if total > room:
        fitting = next((setting for setting, left in remedies(shape, run) if left <= room), None)
        remedy = "Take fewer images an update or a larger device" if fitting is None else f"Set {fitting}"
        if not has_adapters(module.policy):
            remedy += ", or model/adapter=lora"
        raise ValueError(
            f"a run must fit into the memory of its device; it needs {_listed(shape, run)}, {_size(total)} in "
            f"all, and {device} has {_size(room)}. {remedy}."
        )
    return f"memory on {device}: {_listed(shape, run)}; {_size(total)} of {_size(room)} with slack"


def sharded_line(module: Any, device: torch.device, strategy: Sharded) -> str:
    """The same of one process whose weights are sliced; raises alike."""
    world, shape = strategy.world_size, shape_of(module.policy)
    wide = state_bytes(module.make_optimizer, torch.float32)
    run = replace(workload(module, world), optimizer_bytes=round(wide * shape.trained))
    copied, kept = strategy.rollout == "copy", strategy.keeps_layers(one_pass=run.micro_batch == run.images)
    slices = slices_of(module.policy)
    parts = sharded_parts(shape, slices, run, world, copied=copied, kept=kept, offload=strategy.cpu_offload)
    total, room = sharded_peak(parts), device_memory(device)
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    if total > room:
        advice = "trainer.strategy.rollout=layers" if copied else "trainer.strategy.cpu_offload=true"
        raise ValueError(
            f"a run must fit into the memory of its device; each of {world} processes needs {listed}, {_size(total)} "
            f"at once, and {device} has {_size(room)}. Set {advice}, start more processes, or set model/adapter=lora."
        )
    how = "gathered once a rollout" if copied else "gathered whenever a layer is read, which is slow"
    return (
        f"memory on each of {world} x {device}: {listed}; {_size(total)} at once of {_size(room)} with slack; weights "
        f"are {how}"
    )


def workload(module: Any, processes: int = 1) -> Workload:
    """What the first of so many processes of a `StageModule` will do, in the numbers that memory depends on."""
    part = divide(0, processes, module.prompts.prompts_per_update, module.group_size)
    prompts = module.prompts.batch(0)[part.prompts]
    rows, columns = micro_batches(len(prompts), part.group_size, module.objective.micro_batch)
    largest = max(part.stop - part.start for part in rows) * max(part.stop - part.start for part in columns)
    scored = scored_distribution(module.objective, module.sampler)
    policy = module.policy
    return Workload(
        images=len(prompts) * part.group_size,
        micro_batch=largest,
        prompt_tokens=_prompt_tokens(policy, module.sampler, [prompt.text for prompt in prompts]),
        rollout_rows=2 if module.sampler.guided else 1,
        scored_rows=1 if scored.guidance_scale == 1 and not (scored.varied and module.sampler.guided) else 2,
        optimizer_bytes=module.optimizer_bytes(),
        reference=_reference(module),
        checkpointing=policy.gradient_checkpointing,
        full_attention=policy.language_model.config._attn_implementation == "eager",
    )


def _prompt_tokens(policy: Any, sampler: Any, texts: Sequence[str]) -> int:
    """The longest that can stand before an image, with reasoning a plan that never ends included."""
    length = drawing.tokenize(policy, sampler, texts).ids.shape[1]
    return length + sampler.max_plan_tokens + 1 if drawing.reasons(sampler) else length


def _reference(module: Any) -> Reference:
    if module.reference is None:
        return Reference.NONE
    if has_adapters(module.policy):
        return Reference.SHARED
    return Reference.ON_CPU if module.reference_on_cpu else Reference.COPY


def device_memory(device: torch.device) -> int:
    """Bytes that a run can have: what is free on a GPU, all of the memory for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def lost_steps(module: Any) -> str | None:
    """A warning where weights of 16 bits are trained by an optimizer whose small steps they round away."""
    narrow = any(p.requires_grad and p.element_size() == 2 for p in module.policy.parameters())
    if not narrow or keeps_masters(module.make_optimizer):
        return None
    return (
        "warning: weights of 16 bits are trained without float32 masters, so steps below their spacing are lost "
        "(at a learning rate of 1e-6 nearly all are). Set optimizer=adamw_master, or model/adapter=lora."
    )


def announce(module: Any, strategy: Any, say: Callable[[str], None]) -> None:
    """Say the memory of a run, and print its warning; raises as `memory_line` does."""
    say(memory_line(module, strategy.root_device, strategy))
    if isinstance(strategy, Sharded):
        return  # which makes masters itself
    if (warning := lost_steps(module)) is not None:
        print(warning, file=sys.stderr, flush=True)


def _listed(shape: Any, run: Workload) -> str:
    parts = memory_parts(shape, run)
    reference = "" if run.reference is Reference.COPY else f" ({run.reference.value})"
    return ", ".join(
        f"{name} {_size(size)}{reference if name == 'reference' else ''}" for name, size in parts.items()
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Forecast(Callback):
    """Says after the first update how long the run will take, and again after the second if that was much faster.

    Validation, pictures and checkpoints between the updates are not in it. GPU-hours are hours times processes.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if len(self.seconds) == 2 or not trainer.is_global_zero:
            return
        self.seconds.append(pl_module.latest["time/total"])
        left = pl_module.updates - pl_module.update
        if left > 0 and (len(self.seconds) == 1 or self.seconds[1] < SETTLED * self.seconds[0]):
            gpus = trainer.world_size if trainer.strategy.root_device.type == "cuda" else 0
            print(self.line(left, self.seconds[-1], gpus), flush=True)

    @staticmethod
    def line(left: int, seconds: float, gpus: int) -> str:
        """`79 updates to go at 1.4 s: about 0:01:51, 0.03 hours, validation not counted`, and GPU-hours on GPUs."""
        total = timedelta(seconds=round(left * seconds))
        hours = left * seconds / 3600
        cost = f", {hours * gpus:.2f} GPU-hours" if gpus else ""
        until = f"about {total}" + (f", {hours:.2f} hours{cost}" if hours >= 0.01 else "")
        return f"{left} update{'s' if left > 1 else ''} to go at {seconds:.1f} s: {until}, validation not counted"
