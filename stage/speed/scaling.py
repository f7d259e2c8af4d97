"""How much of two processes' time is work: as much for each of them, against one process, in turns.

    python -m stage.speed.scaling --output FILE                        # the shipped model, one thread a process
    python -m stage.speed.scaling --strategy fsdp --turns 5 --output FILE

Every process has the same prompts and samples to do. Two numbers, each the median over the turns: images a second and
process by the clock, and work for a second of processor time. The second leaves out waiting, for one another and for
other programs on the machine; the first is right on a machine that is idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stage.speed.sizes import LANGUAGE, SHIPPED

LIMIT = 1800  # seconds for one run


def command(processes: int, options: argparse.Namespace, output: Path) -> list[str]:
    """A run of `processes` of them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    numbers = {
        name: getattr(options, name) for name in ("size", "kind", "strategy", "prompts", "group", "updates")
    }
    settings = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    module = ["-m", "stage.speed.distributed", "--device", "cpu", "--output", str(output)]
    return [sys.executable, *launcher, *module, *settings]


def measure(processes: int, options: argparse.Namespace) -> Mapping[str, Any]:
    """What `stage.speed.distributed` found, with one thread a process. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        asked = command(processes, options, output)
        done = subprocess.run(
            asked, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{processes} processes must come to an end; they said {done.stderr[-2000:]}")
        (found,) = json.loads(output.read_text(encoding="utf-8"))
        return dict(found)


def efficiency(one: Mapping[str, Any], several: Mapping[str, Any]) -> dict[str, float]:
    """Share of one process's speed that each of several has at as much work, by the clock and by processor time."""
    return {
        "clock": several["images_per_second"] / several["processes"] / one["images_per_second"],
        "processor": one["processor_seconds"] / several["processor_seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m stage.speed.scaling", description=__doc__.split("\n")[0])
    made.add_argument("--size", choices=[*LANGUAGE, SHIPPED], default=SHIPPED)
    made.add_argument("--kind", choices=["full", "lora"], default="full")
    made.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--prompts", type=int, default=8, help="prompts an update and process")
    made.add_argument("--group", type=int, default=8, help="images a prompt")
    made.add_argument("--updates", type=int, default=6)
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--output", type=Path, required=True)
    options = made.parse_args(arguments)
    turns = []
    for _ in range(options.turns):
        one, several = measure(1, options), measure(options.processes, options)
        turns.append({"one": one, "several": several, "efficiency": efficiency(one, several)})
        print(
            said(f"{one['seconds']:.2f} s and {several['seconds']:.2f} s an update", turns[-1:]), flush=True
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(turns, indent=1) + "\n", encoding="utf-8")
    print(said(f"median of {len(turns)} turns", turns), flush=True)


def said(name: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """A line of the medians."""
    middle = {kind: median(turn["efficiency"][kind] for turn in turns) for kind in ("clock", "processor")}
    return f"{name}: {middle['clock']:.2f} by the clock, {middle['processor']:.2f} by processor time"


if __name__ == "__main__":
    main()
