"""One self-contained page about a run, and the same tables in markdown."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stage.benchmarks.images import write_atomic
from stage.benchmarks.published import Published
from stage.report.curves import PANELS, Curve, run_panel
from stage.report.gallery import data_uri, galleries
from stage.report.groups import algorithm_label
from stage.report.read import Run, read_run
from stage.report.tables import ScoreTable, markdown, number, score_markdown, score_table

HTML, MARKDOWN = "report.html", "report.md"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path) -> Path:
    """Write report.html and report.md into `folder`, a run or an evaluation, and return the page's path.

    Raises what `read_run` raises, and OSError when the folder cannot be written.
    """
    run = read_run(folder)
    content = _content(run)
    page = render("report.html.j2", title=run.name, **content)
    write_atomic(folder / MARKDOWN, _markdown(run, content).encode())
    write_atomic(folder / HTML, page.encode())
    return folder / HTML


def render(template: str, **values: Any) -> str:
    """A page from a template; every value is escaped, except what is marked up already."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Ours, not a user's. A browser runs no other script than the one with this hash, and asks no network for anything.
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "gallery.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_hash=digest, **values
    )


def _content(run: Run) -> dict[str, Any]:
    """What both the page and the markdown show."""
    results = {} if run.evaluation is None else run.evaluation.results
    panels = [(panel, run_panel(panel, run.curves)) for panel in PANELS]
    return {
        "run": run,
        "facts": _facts(run),
        "tables": [] if run.evaluation is None else _tables(results),
        "macro": results["benchmark"].get("macro", True) if results else True,
        "published": _published(results) if results else None,
        "panels": [{"title": panel.title, "svg": Markup(svg)} for panel, svg in panels if svg is not None],
        "training": _training_rows(run.curves),
        "galleries": [] if run.evaluation is None else galleries(run.evaluation),
        "grids": _shown_grids(run.grids),
        "command": results.get("command"),
        "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        if run.config
        else None,
        "provenance": _provenance(results) if results else None,
    }


def _tables(results: Mapping[str, Any]) -> list[ScoreTable]:
    """The tables of the parts that count, for each split."""
    wanted = [results["benchmark"]["headline"], *results["benchmark"].get("beside", [])]
    return [
        score_table(split, part, parts[part]) for split, parts in results["scores"].items() for part in wanted
    ]


def _published(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ours beside what papers print, for each split: rows of text, headings first. None where nothing is published."""
    published = results["benchmark"].get("published")
    if published is None:
        return None
    part = results["benchmark"]["headline"]
    tables = {split: Published(**published).beside(parts[part]) for split, parts in results["scores"].items()}
    return {"source": published["source"], "tables": tables}


def _facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of what tells one run from another, for the line under the title."""
    facts = [("algorithm", algorithm_label(run.config))] if "algorithm" in run.config else []
    facts += [("seed", str(run.config["seed"]))] if "seed" in run.config else []
    if run.curves:
        facts.append(("updates", str(int(max(curve.x[-1] for curve in run.curves.values())))))
    if run.evaluation is None:
        return facts
    results = run.evaluation.results
    settings = results["settings"].get("base") or results["settings"]["images"]
    template = settings.get("template") or {}
    facts += [("template", str(template["name"]))] if "name" in template else []
    sampler = settings.get("sampler")
    if sampler is None:  # images of another program
        facts.append(("images", str(settings.get("images"))))
    else:
        facts += [("reasoning", str(sampler["reasoning"]))] if sampler.get("reasoning") else []
        facts.append(("guidance", str(sampler.get("guidance_scale", "?"))))
        facts.append(("temperature", str(sampler.get("temperature", "?"))))
    return [*facts, ("evaluated", results["created"].replace("T", " ").removesuffix("+00:00") + " UTC")]


def _training_rows(curves: Mapping[str, Curve]) -> list[tuple[str, str, str, str]]:
    """Metric, its first value, its last, and its highest, for those that have a panel."""
    columns = [name for panel in PANELS for name in panel.columns if name in curves]
    return [
        (name, number(curves[name].y[0]), number(curves[name].y[-1]), number(curves[name].y.max()))
        for name in columns
    ]


def _shown_grids(grids: Mapping[int, Path]) -> list[tuple[int, str, str | None]]:
    """The first, the middle and the last picture that training drew, as (update, data URI, plans beside it)."""
    updates = sorted(grids)
    chosen = sorted({updates[0], updates[len(updates) // 2], updates[-1]}) if updates else []
    found = [(update, data_uri(grids[update]), _words(grids[update])) for update in chosen]
    return [(update, source, plans) for update, source, plans in found if source is not None]


def _words(picture: Path) -> str | None:
    """The text file that training writes beside a picture with plans, None where there is none."""
    file = picture.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _provenance(results: Mapping[str, Any]) -> str:
    """Models, versions and commit, as YAML."""
    kept = {
        key: results[key]
        for key in ("models", "settings", "judge", "versions", "git", "timing")
        if key in results
    }
    return yaml.safe_dump(json.loads(json.dumps(kept)), sort_keys=False, allow_unicode=True)


def _markdown(run: Run, content: Mapping[str, Any]) -> str:
    lines = [f"# {run.name}", ""]
    if content["facts"]:
        lines += [", ".join(f"{name} {value}" for name, value in content["facts"]), ""]
    for table in content["tables"]:
        lines += [f"## {table.split}: {table.part}", "", score_markdown(table), ""]
    if content["published"]:
        for split, rows in content["published"]["tables"].items():
            lines += [
                f"## {split}: beside {content['published']['source']}",
                "",
                markdown(rows[0], rows[1:]),
                "",
            ]
    if content["tables"]:
        lines += ["95 % intervals over prompts; the difference is paired by prompt and seed.", ""]
    if content["training"]:
        lines += [
            "## Training",
            "",
            markdown(["metric", "first", "last", "highest"], content["training"]),
            "",
        ]
    if content["command"]:
        lines += ["## Command", "", "```bash", content["command"], "```", ""]
    return "\n".join(lines)
