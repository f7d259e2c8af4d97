"""The real program in two real processes: one fails, one is killed, all are told to stop; and where they go on from."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import Tensor

from stage.training_checkpoint import read_training_checkpoint
from stage.types import Prompt, Scores
from tests.processes import free_port
from tests.rewards.serving import TOKEN
from tests.tiny_training import ROOT, Redness

QUIET = ("callbacks.validation=null", "callbacks.images=null", "callbacks.progress.every=1")
SMALL = ("data.prompts_per_update=2", "group_size=4", "trainer.accelerator=cpu")
TIME = 60  # seconds in which all processes must have ended


class OnSecond(Redness):
    """In call `at` of the second process: `raise` an error, `kill` the process, or `none` of it, slowly.

    `bug` is an error in the first, of a kind that no user can mend.
    """

    def __init__(self, how: str, at: int) -> None:
        super().__init__(0.0)
        self.how, self.at, self.calls = how, at, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        if self.how == "none":
            time.sleep(0.3)
        elif self.how == "bug" and self.calls == self.at and os.environ.get("RANK") == "0":
            raise KeyError("no such\nword")
        elif self.how != "bug" and self.calls == self.at and os.environ.get("RANK") == "1":
            if self.how == "kill":
                time.sleep(0.5)  # in which it says where it is
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("the reward servers are gone")
        return super().__call__(images, prompts)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """train.py under torchrun."""
    (folder / "conf" / "reward").mkdir(parents=True, exist_ok=True)
    text = "_target_: tests.test_death.OnSecond\nhow: none\nat: 3\n"
    (folder / "conf" / "reward" / "second.yaml").write_text(text, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += [
        "--master-port",
        str(free_port()),
        str(ROOT / "train.py"),
        "--config-dir",
        str(folder / "conf"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*torchrun, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def begin(folder: Path, strategy: str, *arguments: str) -> subprocess.Popen[str]:
    return start(folder, f"strategy={strategy}", "reward=second", "output=run", *QUIET, *SMALL, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "how"), [("ddp", "raise"), ("fsdp", "kill")])
def test_all_processes_end_with_the_reason(tmp_path: Path, strategy: str, how: str) -> None:
    process = begin(tmp_path, strategy, f"reward.how={how}", "updates=5", "callbacks.checkpoints.every=1")
    output, _ = process.communicate(timeout=TIME)
    assert process.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    reason = "process 1 of 2 failed: ConnectionError: the reward servers are gone"
    assert (reason if how == "raise" else "process 1 of 2 has died in reward of update 3; look at") in errors[
        0
    ]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_training_checkpoint(last)["update"] == 2
    again = start(tmp_path, f"resume={last}", "reward=second", "reward.how=none", "updates=3")
    output, _ = again.communicate(timeout=TIME)
    assert again.returncode == 0 and "3 updates done" in output, output


@pytest.mark.slow
def test_the_reason_of_a_bug_comes_before_its_traceback(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "reward.how=bug", "reward.at=1", "updates=2")
    output, _ = process.communicate(timeout=TIME)
    assert process.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: KeyError: 'no such\\nword'", output
    assert output.index(errors[0]) < output.index("Traceback"), output


@pytest.mark.slow
def test_an_error_of_the_first_process_alone_is_not_taken_for_a_signal(tmp_path: Path) -> None:
    """The second leaves on it, and torchrun then sends SIGTERM to the first, which is still on its way out."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "images").touch()  # where a folder should be
    arguments = [
        "strategy=fsdp",
        "reward=second",
        "output=run",
        "callbacks.validation=null",
        *SMALL,
        "updates=2",
    ]
    process = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=TIME)
    assert process.returncode == 1 and "error: File exists: " in output, output
    assert "SIGTERM: stopping" not in output, output


def wait_for(port: int) -> None:
    """Until a server of this machine takes connections."""
    until = time.monotonic() + TIME
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def read_until(process: subprocess.Popen[str], beginning: str) -> IO[str]:
    """Read what a process says up to the line that begins so; the rest is still to be read."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            break
    return process.stdout


def children(pid: int) -> list[int]:
    """Processes that process `pid` has started."""
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_dead_reward_server_ends_all_processes(tmp_path: Path) -> None:
    port, seen = free_port(), ""
    (tmp_path / "served").mkdir()
    serving = [sys.executable, "-m", "tests.rewards.serving", str(port), str(tmp_path / "served")]
    with subprocess.Popen(serving, cwd=ROOT) as server:
        try:
            wait_for(port)
            process = start(
                tmp_path,
                *("strategy=ddp", "reward=remote", f"reward.url=http://127.0.0.1:{port}"),
                *(f"reward.token={TOKEN}", "reward.attempts=4", "reward.backoff_seconds=0.1"),
                *("output=run", "updates=500", "callbacks.checkpoints.every=1000", *QUIET, *SMALL),
            )
            assert process.stdout is not None
            for line in process.stdout:
                seen += line
                if line.startswith("update 2/"):
                    break
            server.kill()
            output = seen + process.communicate(timeout=TIME)[0]
        finally:
            server.kill()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1, output
    assert f"the reward servers http://127.0.0.1:{port} did not answer, last: " in errors[0]
    saved = read_training_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["update"]
    assert f"update {saved} of 500 is saved, go on with: python train.py" in output and saved >= 2


@pytest.mark.slow
def test_a_signal_to_all_or_one_saves_and_leaves(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "updates=200", "callbacks.checkpoints.every=1000")
    read_until(process, "update 2/")
    for child in children(process.pid):  # as srun does, and torchrun then sends its own on to them
        os.kill(child, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIME)
    assert "abandoned" not in output, output
    assert "stopped after update " in output, output
    saved = read_training_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert f"update {saved['update']} of 200 is saved" in output
    assert len(saved["processes"]) == 2 and torch.is_tensor(saved["processes"][1]["torch"])


@pytest.mark.slow
def test_processes_do_not_outlive_torchrun(tmp_path: Path) -> None:
    """Or they would go on writing beside the run that resumes."""
    process = begin(tmp_path, "ddp", "updates=2000", "callbacks.checkpoints.every=2")
    output = read_until(process, "update 3/")
    process.kill()
    killed = time.monotonic()
    rest = output.read()  # ends when nobody has it open any more
    assert time.monotonic() - killed < 15, rest
    (error,) = [line for line in rest.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: torchrun, which started process 0 of 2, has died"), rest
    assert read_training_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["update"] >= 2
