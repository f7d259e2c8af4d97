"""Who does what of an update, and what processes tell one another."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stage.objective.metrics import is_maximum
from stage.ranks import ALONE, LostPeer, PeerError, Ranks, connect, divide
from tests.processes import run


@pytest.mark.parametrize(
    ("world", "prompts", "group"),
    [(1, 3, 5), (2, 2, 4), (2, 8, 4), (4, 2, 6), (8, 1, 8), (6, 3, 4), (3, 9, 2)],
)
def test_every_sample_belongs_to_one_process(world: int, prompts: int, group: int) -> None:
    count = torch.zeros(prompts, group)
    for rank in range(world):
        part = divide(rank, world, prompts, group)
        count[part.prompts, part.samples] += 1
        assert count[part.prompts, part.samples].numel() == prompts * group // world
        assert part.span == max(1, world // prompts)
    assert (count == 1).all()


@pytest.mark.parametrize(
    ("world", "prompts", "group", "message"),
    [
        (2, 3, 4, r"prompts_per_update=3 for 2 processes\. Set it to a multiple or a divisor of 2"),
        (4, 3, 4, r"prompts_per_update=3 for 4 processes"),
        (4, 2, 5, r"a group spans 2 of them.* got group_size=5\. Set it to a multiple of 2"),
    ],
)
def test_samples_that_cannot_be_dealt_out(world: int, prompts: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide(0, world, prompts, group)


def test_one_process_talks_to_itself() -> None:
    assert ALONE.exchange("a") == ["a"] and ALONE.gathered({"x": 1}) == [{"x": 1}]
    assert ALONE.mean({"x": 2.0}, is_maximum) == {"x": 2.0}
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError("mine")


def meet(span: int, seconds: float = 60) -> Ranks:
    """Ranks of the processes that torch.distributed finds in the environment."""
    dist.init_process_group("gloo")
    return connect(dist.get_rank(), dist.get_world_size(), span, timedelta(seconds=seconds))


def _talk() -> dict[str, Any]:
    ranks = meet(2)
    metrics: dict[str, float] = {"mean": float(ranks.rank), "policy/ratio_max": 3.0 + ranks.rank}
    if ranks.rank:
        metrics["only/here"] = 7.0
    part = torch.arange(6.0).view(1, 2, 3) + 10 * ranks.rank
    return {
        "texts": ranks.exchange("" if ranks.rank else "ünd"),
        "metrics": ranks.mean(metrics, is_maximum),
        "floats": ranks.whole_group(part),
        "flags": ranks.whole_group(part > 3),
        "narrow": ranks.whole_group(part.bfloat16()),
    }


def test_two_processes_talk(tmp_path: Path) -> None:
    for found in run(2, tmp_path, _talk):
        assert found["texts"] == ["ünd", ""]
        assert found["metrics"] == {"mean": 0.5, "policy/ratio_max": 4.0, "only/here": 7.0}
        whole = torch.tensor([[[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]]).float()
        assert found["floats"].equal(whole)
        assert found["flags"].equal(whole > 3) and found["narrow"].equal(whole.bfloat16())


def _fail() -> list[str]:
    ranks, said = meet(1), []
    for block in (lambda: 1 / ranks.rank, lambda: None, lambda: [][ranks.rank]):
        try:
            with ranks.together():
                block()
            said.append("well")
        except Exception as error:
            assert getattr(error, "on_all_ranks", False)
            said.append(f"{type(error).__name__}: {error}")
            assert getattr(error, "kind", "ZeroDivisionError") == "ZeroDivisionError"
    try:
        ranks.agree({"torch": "2.15", "python": f"3.{ranks.rank}"})
    except ValueError as error:
        said.append(str(error))
    try:
        ranks.agree({"torch": "2.15"} | ({"seed": 3} if ranks.rank else {}))
    except ValueError as error:
        said.append(str(error))
    return said


def test_an_error_of_one_process_is_an_error_of_all(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, _fail)
    unlike = "python is 3.0 in process 0 and 3.1 in process 1"
    assert first[:2] == ["ZeroDivisionError: float division by zero", "well"] or first[0].startswith(
        "ZeroDiv"
    )
    assert second[0].startswith("PeerError: process 0 of 2 failed: ZeroDivisionError: ")
    assert first[2].startswith("IndexError") and second[2].startswith("IndexError")
    assert unlike in first[3] and unlike in second[3]
    assert "seed is None in process 0 and 3 in process 1" in first[4]
    assert issubclass(PeerError, ValueError)


def _wait() -> float:
    ranks = meet(1, seconds=2)
    if ranks.rank == 1:
        time.sleep(6)
        return 0.0
    begun = time.monotonic()
    with pytest.raises(LostPeer, match="one has died or let process 0 wait"):
        ranks.exchange("anyone?")
    return time.monotonic() - begun


def test_a_process_that_does_not_come_ends_the_wait(tmp_path: Path) -> None:
    assert 1 < run(2, tmp_path, _wait)[0] < 5
