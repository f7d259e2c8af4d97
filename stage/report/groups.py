"""Which runs belong together: those that differ in nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage.report.read import Run

# Settings that say where a run lies or who watches it, not what it is.
PER_RUN = ("output", "name", "resume", "logger", "callbacks")
LEARNING = "callbacks.reference."  # the one callback that moves what is learned


@dataclass(frozen=True)
class Group:
    """Runs equal but for their seeds, by seed."""

    label: str
    runs: Mapping[int, Run]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs whose configurations are equal but for the seed and the folder, in order of first appearance.

    Groups are called by their algorithm; where that is not enough, by what else differs between them.
    """
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if "seed" not in run.config:
            raise ValueError(
                f"{run.folder} has no config.yaml with a seed, so it belongs to no group; give run folders"
            )
        found.setdefault(tuple(sorted(settings_of(run.config))), []).append(run)
    labels = _labels(list(found), [members[0].config for members in found.values()])
    return [Group(label, _by_seed(members)) for label, members in zip(labels, found.values(), strict=True)]


def algorithm_label(config: Mapping[str, Any]) -> str:
    """`grpo`, `stage`, or grpo with the parts of STAGE that are on."""
    algorithm = config.get("algorithm") or {}
    if "reweight_advantage" not in algorithm:
        return str(algorithm.get("_target_", "unknown algorithm")).rpartition(".")[2]
    parts = {
        "advantage weights": bool(algorithm["reweight_advantage"]),
        "KL weights": bool(algorithm["reweight_kl"]),
        "entropy reward": algorithm["entropy_coefficient"] != 0,
    }
    on = [name for name, used in parts.items() if used]
    if "Released" in str((algorithm.get("advantage") or {}).get("_target_")):
        return "stage_released"
    return "stage" if len(on) == len(parts) else " + ".join(["grpo", *on])


def _by_seed(runs: Sequence[Run]) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in runs:
        seed = int(run.config["seed"])
        if seed in found:
            raise ValueError(
                f"{found[seed].folder} and {run.folder} have the same settings and the same seed {seed}; give one of "
                "them, or the mean would count it twice"
            )
        found[seed] = run
    return dict(sorted(found.items()))


def settings_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Flat (name, value) of all settings that make a run what it is, apart from its seed and its folder."""
    seed, output = config["seed"], str(config.get("output", "\0"))
    for name, value in _flat(config, ""):
        seeded = name.rpartition(".")[2] == "seed" and value == seed
        watched = name.partition(".")[0] in PER_RUN and not name.startswith(LEARNING)
        if not watched and not seeded and not str(value).startswith(output):
            yield name, repr(value)


def _flat(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _labels(
    settings: Sequence[tuple[tuple[str, str], ...]], configs: Sequence[Mapping[str, Any]]
) -> list[str]:
    labels = [algorithm_label(config) for config in configs]
    full = []
    for label, mine in zip(labels, settings, strict=True):
        alike = [dict(other) for name, other in zip(labels, settings, strict=True) if name == label]
        differing = [key for key, value in mine if any(other.get(key) != value for other in alike)]
        values = dict(mine)
        # Another class has other arguments, which its name stands for.
        classes = {key.removesuffix("_target_") for key in differing if key.endswith("._target_")}
        telling = [
            key for key in differing if key.endswith("._target_") or not key.startswith(tuple(classes))
        ]
        full.append(", ".join([label, *(said(key, values[key]) for key in telling[:3])]))
    return full


def said(key: str, value: str) -> str:
    """A setting in a few words: `lr=0.0003`, or `aggregation=FixedLength` where it names a class."""
    *_, owner, name = ["", *key.split(".")]
    return f"{owner}={value.strip(chr(39)).rpartition('.')[2]}" if name == "_target_" else f"{key}={value}"
