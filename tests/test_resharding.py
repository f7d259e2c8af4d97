"""A run goes on from its checkpoint: bit for bit with as many processes, and with fewer, more or another strategy."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.checkpoints import Checkpoints
from stage.training_checkpoint import read_training_checkpoint
from tests.equality import Recorded, largest_gap, whole
from tests.processes import run
from tests.test_strategy import DDP, FSDP
from tests.tiny_training import Redness, objective, tiny_base, tiny_module, tiny_policy, tiny_trainer

UPDATES = 4
WHOLE = FSDP | {"checkpoint": "whole"}
# What the first half saves, and what the second half and the uninterrupted run would save.
KINDS = {
    "ddp": (DDP, DDP),
    "parts": (FSDP, FSDP),
    "whole to parts": (WHOLE, FSDP),
    "parts to whole": (FSDP, WHOLE),
}
WAYS: tuple[tuple[str, Any, int], ...] = (
    ("alone", None, 1),
    ("fsdp", FSDP, 2),
    ("fsdp", FSDP, 1),
    ("ddp", DDP, 2),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


def train(
    base: Path,
    folder: Path,
    strategy: Any,
    updates: int,
    resume: Path | None = None,
    noise: float = 0.0,
    beside: bool = False,
) -> dict[str, Any]:
    """Weights, and moments of the optimizer, after `updates`, with last.ckpt in `folder`."""
    torch.manual_seed(1 if resume is None else 99)
    module = tiny_module(
        base,
        policy=tiny_policy(base).double(),
        sampler=Recorded(),
        scorer=Redness(noise=noise),
        objective=objective("stage"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        updates=updates,
    )
    keep = Checkpoints(folder=str(folder), every=2, keep=1, beside_training=beside, monitor="none")
    changes = {} if strategy is None else {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"])}
    trainer = tiny_trainer(folder, [keep], [], **changes)
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    states = trainer.optimizers[0].state
    return {
        "weights": {n: whole(p.detach()) for n, p in module.policy.named_parameters() if p.requires_grad},
        "moments": {str(i): whole(state["exp_avg"]) for i, state in enumerate(states.values())},
    }


def again(
    base: Path, folder: Path, kinds: tuple[Any, Any], noise: float, beside: bool
) -> list[dict[str, Any]]:
    """All updates at once, and in two halves."""
    half, rest = kinds
    one = train(base, folder / "whole", rest, UPDATES, None, noise)
    train(base, folder / "cut", half, UPDATES // 2, None, noise, beside)
    last = folder / "cut" / "last.ckpt"
    return [one, train(base, folder / "cut", rest, UPDATES, last, noise, beside)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "beside"), [*((kind, False) for kind in KINDS), ("ddp", True), ("parts", True)]
)
def test_as_many_processes_go_on_bit_for_bit(base: Path, tmp_path: Path, kind: str, beside: bool) -> None:
    """The reward draws noise from torch's generator, whose state is saved for each process."""
    for one, two in run(2, tmp_path, again, base, tmp_path / "runs", KINDS[kind], 0.3, beside):
        for part in ("weights", "moments"):
            assert largest_gap(one[part], two[part]) == 0.0
    last = tmp_path / "runs" / "cut" / "last.ckpt"
    saved = read_training_checkpoint(last)
    assert saved["update"] == UPDATES and len(saved["processes"]) == 2
    assert last.is_dir() == (KINDS[kind][1] is FSDP)


@pytest.mark.slow
def test_any_number_of_processes_goes_on(base: Path, tmp_path: Path) -> None:
    """Half of a run by one strategy and the rest by another, in 1 or 2 processes, is the run of one process."""
    one = train(base, tmp_path / "one", None, UPDATES)
    train(base, tmp_path / "half", None, UPDATES // 2)
    begun = {"alone": tmp_path / "half" / "last.ckpt"}
    for name, kind in (("ddp", DDP), ("fsdp", FSDP), ("fsdp whole", WHOLE)):
        folder = tmp_path / name
        run(2, folder / "results", train, base, folder, kind, UPDATES // 2)
        begun[name] = folder / "last.ckpt"
    for start, checkpoint in begun.items():
        for name, strategy, world in WAYS:
            folder = tmp_path / f"{start}-{name}-{world}"
            if strategy is None:
                found = [train(base, folder, None, UPDATES, checkpoint)]
            else:
                found = run(world, folder / "results", train, base, folder, strategy, UPDATES, checkpoint)
            for rank in found:
                for part in ("weights", "moments"):
                    assert largest_gap(rank[part], one[part]) < 1e-8, (start, name, world, part)
