"""Two processes of one thread do nearly as much work each as one alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stage.speed.distributed import overhead
from stage.speed.scaling import efficiency, main


def test_shares_by_hand() -> None:
    one = {"images_per_second": 10.0, "processes": 1, "processor_seconds": 0.9}
    two = {"images_per_second": 18.0, "processes": 2, "processor_seconds": 1.0}
    assert efficiency(one, two) == {"clock": pytest.approx(0.9), "processor": pytest.approx(0.9)}


def test_overhead_is_of_medians() -> None:
    seconds = {"single": (2.0, 4.0), "ddp": (3.0, 3.3), "fsdp": (6.0, 3.0)}
    runs = [
        {"strategy": name, "seconds": clock, "processor_seconds": 2 * clock}
        for name, values in seconds.items()
        for clock in values
    ]
    lines = [
        "ddp: +5.0% by the clock, +5.0% of processor time",
        "fsdp: +50.0% by the clock, +50.0% of processor time",
    ]
    assert overhead(runs).splitlines() == lines


@pytest.mark.slow
def test_two_processes_spend_their_time_on_work(tmp_path: Path) -> None:
    """By processor time, which other programs on the machine do not change; half of the work of a default update."""
    main(["--turns", "1", "--updates", "3", "--prompts", "4", "--output", str(tmp_path / "found.json")])
    (turn,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert turn["several"]["processes"] == 2 and turn["several"]["prompts"] == 8
    assert turn["efficiency"]["processor"] > 0.85, turn["efficiency"]
