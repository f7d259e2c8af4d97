"""What a process learns from torchrun and SLURM, and which combinations are refused."""

from __future__ import annotations

import pytest

from stage import processes
from stage.processes import Started, arguments, check_strategy, leave, reason_first, started

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "train"}


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Started(0, 1, 1, 1, None)),
        (TORCHRUN, Started(5, 8, 4, 2, "torchrun")),
        (SLURM, Started(3, 16, 8, 2, "SLURM")),
        (SLURM | {"SLURM_JOB_NAME": "bash"}, Started(0, 1, 1, 1, None)),
        (SLURM | TORCHRUN, Started(5, 8, 4, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Started(0, 1, 1, 1, None)),
    ],
)
def test_how_a_process_was_started(environment: dict[str, str], found: Started) -> None:
    assert started(environment) == found


def test_numbers_that_are_none() -> None:
    with pytest.raises(ValueError, match="--ntasks-per-node as a number"):
        started(SLURM | {"SLURM_NTASKS_PER_NODE": "8(x2)"})


def _as(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in (TORCHRUN | {"RANK": str(rank), "WORLD_SIZE": str(world)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))


def test_only_the_first_process_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    _as(monkeypatch, 0, 2)
    assert arguments(["seed=1"]) == ["seed=1"]
    _as(monkeypatch, 1, 2)
    assert arguments(["seed=1"])[:2] == ["seed=1", "hydra.run.dir=."]
    with pytest.raises(ValueError, match="--multirun in 2 processes"):
        arguments(["-m", "seed=1,2"])


def test_strategy_and_processes_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    check_strategy("single", 1)
    check_strategy("ddp", 1)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 4 train\.py"):
        check_strategy("ddp", 4)
    _as(monkeypatch, 0, 2)
    check_strategy("fsdp", 2)
    with pytest.raises(ValueError, match="torchrun started 2; set strategy=ddp or strategy=fsdp"):
        check_strategy("single", 1)


def said(text: str, known: bool) -> object:
    with pytest.raises(SystemExit) as found:
        leave(text, known_to_all=known)
    return found.value.code


def test_an_error_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    assert said("error: a", True) == "error: a"
    _as(monkeypatch, 1, 2)
    assert said("error: b", True) == 1
    assert said("error: c", False) == "process 1 of 2: error: c"


def test_the_reason_of_a_traceback_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "SECOND", 0.0)
    error = KeyError("a\nb")
    reason_first(error)
    assert capsys.readouterr().err == ""  # one process has but its traceback
    _as(monkeypatch, 1, 2)
    reason_first(KeyError("c"))
    assert capsys.readouterr().err == ""
    _as(monkeypatch, 0, 2)
    reason_first(error)
    reason_first(error)
    assert capsys.readouterr().err == "error: KeyError: 'a\\nb'\n"
