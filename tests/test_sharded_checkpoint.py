"""A checkpoint in parts: the bits of one file, a whole name or none, and one line for each way in which it is bad."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stage import sharded_checkpoint
from stage.checkpoints import Checkpoints
from stage.sharded_checkpoint import OPTIMIZER, RECORD, WEIGHTS, Parts, is_sharded
from stage.training_checkpoint import checkpoint_sha256, read_training_checkpoint
from tests.processes import finish, run, start
from tests.sliced import connected, slice_up
from tests.test_strategy import FSDP
from tests.tiny_training import Redness, objective, tiny_base, tiny_module, tiny_trainer

PROCESSES = {"strategy": FSDP, "devices": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two updates in one file."""
    folder = tmp_path_factory.mktemp("whole")
    train(base, folder, 2, {}, every=2)
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes."""
    folder = tmp_path_factory.mktemp("parts")
    return slice_up(whole, folder / "last.ckpt", folder / "results")


def train(
    base: Path,
    folder: Path,
    updates: int,
    processes: dict[str, Any],
    resume: Path | None = None,
    before: Callable[[Any], None] | None = None,
    **settings: Any,
) -> None:
    """Train with a checkpoint after every update; `before(module)` is called before each."""
    changes: dict[str, Any] = {"every": 1, "keep": 1, "beside_training": False, "monitor": "none"}
    keep = Checkpoints(folder=str(folder), **(changes | settings))
    module = tiny_module(
        base,
        scorer=Redness(),
        objective=objective("grpo"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        updates=updates,
    )
    if before is not None:
        step = module.training_step
        module.training_step = lambda *args: (before(module), step(*args))[1]  # type: ignore[method-assign]
    tiny_trainer(folder, [keep], [], **processes).fit(module, ckpt_path=resume, weights_only=True)


def damage(parts: Path, into: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint with something done to it."""
    found = into / "last.ckpt"
    for file in parts.rglob("*"):
        if file.is_file():
            target = found / file.relative_to(parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    change(found)
    return found


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_parts_hold_the_bits_of_one_file(whole: Path, parts: Path) -> None:
    one, two = read_training_checkpoint(whole), read_training_checkpoint(parts)
    assert is_sharded(parts) and not is_sharded(whole)
    assert len(list((parts / WEIGHTS).iterdir())) >= 2 and len(list((parts / OPTIMIZER).iterdir())) >= 2
    assert set(one["state_dict"]) == set(two["state_dict"])
    assert all(torch.equal(two["state_dict"][name], value) for name, value in one["state_dict"].items())
    states, read = one["optimizer_states"][0]["state"], two["optimizer_states"][0]["state"]
    assert states.keys() == set(read) and len(states) > 10
    for number, state in states.items():
        assert state.keys() == read[number].keys()
        assert all(torch.equal(read[number][name], value) for name, value in state.items())
    for name in ("update", "config", "overrides", "base", "reward"):
        assert one[name] == two[name]


def test_nothing_in_a_folder_is_a_pickle_of_objects(parts: Path) -> None:
    """A record that loads with `weights_only=True`, and safetensors."""
    torch.load(parts / RECORD, weights_only=True)
    files = {file for file in parts.rglob("*") if file.is_file()} - {parts / RECORD}
    assert files and all(file.suffix == ".safetensors" for file in files)
    assert (parts / RECORD).stat().st_size < 100_000


def test_what_is_not_asked_for_is_not_read(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Parts, name: str) -> torch.Tensor:
        raise AssertionError(name)

    monkeypatch.setattr(Parts, "whole", never)
    found = read_training_checkpoint(parts)
    assert found["update"] == 2 and len(found["state_dict"]) > 10
    with pytest.raises(AssertionError):
        found["state_dict"]["policy.model.model.language_model.norm.weight"]


def test_its_hash_is_that_of_the_weights(parts: Path, tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        file = next((folder / WEIGHTS).iterdir())
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    again = damage(parts, tmp_path / "again", lambda folder: None)
    assert checkpoint_sha256(parts) == checkpoint_sha256(again)
    assert checkpoint_sha256(damage(parts, tmp_path / "other", other)) != checkpoint_sha256(parts)


def test_a_bad_folder_is_one_line(parts: Path, tmp_path: Path) -> None:
    def first(folder: Path) -> Path:
        return sorted((folder / WEIGHTS).iterdir())[0]

    def header(folder: Path) -> None:
        content = bytearray(first(folder).read_bytes())
        content[:8] = b"\xff" * 8
        first(folder).write_bytes(content)

    bad: dict[str, tuple[Callable[[Path], Any], str]] = {
        "truncated": (lambda f: cut(first(f)), r"must have \d+ bytes, it has \d+"),
        "gone": (lambda f: first(f).unlink(), r"must have \d+ bytes, it is not there"),
        "header": (header, "is damaged"),
        "record": (lambda f: cut(f / RECORD), "is damaged"),
        "no record": (lambda f: (f / RECORD).unlink(), "is damaged or not a checkpoint"),
    }
    for name, (change, message) in bad.items():
        with pytest.raises(ValueError, match=message) as found:
            read_training_checkpoint(damage(parts, tmp_path / name, change))
        assert "\n" not in str(found.value)


def test_one_process_goes_on_from_parts(base: Path, whole: Path, parts: Path, tmp_path: Path) -> None:
    """Under strategy=single, and bit for bit as from the file."""
    train(base, tmp_path / "file", 3, {}, whole)
    train(base, tmp_path / "folder", 3, {}, parts)
    one, two = (read_training_checkpoint(tmp_path / n / "last.ckpt") for n in ("file", "folder"))
    assert all(torch.equal(two["state_dict"][name], value) for name, value in one["state_dict"].items())
    assert one["update"] == two["update"] == 3


def fill_another_shape(parts: Path) -> None:
    ranks, mesh = connected(), init_device_mesh("cpu", (2,))
    name = "policy.model.model.language_model.norm.weight"
    target = distribute_tensor(torch.zeros(6), mesh, [Shard(0)], src_data_rank=None)
    with pytest.raises(
        ValueError, match=r"must have the shapes of the model; policy.*norm.weight has \(64,\)"
    ):
        Parts(parts / WEIGHTS).fill({name: target}, ranks)


def test_another_model_is_refused_by_every_process(base: Path, parts: Path, tmp_path: Path) -> None:
    run(2, tmp_path / "shape", fill_another_shape, parts)
    other = tiny_base(tmp_path / "other")
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    finish(start(2, tmp_path / "base", train, other, tmp_path / "run", 3, PROCESSES, parts))
    said = [(tmp_path / "base" / f"{rank}.error").read_text().splitlines()[-1] for rank in range(2)]
    assert all("needs the base it was trained from" in line for line in said), said


def test_a_truncated_part_is_refused_by_every_process(base: Path, parts: Path, tmp_path: Path) -> None:
    bad = damage(parts, tmp_path, lambda folder: cut(sorted((folder / OPTIMIZER).iterdir())[-1]))
    finish(start(2, tmp_path / "results", train, base, tmp_path / "run", 3, PROCESSES, bad))
    said = [(tmp_path / "results" / f"{rank}.error").read_text().splitlines()[-1] for rank in range(2)]
    assert all(line.startswith("ValueError: checkpoint") and "must have" in line for line in said), said


def test_a_whole_checkpoint_of_slices_is_not_copied_once_more(base: Path, tmp_path: Path) -> None:
    def beside(base: Path, folder: Path) -> None:
        processes = {"strategy": FSDP | {"checkpoint": "whole"}, "devices": 2}
        train(base, folder, 1, processes, beside_training=True)

    finish(start(2, tmp_path / "results", beside, base, tmp_path / "run"))
    said = [(tmp_path / "results" / f"{rank}.error").read_text().splitlines()[-1] for rank in range(2)]
    assert all("Set trainer.strategy.checkpoint=sharded" in line for line in said), said


def killed(base: Path, folder: Path, moment: str, beside: bool) -> None:
    """Train until a process is killed while it writes the checkpoint of update 2; the other lives on, waiting."""
    rank, calls = int(os.environ["RANK"]), []
    original = getattr(sharded_checkpoint, moment)

    def die(*arguments: Any) -> Any:
        calls.append(moment)
        per_save = 2 if moment == "_write_part" else 1
        if rank == (1 if moment == "_write_part" else 0) and len(calls) > per_save:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(sharded_checkpoint, moment, die)
    train(base, folder, 4, PROCESSES, beside_training=beside)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
@pytest.mark.parametrize("moment", ["_write_part", "_complete"])
def test_a_kill_while_parts_are_written_keeps_the_former(
    base: Path, tmp_path: Path, moment: str, beside: bool
) -> None:
    """Of the second process before its part of the weights, of the first before the record; SIGKILL both times."""
    processes = start(2, tmp_path / "results", killed, base, tmp_path / "run", moment, beside)
    begun = time.monotonic()
    finish(processes, 40)
    assert -signal.SIGKILL in [process.exitcode for process in processes] and time.monotonic() - begun < 40
    names = {path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name}
    left = {".update_00000002.ckpt.parts"}  # the first process, where it lives, removes it
    assert names - left == {"last.ckpt", "update_00000001.ckpt"} and (left <= names) == (
        moment == "_complete"
    )
    assert read_training_checkpoint(tmp_path / "run" / "last.ckpt")["update"] == 1
    train(base, tmp_path / "run", 2, {}, tmp_path / "run" / "last.ckpt")
    assert {path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name} == {"last.ckpt"}


def filled_up(base: Path, folder: Path, beside: bool) -> None:
    """The second process can write no file of more than 1 KB any more, while the first save may still be written."""

    def before(module: Any) -> None:
        if module.update == (2 if beside else 1) and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    try:
        train(base, folder, 4, PROCESSES, before=before, beside_training=beside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
def test_a_full_disk_of_one_process_ends_all_and_keeps_the_former(
    base: Path, tmp_path: Path, beside: bool
) -> None:
    finish(start(2, tmp_path / "results", filled_up, base, tmp_path / "run", beside))
    said = [(tmp_path / "results" / f"{rank}.error").read_text().splitlines()[-1] for rank in range(2)]
    assert all("process 1 cannot write its part of a checkpoint: [Errno 27]" in line for line in said), said
    last = read_training_checkpoint(tmp_path / "run" / "last.ckpt")["update"]
    assert last == 1 or (beside and last == 2)
    names = {path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name}
    assert names == {"last.ckpt", f"update_{last:08d}.ckpt"}
