"""`python -m stage.speed`: measure on this machine, and write a table in markdown and the numbers in JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stage.speed.sizes import LANGUAGE, REWARDS

if TYPE_CHECKING:
    import torch

RESULTS = Path("experiments/results")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    # From here on the work, whose imports take seconds: `--help` and a mistyped option need none of them.
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.cache is not None:
        # Triton keeps compiled kernels here; unset, it is ~/.triton/cache.
        os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.rewards is not None:
        from stage.speed.machine import describe
        from stage.speed.rewards import measure_rewards

        rows = measure_rewards(
            options.rewards or list(REWARDS), options.reward_images, device, options.reward_shapes == "tiny"
        )
        write(options.output or RESULTS / "rewards", {"machine": describe(device), "rewards": rows})
        return
    if options.evaluation is not None:
        evaluate(options, device, dtype)
        return
    write(options.output or RESULTS / "speed", rollouts_and_steps(options, device, dtype))


def rollouts_and_steps(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What is measured unless another thing is asked for."""
    from stage.speed.machine import bandwidth, describe
    from stage.speed.rollout import measure_rollouts
    from stage.speed.training import measure_steps

    speed = bandwidth(device)
    rows, checks = measure_rollouts(
        options.models, options.images, device, dtype, speed, options.baseline_tokens
    )
    return {
        "machine": describe(device) | {"bandwidth_tb_per_second": speed / 1e12, "dtype": str(dtype)},
        "rollout": rows,
        "checks": checks,
        "training": measure_steps(options.models, options.step_images, device, dtype),
    }


def evaluate(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """What `--evaluation` asks for; what was measured is written before the scorers are built."""
    from stage.speed.evaluation import measure_drawing, measure_scorers
    from stage.speed.machine import describe

    output = options.output or RESULTS / "evaluation"
    found: dict[str, object] = {"machine": describe(device) | {"dtype": str(dtype)}}
    found["evaluation"] = measure_drawing(
        options.models, options.evaluation, options.evaluation_batch, device, dtype
    )
    write(output, found)
    found["scorers"] = measure_scorers(options.evaluation_scored, device, options.models == ["tiny"])
    write(output, found)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m stage.speed", description=__doc__)
    made.add_argument("--models", nargs="+", choices=list(LANGUAGE), default=["1b", "7b"])
    made.add_argument("--images", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="images a rollout")
    made.add_argument("--step-images", type=int, default=8, help="images a training step")
    made.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    made.add_argument(
        "--baseline-tokens",
        type=int,
        default=64,
        help="tokens that the baselines make before they are scaled",
    )
    made.add_argument(
        "--cache", type=Path, default=None, help="folder of compiled kernels, kept between runs"
    )
    made.add_argument(
        "--rewards",
        nargs="*",
        choices=list(REWARDS),
        default=None,
        help="measure rewards instead: these, or all",
    )
    made.add_argument("--reward-images", type=int, default=32, help="images of one call of a reward")
    made.add_argument("--reward-shapes", choices=["real", "tiny"], default="real", help="tiny tries the path")
    made.add_argument(
        "--evaluation",
        type=int,
        default=None,
        metavar="IMAGES",
        help="measure an evaluation instead: so many images of 2,212, from prompts to PNG files, and its scorers",
    )
    made.add_argument("--evaluation-batch", type=int, default=128, help="images drawn at once")
    made.add_argument(
        "--evaluation-scored", type=int, default=128, help="images that its scorers are timed on"
    )
    made.add_argument(
        "--output",
        type=Path,
        default=None,
        help=f"written with .md and .json; default {RESULTS}/speed, /rewards with --rewards, /evaluation",
    )
    return made


def write(output: Path, found: dict[str, object]) -> None:
    """`output`.json with all numbers and `output`.md with tables, which are printed too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def markdown(found: dict[str, object]) -> str:
    """One table for each list of rows, one line for a mapping."""
    parts = ["# Speed\n"]
    for name, value in found.items():
        if isinstance(value, dict):
            parts.append(", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) + "\n")
        elif isinstance(value, list) and value:
            columns = list(value[0])
            lines = [
                columns,
                ["---"] * len(columns),
                *([_short(row[key]) for key in columns] for row in value),
            ]
            parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _short(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


if __name__ == "__main__":
    main()
