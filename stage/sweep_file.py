"""Is this a sweep that W&B would run as it is meant? Asked before anything is registered.

python -m stage.sweep_file sweeps/NAME.yaml ...     a line a file: how many runs, or what is wrong and exit status 1

`wandb sweep` registers a file with an unknown key after a warning, and an agent finds out run by run that a setting
does not exist. Here every point of a grid is expanded by W&B's own code into the command that its agent would start,
and each of these commands is composed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stage import launch, mistakes

ROOT = Path(__file__).resolve().parents[1]
# The keys of W&B's sweep configuration: docs.wandb.ai/models/sweeps/define-sweep-configuration.
REQUIRED = {"program", "method", "metric", "parameters", "command", "name", "project"}
KNOWN = REQUIRED | {"entity", "description", "early_terminate", "run_cap"}
MACROS = {"env": ["/usr/bin/env"], "interpreter": ["python"]}
RUN_ID = "${oc.env:WANDB_RUN_ID}"  # what keeps two runs of a sweep apart


def load(file: Path) -> dict[str, Any]:
    """The mapping that a sweep file holds. Raises ValueError for another file, OSError for none."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"a sweep is a mapping of {', '.join(sorted(REQUIRED))}; {file} holds {found!r}")
    return found


def faults(sweep: Mapping[str, Any]) -> Iterator[str]:
    """What W&B would refuse, silently ignore, or run without an objective or into another run's folder."""
    unknown = [f"{key} is no key of a sweep" for key in sorted(set(sweep) - KNOWN)]
    missing = [f"{key} is missing" for key in sorted(REQUIRED - set(sweep))]
    yield from (*unknown, *missing)
    if missing:
        return
    if sweep["method"] != "grid":
        yield "method: only a grid has points to list"
    for name, parameter in sweep["parameters"].items():
        if not isinstance(parameter, Mapping) or set(parameter) not in ({"values"}, {"value"}):
            yield f"{name}: a parameter of a grid has value or values"
        elif "values" in parameter and (
            not parameter["values"] or len(set(map(str, parameter["values"]))) < len(parameter["values"])
        ):
            yield f"{name}: values are different and at least one, or two runs would be one"
    metric = sweep["metric"]
    if set(metric) != {"name", "goal"} or metric["goal"] not in ("minimize", "maximize"):
        yield "metric has a name and a goal, minimize or maximize"
    elif not str(metric["name"]).startswith(("validation/", "reward/")) or metric["name"].endswith("/"):
        yield f"metric: {metric['name']} is no score that training logs (validation/... or reward/...)"
    words = [str(word) for word in sweep["command"]]
    if not any(word.startswith("output=") and RUN_ID in word for word in words):
        yield f"command: output needs {RUN_ID}, or all runs would have one folder"
    if "${args_no_hyphens}" not in words:
        yield "command: ${args_no_hyphens} is missing, so no run would get its parameters"


def points(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each run of a grid."""
    parameters = {name: p.get("values", [p.get("value")]) for name, p in sweep["parameters"].items()}
    choices = [[(name, value) for value in values] for name, values in parameters.items()]
    return [dict(point) for point in itertools.product(*choices)]


def command(sweep: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """What W&B's agent would start for a point, by W&B's own code."""
    from wandb.sdk.launch.sweeps import utils

    values = utils.create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in point.items()}}
    )
    values |= {**MACROS, "program": [sweep["program"]]}
    words: list[str] = []
    for word in utils.create_sweep_command(list(sweep["command"])):
        macro = str(word).startswith("${") and str(word).endswith("}")
        words += values.get(word[2:-1], []) if macro else [str(word)]
    return words


@cache
def problem(words: tuple[str, ...]) -> str | None:
    """Why a command of a run does not compose, in one line; None where it does."""
    from hydra import compose, initialize_config_dir

    _register()
    overrides = [word for word in words[len(MACROS) + 1 :] if not word.startswith("output=")]
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            launch.check(compose("train", overrides))
    except Exception as error:
        text = mistakes.explain(error)
        if text is None:
            raise
        return text
    return None


@cache
def _register() -> None:
    launch.register_experiments(ROOT / "experiments")


def check(file: Path) -> int:
    """The number of runs of a sweep file. Raises ValueError with the first mistake and how many more there are."""
    sweep = load(file)
    found = list(faults(sweep))
    grid = [] if found else points(sweep)
    seen: set[str] = set()
    for point in grid:
        text = problem(
            tuple(command(sweep, {name: value for name, value in point.items() if name != "seed"}))
        )
        if text is not None and text not in seen:
            seen.add(text)
            found.append(f"{' '.join(f'{name}={value}' for name, value in point.items())}: {text}")
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{file}: {found[0]}{more}. Known keys are {', '.join(sorted(KNOWN))}")
    return len(grid)


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    wrong = []
    for name in arguments:
        try:
            print(f"{name}: {check(Path(name))} runs, and every one of them composes")
        except (ValueError, OSError) as error:
            wrong.append(f"error: {error}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
