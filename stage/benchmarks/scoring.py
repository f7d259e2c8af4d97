"""Stage two of a job: verdicts on the images on disk, scores, results.json and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from stage.benchmarks.evaluation import add_up, score
from stage.benchmarks.intervals import Bootstrap
from stage.benchmarks.jobs import Job
from stage.benchmarks.results import compose_results, print_published, print_scores, write_results
from stage.subject import Subjects


def score_job(
    job: Job,
    subjects: Subjects | None,
    timing: Mapping[str, Mapping[str, float]],
    bootstrap: Bootstrap,
    source: Path,
    console: Console,
) -> Path:
    """Score all images of a job, print its tables and write results.json, whose path is returned.

    Args:
        subjects: the models, None for images of another program.
        timing: of the drawing, by role.
        source: folder of the program, for the commit it stands at.
    """
    benchmark = job.benchmark
    judged = [
        line
        for item in job.candidates
        for line in score(
            item, job.folders[item.role], benchmark, batch_size=job.config.batch_size, console=console
        )
    ]
    scores = add_up(judged, benchmark, job.splits, bootstrap)
    content = compose_results(
        benchmark=benchmark,
        candidates=job.candidates,
        config=OmegaConf.to_container(job.config, resolve=True, throw_on_missing=True),  # type: ignore[arg-type]
        trained_with=None if subjects is None else subjects.trained_with,
        timing=timing,
        scores=scores,
        judged=judged,
        source=source,
    )
    path = write_results(job.output, content)
    for part in (benchmark.headline, *benchmark.beside):
        print_scores(scores, part, bootstrap.confidence, console)
    template = (job.candidates[-1].settings.get("template") or {}).get("name")
    print_published(scores, benchmark, template, console)
    return path
