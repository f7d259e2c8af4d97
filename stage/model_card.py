"""The README.md of an exported model: where it comes from, how it was trained, and how it scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stage.provenance import hashes

RESULTS = "results.json"
# Settings of a training run that a card states, as dotted names of its configuration.
STATED = (
    "seed",
    "updates",
    "group_size",
    "data.prompts_per_update",
    "optimizer.lr",
    "model.subfolder",
    "model.revision",
    "model.template.name",
    "model.dtype",
    "sampler.guidance_scale",
    "sampler.temperature",
)


def model_card(
    *,
    title: str,
    base: Mapping[str, str],
    update: int | None,
    trained_with: Mapping[str, Any] | None,
    reward: Mapping[str, Any] | None,
    form: str,
    usage: str,
    results: Sequence[Mapping[str, Any]],
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        base: {"path", "sha256"} of the weights that training started from.
        update: rollouts done; trained_with: the run's configuration; reward: what its scorer was made of. All are
            None for a model without a run.
        form: what the folder holds, in words; usage: Python that loads it.
        results: contents of results.json of evaluations of exactly these weights.
    """
    front = [
        "library_name: transformers",
        "pipeline_tag: text-to-image",
        "tags: [janus, reinforcement-learning, stage]",
    ]
    if "/" in base["path"] and "://" not in base["path"] and not Path(base["path"]).is_absolute():
        front.insert(0, f"base_model: {base['path']}")
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {title}",
        "",
        f"{form[0].upper()}{form[1:]}, exported by `stage`.",
        "",
    ]
    lines += ["## Origin", "", f"- base: `{base['path']}`, sha256 `{base['sha256']}`"]
    if trained_with is not None:
        lines += [f"- updates done: {update}", *_training(trained_with)]
    lines += [
        f"- weights of the reward: `{file}`, sha256 `{digest}`" for file, digest in hashes(reward or {})
    ]
    lines += [
        "",
        "## Scores",
        "",
        *(_scores(results) or ["No evaluation of these weights was found beside them."]),
    ]
    return "\n".join([*lines, "", "## Use", "", "```python", usage, "```", ""])


def find_results(checkpoint: Path, sha256: str) -> list[dict[str, Any]]:
    """results.json of every evaluation, in the run of a checkpoint or in a model folder, that looked at these weights.

    `sha256` is that of the checkpoint, as `Subject.sha256` has it.
    """
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    files = [run / RESULTS, *sorted(run.glob(f"evaluation/*/{RESULTS}"))]
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return [found for found in read if found["models"].get("tuned", {}).get("sha256") == sha256]


def _training(config: Mapping[str, Any]) -> Iterator[str]:
    for group in ("algorithm", "reward"):
        if group in config:
            yield f"- {group}: {_described(config[group])}"
    if isinstance(adapter := config.get("model", {}).get("adapter"), Mapping) and "rank" in adapter:
        targets = ", ".join(adapter["targets"])
        yield f"- adapter: LoRA of rank {adapter['rank']}, alpha {adapter['alpha']}, on {targets}"
    for name in STATED:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            yield f"- {name}: {value}"


def _described(node: Any) -> str:
    """A configuration in one line: its class, and its settings that are plain values."""
    if not isinstance(node, Mapping):
        return str(node)
    words = [f"`{node['_target_']}`"] if "_target_" in node else []
    plain = {
        key: value for key, value in node.items() if key[0] != "_" and not isinstance(value, Mapping | list)
    }
    inner = [f"{key}: {_described(value)}" for key, value in node.items() if isinstance(value, Mapping)]
    return ", ".join([*words, *(f"{key} {value}" for key, value in plain.items()), *inner])


def _scores(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for found in results:
        name, headline = found["benchmark"]["name"], found["benchmark"]["headline"]
        for split, parts in found["scores"].items():
            rows = parts[headline]
            columns = list(next(iter(rows.values())))
            lines += [f"{name}, {split}: {headline}", "", f"| task | {' | '.join(columns)} |"]
            lines += ["|---" * (len(columns) + 1) + "|"]
            for task, row in rows.items():
                lines.append(f"| {task} | {' | '.join(_cell(row[column]) for column in columns)} |")
            lines.append("")
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return ""
    if row["low"] is None:
        return f"{row['mean']:.3f}"
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
