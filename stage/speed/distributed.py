"""Training steps of one and of several processes, by the training module itself, on policies with random weights.

    torchrun --standalone --nproc-per-node 2 -m stage.speed.distributed --size 7b --kind full --output FILE
    python -m stage.speed.distributed --overhead --size 1b --output FILE      # the wrappers, one process
    python -m stage.speed.distributed --table --output FILE                   # all that FILE holds

`--checkpoint whole|sharded`, with `--beside` by a thread, saves after each update into a folder beside FILE.

Every run appends to FILE (JSON); the table has seconds an update, processor time of a process, shares, memory, and weak
scaling: images a second and process against the run of one process that is otherwise the same. `--size shipped` is the
tiny Janus of the package. `stage.speed.scaling` measures two processes against one.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from stage.checkpoints import AtomicCheckpointIO
from stage.data import PromptStream
from stage.module import StageModule
from stage.optimizer import MasterAdamW
from stage.policy.lora import add_lora
from stage.policy.sampler import Sampler
from stage.processes import started
from stage.speed.machine import describe
from stage.speed.models import build_policy, shipped_prompts, speed_prompts
from stage.speed.rollout import GUIDANCE
from stage.speed.saves import Saves
from stage.speed.sizes import LANGUAGE, SHIPPED
from stage.speed.training import ADAM, FROZEN, LORA, brightness, stage_objective
from stage.strategy import Replicated, Sharded
from stage.types import Prompt

PROMPTS = 64  # of the list that updates read
WARM_UP = 1  # updates that are not measured: kernels are compiled, memory is taken
TIMEOUT = 120.0
STRATEGIES = ("single", "ddp", "fsdp")
SHARES = ("rollout", "gather", "reward", "update")


@dataclass(frozen=True)
class Run:
    """What is measured: `prompts` of `group` images each an update, over all processes."""

    size: str
    layers: int | None
    kind: str
    strategy: str
    prompts: int
    group: int
    updates: int
    seed: int
    rollout: str
    offload: bool
    checkpoint: str | None
    beside: bool


class Rows(Callback):
    """What every update logged; memory is counted from the first of them on."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.process_time()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        used = {"time/processor": time.process_time() - self._started}
        self.rows.append(pl_module.latest | reserved(pl_module.device) | used)
        if trainer.is_global_zero:
            row = pl_module.latest
            print(
                f"update {pl_module.update}: {row['time/total']:.2f} s, loss {row['loss/total']:.6g}, gradient norm "
                f"{row['policy/gradient_norm']:.6g}",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The processor time of an update is the mean over the processes."""
        everywhere = pl_module.ranks.gathered([row["time/processor"] for row in self.rows])
        for row, found in zip(self.rows, zip(*everywhere, strict=True), strict=True):
            row["time/processor"] = sum(found) / len(found)


def reserved(device: torch.device) -> dict[str, float]:
    """Bytes that the allocator took from a CUDA device, used or not, at most; nothing for another device."""
    if device.type != "cuda":
        return {}
    return {"reserved_bytes": float(torch.cuda.max_memory_reserved(device))}


def strategy_of(run: Run) -> Any:
    """The strategy of a run, for Lightning's trainer."""
    if run.strategy == "fsdp":
        checkpoint = run.checkpoint or "sharded"
        return Sharded(
            timeout_seconds=TIMEOUT, cpu_offload=run.offload, rollout=run.rollout, checkpoint=checkpoint
        )
    return Replicated(timeout_seconds=TIMEOUT) if run.strategy == "ddp" else "auto"


def module_of(run: Run, device: torch.device) -> StageModule:
    """The module of a run, its weights on `device`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = build_policy(run.size, device, dtype, layers=run.layers)
    policy.freeze(FROZEN)
    seed_everything(run.seed, verbose=False)
    if run.kind == "lora":
        add_lora(policy, **LORA)
    policy.enable_gradient_checkpointing()
    masters = run.kind == "full" and run.strategy != "fsdp"
    adam: Any = partial(MasterAdamW, **ADAM) if masters else partial(torch.optim.AdamW, fused=True, **ADAM)
    texts = shipped_prompts(PROMPTS) if run.size == SHIPPED else speed_prompts(PROMPTS)
    prompts = tuple(Prompt(number, text) for number, text in enumerate(texts))
    return StageModule(
        policy=policy,
        sampler=Sampler(GUIDANCE, 1.0),
        scorer=brightness,
        objective=stage_objective(),
        prompts=PromptStream(prompts, run.prompts, run.seed),
        optimizer=partial(adam, lr=1e-4 if run.kind == "lora" else 1e-6),
        scheduler=partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0, total_iters=0),
        group_size=run.group,
        gradient_clip=1.0,
        seed=run.seed,
        updates=run.updates,
        base={"path": "random", "sha256": "random"},
        reward_beside_reference=False,
        reference_on_cpu=False,
        config=asdict(run),
        overrides=[],
    )


def measure(run: Run, device: torch.device, folder: Path) -> dict[str, Any]:
    """One run in this process and its peers; all of them must call it. Checkpoints lie in `folder` meanwhile."""
    rows, processes = Rows(), started()
    saves = Saves(folder / "checkpoints", run.beside) if run.checkpoint else None
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        strategy=strategy_of(run),
        devices=processes.here,
        num_nodes=processes.machines,
        max_epochs=-1,
        callbacks=[rows, *([saves] if saves else [])],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=saves is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = module_of(run, device)
    trainer.fit(module)
    found = asdict(run) | {"processes": processes.world} | summary(rows.rows)
    if saves is not None:
        found |= saves.summary()
        if processes.rank == 0:
            shutil.rmtree(saves.folder)
    del module, trainer, rows, saves  # Lightning gives callbacks methods of the module
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the updates that are measured, and loss and gradient norm of all."""
    measured = rows[min(WARM_UP, len(rows) - 1) :]
    middle = {name: median(row[name] for row in measured) for name in measured[0]}
    shares = {f"{name}_share": middle.get(f"time/{name}_share", 0.0) for name in SHARES}
    return {
        "seconds": middle["time/total"],
        "processor_seconds": middle["time/processor"],
        "images_per_second": middle["time/images_per_second"],
        **shares,
        "peak_gib": max(row["time/peak_memory_bytes"] for row in measured) / 2**30,
        "reserved_gib": max(row["reserved_bytes"] for row in measured) / 2**30
        if "reserved_bytes" in middle
        else None,
        "loss": [row["loss/total"] for row in rows],
        "gradient_norm": [row["policy/gradient_norm"] for row in rows],
    }


def append(file: Path, found: Mapping[str, Any], device: torch.device) -> None:
    """One more result in the list of a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    known.append({**found, **describe(device)})
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a run, and the gaps of loss and gradient norm between runs of the same samples."""
    columns = [
        "size",
        "layers",
        "kind",
        "strategy",
        "processes",
        "prompts",
        "group",
        "seconds",
        "processor_seconds",
        "images_per_second",
    ]
    columns += [*(f"{name}_share" for name in SHARES), "peak_gib", "reserved_gib"]
    columns += ["checkpoint", "beside", "save_seconds"]
    lines = [[*columns, "weak_scaling", "loss_gap", "norm_gap"], ["---"] * (len(columns) + 3)]
    for row in results:
        efficiency, gaps = scaling(row, results), apart(row, results)
        # Results of earlier days know nothing of later columns.
        lines.append([*(short(row.get(name)) for name in columns), short(efficiency), *map(short, gaps)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def overhead(runs: Sequence[Mapping[str, Any]]) -> str:
    """What ddp and fsdp cost beside single, in seconds of an update and of processor time, median of their runs."""
    kinds = ("seconds", "processor_seconds")

    def middle(strategy: str, kind: str) -> float:
        return median(row[kind] for row in runs if row["strategy"] == strategy)

    lines = []
    for strategy in STRATEGIES[1:]:
        clock, processor = (middle(strategy, kind) / middle("single", kind) - 1 for kind in kinds)
        lines.append(f"{strategy}: {clock:+.1%} by the clock, {processor:+.1%} of processor time")
    return "\n".join(lines)


def scaling(row: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> float | None:
    """Images a second and process, over those of one process with as much work a process."""
    alike = ("size", "layers", "kind", "strategy", "group", "rollout", "offload", "device")
    each = row["prompts"] / row["processes"]
    for other in results:
        if other["processes"] == 1 and other["prompts"] == each and all(other[n] == row[n] for n in alike):
            return float(row["images_per_second"] / row["processes"] / other["images_per_second"])
    return None


def apart(row: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Largest difference of loss, and relative one of gradient norm, from the same samples in one process."""
    alike = ("size", "layers", "kind", "prompts", "group", "seed", "updates")
    for other in results:
        if other["processes"] == 1 and all(other[name] == row[name] for name in alike):
            loss = max(abs(a - b) for a, b in zip(row["loss"], other["loss"], strict=True))
            pairs = zip(row["gradient_norm"], other["gradient_norm"], strict=True)
            return loss, max(abs(a - b) / max(b, 1e-12) for a, b in pairs)
    return None, None


def short(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m stage.speed.distributed", description=__doc__.split("\n")[0]
    )
    made.add_argument("--size", choices=[*LANGUAGE, SHIPPED], default="7b")
    made.add_argument("--layers", type=int, default=None, help="fewer layers than the size has")
    made.add_argument("--kind", choices=["full", "lora"], default="full")
    made.add_argument("--strategy", choices=STRATEGIES, default="fsdp")
    made.add_argument("--prompts", type=int, default=1, help="prompts an update and process")
    made.add_argument(
        "--all-prompts", type=int, default=None, help="prompts an update over all processes instead"
    )
    made.add_argument("--group", type=int, default=8, help="images a prompt")
    made.add_argument("--updates", type=int, default=4)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rollout", choices=["copy", "layers"], default="copy")
    made.add_argument("--offload", action="store_true", help="slices in CPU memory")
    made.add_argument(
        "--checkpoint", choices=["whole", "sharded"], default=None, help="save after each update"
    )
    made.add_argument("--beside", action="store_true", help="a thread writes what is saved")
    made.add_argument("--overhead", action="store_true", help="each strategy in turn, in one process")
    made.add_argument("--turns", type=int, default=2, help="of --overhead")
    made.add_argument("--table", action="store_true", help="print what the file holds and stop")
    made.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--output", type=Path, required=True)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options, processes = parser().parse_args(arguments), started()
    warnings.simplefilter("ignore")  # libraries warn of what is meant to be so
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not options.table:
        device = torch.device(options.device)
        if device.type == "cuda":
            device = torch.device("cuda", processes.rank % processes.here)
            torch.cuda.set_device(device)
        total = options.all_prompts or options.prompts * processes.world
        names = STRATEGIES * options.turns if options.overhead else (options.strategy,)
        runs = []
        for name in names:
            shape = (options.size, options.layers, options.kind, name, total, options.group, options.updates)
            more = (options.seed, options.rollout, options.offload, options.checkpoint, options.beside)
            found = measure(Run(*shape, *more), device, options.output.absolute().parent)
            runs.append(found)
            if processes.rank == 0:
                append(options.output, found, device)
        if options.overhead:
            print(overhead(runs), flush=True)
    if processes.rank == 0:
        print(table(json.loads(options.output.read_text(encoding="utf-8"))), flush=True)


if __name__ == "__main__":
    main()
