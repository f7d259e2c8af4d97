"""A W&B workspace and a page of variants as code, so that every comparison is looked at through the same panels.

python -m stage.report.dashboard sweeps/NAME.yaml                          print them: nothing is sent
python -m stage.report.dashboard sweeps/NAME.yaml --entity TEAM --publish  save them in the project of the sweep
python -m stage.report.dashboard tiny_grpo tiny_stage --project stage      of experiments by name, without a sweep

The workspace lays the variants over one another: a section a subject, lines grouped by the name of the experiment,
bands of one standard error. Sections of a workspace all show the same runs, so the section of each variant with its own
runs stands in a report beside it. Needs the extra `dashboard`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Subject to panels, panel to the metrics that training logs (docstrings of `Objective.credit` and `Objective.loss`).
SUBJECTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "scores": {
        "reward on held-apart prompts": ("validation/reward",),
        "strict score on held-apart prompts": ("validation/strict",),
        "reward while training": ("reward/mean",),
        "std of the reward in a group": ("reward/std",),
    },
    "reward parts": {},  # names of parts belong to the reward, see PARTS
    "entropy": {
        "entropy of the policy": ("policy/entropy",),
        "entropy of the reference on the same tokens": ("reference/entropy",),
        "groups in which the entropy reward acts": ("reward/entropy_active_groups",),
    },
    "distance from the reference": {"KL": ("policy/kl",), "KL as it is weighed in the loss": ("loss/kl",)},
    "groups": {
        "groups that teach something": ("reward/informative_groups",),
        "size of the advantages": ("advantage/abs_mean", "advantage/max"),
    },
    "weights": {
        "weight of the advantage": ("weights/advantage_mean",),
        "weight of the KL": ("weights/kl_mean",),
        "similarity": ("weights/similarity_mean",),
    },
    "update": {
        "norm of the gradient": ("policy/gradient_norm",),
        "tokens clipped": ("policy/clip_fraction",),
        "sampled and scored log-probabilities apart": ("policy/sampling_gap",),
    },
}
PARTS = {
    "parts as scored": "^reward/",
    "parts as added up": "^contribution/",
    "categories": "^validation/strict/",
}
IMAGES = ("images/grid",)
VARIANT = "name"  # the setting that names the variant of a run


@dataclass(frozen=True)
class Comparison:
    """Which runs are looked at: those of `variants` in a W&B project, of one group where `group` is given."""

    entity: str
    project: str
    title: str
    variants: tuple[str, ...]
    group: str | None


def of_sweep(file: Path, entity: str) -> Comparison:
    """The comparison that a sweep makes. Raises ValueError for a file that has no experiments or no project."""
    import yaml

    sweep: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    parameter = sweep.get("parameters", {}).get("experiment", {}) if isinstance(sweep, dict) else {}
    variants = parameter.get("values", [parameter["value"]] if "value" in parameter else [])
    if not variants or "project" not in sweep:
        raise ValueError(
            f"the variants of a sweep are the values of its parameter experiment, and it has a project; {file} has "
            f"{list(sweep or {})}. Name the variants instead of the file"
        )
    name = sweep.get("name", file.stem)
    return Comparison(entity, sweep["project"], f"{name}: variants", tuple(variants), name)


def panels(*, grouped: bool) -> dict[str, list[Any]]:
    """W&B panels by subject; `grouped` draws a line a variant, otherwise a line a run."""
    from wandb_workspaces.reports import v2 as wr

    together: dict[str, Any] = {}
    if grouped:
        together = {"groupby": wr.Config(VARIANT), "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
    found: dict[str, list[Any]] = {
        subject: [
            wr.LinePlot(title=title, x="Step", y=list(names), **together) for title, names in plots.items()
        ]
        for subject, plots in SUBJECTS.items()
    }
    found["reward parts"] = [
        wr.LinePlot(title=title, x="Step", metric_regex=pattern, **together)
        for title, pattern in PARTS.items()
    ]
    found["images"] = [
        wr.MediaBrowser(title="the same prompts and noise", media_keys=list(IMAGES), num_columns=1)
    ]
    return found


def workspace(comparison: Comparison) -> Any:
    """Sections by subject, over all runs of the comparison."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    sections = [
        ws.Section(name=name, panels=found, is_open=True) for name, found in panels(grouped=True).items()
    ]
    # As text: the library's own expressions take a setting called name for the id of the run.
    where = _filters(f"Config('{VARIANT}') in {list(comparison.variants)}", comparison)
    return ws.Workspace(
        name=comparison.title,
        entity=comparison.entity,
        project=comparison.project,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="Step", max_runs=100),
        runset_settings=ws.RunsetSettings(filters=where, groupby=[expr.Config(VARIANT)]),
    )


def _filters(which: str, comparison: Comparison) -> str:
    return which if comparison.group is None else f"{which} and Metric('Group') == '{comparison.group}'"


def report(comparison: Comparison) -> Any:
    """A section a variant, each with its own runs and all panels."""
    from wandb_workspaces.reports import v2 as wr

    blocks: list[Any] = []
    for variant in comparison.variants:
        where = _filters(f"Config('{VARIANT}') == '{variant}'", comparison)
        runs = wr.Runset(
            name=variant, filters=where
        )  # of the report's own project, which is not asked for by name
        every = [panel for found in panels(grouped=False).values() for panel in found]
        blocks += [wr.H1(variant), wr.PanelGrid(runsets=[runs], panels=every)]
    return wr.Report(
        entity=comparison.entity,
        project=comparison.project,
        title=comparison.title,
        description="One section a variant; made by stage.report.dashboard.",
        blocks=blocks,
    )


def default_entity() -> str:
    """The entity of whoever is logged in. Raises ValueError where nobody is."""
    import wandb

    try:
        return str(wandb.Api().default_entity)
    except wandb.errors.Error as error:
        raise ValueError(f"publishing needs an account ({error}); `wandb login`, or print only") from error


def described(view: Any, page: Any) -> str:
    """Both as the JSON that W&B would get."""
    specs = {"workspace": view._to_model().spec, "report": page._to_model().spec}
    plain = {
        name: json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))
        for name, spec in specs.items()
    }
    return json.dumps(plain, indent=1)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stage.report.dashboard",
        description="W&B panels for the variants of a sweep: printed, or with --publish saved in its project.",
    )
    parser.add_argument(
        "variants", nargs="+", metavar="SWEEP.yaml | NAME", help="a sweep, or names of experiments"
    )
    parser.add_argument("--entity", default="", help="user or team; your default without it")
    parser.add_argument("--project", default="stage", help="where NAMEs were logged")
    parser.add_argument("--publish", action="store_true", help="save them; needs `wandb login`")
    parsed = parser.parse_args(arguments)
    entity = parsed.entity or (default_entity() if parsed.publish else "")
    if parsed.variants[0].endswith((".yaml", ".yml")):
        found = of_sweep(Path(parsed.variants[0]), entity)
    else:
        found = Comparison(entity, parsed.project, "variants", tuple(parsed.variants), None)
    view, page = workspace(found), report(found)
    if not parsed.publish:
        print(described(view, page))
        print("printed only; --publish saves it", file=sys.stderr)
        return
    print(f"workspace {view.save().url}\nreport {page.save().url}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
