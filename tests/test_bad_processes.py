"""What several processes cannot do: one line of the first, all of them out, and a status that is not 0.

Real processes under torchrun. What torchrun says itself comes after the line, and there is no traceback but its own.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage import processes
from stage.training_checkpoint import read_training_checkpoint
from stage.types import Prompt, Scores
from tests.killed_training import complete, everything, launch, start
from tests.processes import free_port
from tests.tiny_training import ROOT, Redness, tiny_world

TORCHRUN = "torch/distributed/elastic"  # in each line that torchrun logs
HINT = "(HYDRA_FULL_ERROR=1 shows where)"
SETTINGS = (
    "self_check=false",
    "callbacks.validation=null",
    "callbacks.images=null",
    "callbacks.checkpoints.every=1",
    "trainer.accelerator=cpu",
)
ROOM = 1 << 16  # bytes that a file may have; a checkpoint has a million
LIMIT = 240  # seconds of a busy machine


@dataclass(frozen=True)
class World:
    """Where the tests run: weights, prompts, and the arguments of train.py that say so."""

    folder: Path
    arguments: list[str]

    @property
    def last(self) -> Path:
        """The checkpoint of one update of one process."""
        return self.folder / "alone" / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    found = World(folder, [*tiny_world(folder), *SETTINGS, "updates=1"])
    complete(folder / "alone", 1, found.arguments)
    return found


@dataclass(frozen=True)
class Ended:
    """How torchrun ended."""

    status: int
    output: str
    errors: list[str]
    seconds: float

    @property
    def refused(self) -> str:
        """The one line."""
        everything = "\n".join(self.errors)
        assert self.status == 1, everything
        first, hint, *rest = self.errors
        assert first.startswith("error: ") and hint == HINT and TORCHRUN in rest[0], everything
        assert not [line for line in rest if "error: " in line.lower().replace("childfailederror: ", "")]
        assert everything.count("Traceback") <= 1 and "ChildFailedError" in everything
        return first


def torchrun(folder: Path, number: int, script: Path, arguments: Sequence[str]) -> Ended:
    """A program in several processes, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
    command += ["--master-port", str(free_port()), str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    found = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=LIMIT, check=False
    )
    seconds = time.monotonic() - begun
    print(f"{seconds:.1f} s, status {found.returncode}: {shlex.join(arguments[-3:])}\n{found.stderr[:400]}")
    return Ended(found.returncode, found.stdout, found.stderr.splitlines(), seconds)


MISTAKES: dict[str, tuple[int, list[str], str]] = {
    "more processes than prompts": (
        3,
        ["strategy=ddp", "data.prompts_per_update=2"],
        "got data.prompts_per_update=2 for 3 processes. Set it to a multiple or a divisor of 3",
    ),
    "a group that does not divide": (
        2,
        ["strategy=fsdp", "data.prompts_per_update=1", "group_size=3"],
        "a group spans 2 of them, equally many samples each; got group_size=3. Set it to a multiple of 2",
    ),
    "more devices than processes": (
        2,
        ["strategy=ddp", "trainer.devices=4"],
        "strategy=ddp runs one process a device, got trainer.devices=4 and 2 processes",
    ),
    "a strategy for one": (2, ["strategy=single"], "strategy=single is for one process, torchrun started 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_command_line_is_said_at_once(world: World, tmp_path: Path, mistake: str) -> None:
    number, overrides, message = MISTAKES[mistake]
    ended = torchrun(tmp_path, number, ROOT / "train.py", [*world.arguments, *overrides])
    assert message in ended.refused


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices here")
def test_devices_that_are_not_there(world: World, tmp_path: Path) -> None:
    overrides = ["strategy=fsdp", "trainer.accelerator=gpu"]
    ended = torchrun(tmp_path, 2, ROOT / "train.py", [*world.arguments, *overrides])
    assert ended.refused.startswith("error: trainer.accelerator=gpu needs CUDA, and torch finds none")


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_in_two(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.last.parent.parent, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    more = [f"resume={last}", f"output={tmp_path / 'run'}", "updates=2", "strategy=fsdp"]
    job = launch(tmp_path, 2, [*world.arguments[:2], *more])
    assert job.finish() == [0, 0] and "2 updates done" in job.said(), job.said()
    assert read_training_checkpoint(last)["update"] == 2


def other_weights(world: World, folder: Path) -> Path:
    """The base weights with one bit turned."""
    found = shutil.copytree(world.folder / "janus", folder / "janus")
    content = bytearray((found / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (found / "model.safetensors").write_bytes(content)
    return found


@pytest.mark.slow
def test_a_checkpoint_of_another_model(world: World, tmp_path: Path) -> None:
    """Other weights show when they have been read, another kind of model at once."""
    resume = [*world.arguments[:2], f"resume={world.last}", f"output={tmp_path}", "updates=2", "strategy=ddp"]
    weights = f"model.path={other_weights(world, tmp_path)}"
    message = torchrun(tmp_path, 2, ROOT / "train.py", [*resume, weights]).refused
    assert "needs the base it was trained from" in message and "Set model.path to the original" in message
    message = torchrun(tmp_path, 2, ROOT / "train.py", [*resume, "model=janus_pro_1b"]).refused
    assert "goes on with the model, optimizer and schedule of its checkpoint; model." in message
    assert read_training_checkpoint(world.last)["update"] == 1


EITHER = """
import os, runpy, sys
roots, sys.argv = sys.argv[1:3], sys.argv[2:]
root = roots[int(os.environ["RANK"])]
sys.path.insert(0, root)
sys.argv[0] = root + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_processes_of_two_versions(world: World, tmp_path: Path) -> None:
    """The second process runs a copy of the program in which one file has one more line."""
    other, either = tmp_path / "other", tmp_path / "either.py"
    for name in ("stage", "conf"):
        shutil.copytree(ROOT / name, other / name)
    shutil.copyfile(ROOT / "train.py", other / "train.py")
    with (other / "stage" / "objective" / "advantage.py").open("a", encoding="utf-8") as file:
        file.write("\nNEW = True\n")
    either.write_text(EITHER, encoding="utf-8")
    ended = torchrun(tmp_path, 2, either, [str(ROOT), str(other), *world.arguments, "strategy=ddp"])
    message = ended.refused
    assert message.startswith("error: all processes must run the same; the code of stage is "), message
    assert " in process 0 and " in message and " in process 1. Start them from one" in message


class Filling(Redness):
    """From call `at` on leaves no room for a checkpoint on the disk of `folder`, or, of null, for its own process."""

    def __init__(self, noise: float, at: int, folder: str | None) -> None:
        super().__init__(noise)
        self.at, self.folder, self.calls = at, folder, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        if self.calls == self.at and self.folder is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        elif self.calls == self.at and os.environ["RANK"] == "0":
            free = shutil.disk_usage(str(self.folder)).free
            (Path(str(self.folder)) / "filler").write_bytes(bytes(free - ROOM))
        return super().__call__(images, prompts)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(world: World, folder: Path, strategy: str, disk: Path | None) -> None:
    """Four updates in two processes, of which the third finds no room for its checkpoint; then there is room."""
    more = ["reward._target_=tests.test_bad_processes.Filling", f"strategy={strategy}", "updates=4"]
    arguments = [*world.arguments, *more, f"+reward.folder={disk or 'null'}"]
    complete(folder / "whole", 2, [*arguments, "+reward.at=0"])
    cut = (disk or folder) / "cut"
    job = start(cut, 2, [*arguments, "+reward.at=3"])
    statuses = job.finish()
    said = job.said()
    print(f"{time.monotonic() - job.begun:.1f} s\n{said}")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert statuses == [1, 1] and len(errors) == 1 and "Traceback" not in said, said
    reason = "File too large" if disk is None else "No space left on device"
    assert reason in errors[0] and " Make room; " in errors[0]
    left = everything(cut)
    assert left["last.ckpt"]["update"] == 2 and not left["unfinished"]
    if disk is not None:
        (disk / "filler").unlink()
    more = [f"resume={cut / 'run' / 'checkpoints' / 'last.ckpt'}", "+reward.at=0"]
    assert launch(cut, 2, [*arguments[:2], *more]).finish() == [0, 0]
    assert everything(cut) == everything(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(
    world: World, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may have no more bytes than ROOM."""
    monkeypatch.setattr(processes, "PATIENCE", 1.0)  # nobody ends the second process
    fill(world, tmp_path, strategy, None)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(
    world: World, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    fill(world, tmp_path, "ddp", small_disk)


@pytest.mark.slow
def test_a_scorer_that_fails_in_validation_is_not_waited_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that draw together come to the next batch together, or not at all."""
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    reward = [
        "reward._target_=tests.test_death.OnSecond",
        "~reward.noise",
        "+reward.how=raise",
        "+reward.at=1",
    ]
    layers = ["strategy=fsdp", "trainer.strategy.rollout=layers", "trainer.strategy.timeout_seconds=20"]
    arguments = [item for item in world.arguments if item != "callbacks.validation=null"]
    one = "callbacks.validation.prompts_per_batch=1"
    job = launch(tmp_path, 2, [*arguments, *reward, *layers, one, f"output={tmp_path / 'run'}"])
    assert job.finish() == [1, 1]
    errors = [line for line in job.said().splitlines() if line.startswith("error: ")]
    assert errors == ["error: process 1 of 2 failed: ConnectionError: the reward servers are gone"], (
        job.said()
    )


@pytest.mark.slow
def test_processes_that_do_not_reach_one_another(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says its own reason, since it may have one; the first begins."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    ended = torchrun(tmp_path, 2, ROOT / "train.py", [*world.arguments, "strategy=fsdp"])
    said = [line for line in ended.errors if "all processes must reach one another, got: " in line]
    assert ended.status == 1 and [line.partition("all")[0] for line in said] == [
        "error: ",
        "process 1 of 2: error: ",
    ]
    assert said[0] == ended.errors[0] and "nosuch0. Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME" in said[0]
