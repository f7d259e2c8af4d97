"""Measured updates of one and of several processes: what a run keeps, and how two of them are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.speed.distributed import apart, main, reserved, scaling, summary, table
from tests.processes import run

CPU = torch.device("cpu")


def result(**changes: Any) -> dict[str, Any]:
    """What one run leaves, with some values changed."""
    found: dict[str, Any] = {
        "size": "tiny",
        "layers": None,
        "kind": "full",
        "strategy": "fsdp",
        "prompts": 2,
        "group": 4,
    }
    found |= {
        "updates": 2,
        "seed": 0,
        "rollout": "copy",
        "offload": False,
        "processes": 1,
        "device": "a card",
    }
    found |= {"seconds": 2.0, "images_per_second": 4.0, "peak_gib": 10.0}
    found |= {f"{name}_share": 0.25 for name in ("rollout", "gather", "reward", "update")}
    return found | {"loss": [1.0, 2.0], "gradient_norm": [4.0, 5.0]} | changes


def update(seconds: float, **more: float) -> dict[str, float]:
    row = {"time/total": seconds, "time/images_per_second": 8 / seconds, "time/gather_share": seconds / 10}
    row |= {"time/rollout_share": 0.5, "time/reward_share": 0.0, "time/update_share": 0.25}
    return (
        row
        | {"time/peak_memory_bytes": seconds * 2**30, "time/processor": seconds / 2}
        | {"loss/total": -1.0, "policy/gradient_norm": 3.0}
        | more
    )


def test_the_first_update_warms_up() -> None:
    """Of 9, 1, 4 and 2 seconds the last three are measured: median 2, the largest memory 4 GiB."""
    found = summary([update(9), update(1), update(4), update(2)])
    assert (found["seconds"], found["images_per_second"], found["gather_share"]) == (2, 4, 0.2)
    assert found["peak_gib"] == 4 and found["reserved_gib"] is None
    assert found["loss"] == [-1.0] * 4 and found["gradient_norm"] == [3.0] * 4
    taken = {"reserved_bytes": 6.0 * 2**30}
    assert summary([update(9, **taken), update(1, **taken)])["reserved_gib"] == 6
    assert reserved(CPU) == {}


def test_weak_scaling_is_images_a_second_and_process() -> None:
    """7 images a second in two processes beside 4 in one of them with as much work: 7 / 2 / 4."""
    one = result(prompts=1)
    two = result(processes=2, images_per_second=7.0)
    assert scaling(two, [one, two]) == pytest.approx(0.875) and scaling(one, [one, two]) == 1
    assert scaling(two, [result(), two]) is None  # one process with twice the work of each
    assert scaling(two, [one | {"device": "another card"}, two]) is None


def test_gaps_are_those_of_the_same_samples() -> None:
    """Losses 1, 2 and 1.5, 1.9 are 0.5 apart at most; norms 4, 5 and 4.4, 5 by a tenth."""
    one, two = result(), result(processes=2, loss=[1.5, 1.9], gradient_norm=[4.4, 5.0])
    assert apart(two, [one, two]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert apart(two, [result(seed=1), two]) == (None, None)


def test_the_table_takes_results_without_later_columns() -> None:
    lines = table([result(prompts=1), result(processes=2) | {"reserved_gib": 12.0}]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    heads = [head.strip() for head in lines[0].split("|")]
    one, two = ([cell.strip() for cell in line.split("|")] for line in lines[2:])
    assert one[heads.index("reserved_gib")] == "" and two[heads.index("reserved_gib")] == "12"
    assert two[heads.index("weak_scaling")] == "0.5"


def _measure(file: Path) -> int:
    """One update of the smallest size, and another one."""
    main(["--size", "tiny", "--group", "2", "--updates", "2", "--device", "cpu", "--output", str(file)])
    return 0


@pytest.mark.slow
def test_two_processes_are_measured(tmp_path: Path) -> None:
    """Each has a prompt of its own; the first writes one result, whose shares add up to the whole."""
    file = tmp_path / "results.json"
    run(2, tmp_path / "results", _measure, file)
    (found,) = json.loads(file.read_text(encoding="utf-8"))
    assert (found["processes"], found["prompts"], found["strategy"]) == (2, 2, "fsdp")
    assert sum(found[f"{name}_share"] for name in ("rollout", "gather", "reward", "update")) == pytest.approx(
        1
    )
    assert found["gather_share"] > 0 and found["peak_gib"] > 0 and len(found["loss"]) == 2
    # Both are means over processes.
    assert found["images_per_second"] == pytest.approx(4 / found["seconds"], rel=0.05)
    assert "| tiny |" in table([found])
