"""Stage two of a job: verdicts on the images on disk, scores, results.json and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from stage.benchmarks.adding import add_up
from stage.benchmarks.evaluation import Judged
from stage.benchmarks.intervals import Bootstrap
from stage.benchmarks.jobs import GROUP, Job
from stage.benchmarks.judging import Judging
from stage.benchmarks.models import JudgesModels
from stage.benchmarks.results import compose_results, print_published, print_scores, write_results
from stage.benchmarks.share import Share
from stage.policy.sampler import Sampler
from stage.subject import Subjects

AGAIN = "again"


def judgings(job: Job) -> list[Judging]:
    """The images of each model of a job before its scorer; none where the benchmark looks at the models themselves."""
    if isinstance(job.benchmark, JudgesModels):
        return []
    settings = _plain(job.config).get(GROUP, {}).get("scorer")
    return [Judging(item, job.folders[item.role], job.benchmark, settings) for item in job.candidates]


def judge(
    jobs: Sequence[Job], *, console: Console, share: Share, patience_seconds: float, again: bool = False
) -> list[list[Judging]]:
    """Let this process judge its share of all jobs; the first waits for the verdicts of the others.

    Args:
        again: forget the verdicts that are there; for one process alone, see `asked`.
    """
    found = [judgings(job) for job in jobs]
    for one in (one for several in found for one in several if again):
        one.forget()
    for job, several in zip(jobs, found, strict=True):
        if len(jobs) > 1 and several:
            console.print(f"{job.benchmark.name}:")
        for one in several:
            one.score(batch_size=job.config.batch_size, console=console, share=share)
    if share.first:
        share.wait(
            lambda: sum(one.missing() for several in found for one in several), patience_seconds, "verdicts"
        )
    return found


def asked(score: object, share: Share) -> str:
    """What `score` of the configuration says: `yes`, `no` or `again`; ValueError where it says something else."""
    words = {True: "yes", False: "no", AGAIN: AGAIN}
    if not isinstance(score, bool | str) or score not in words:
        raise ValueError(f"score is true, false or {AGAIN}, got {score!r}; set score=true")
    if score == AGAIN and share.processes > 1:
        raise ValueError(
            f"score={AGAIN} deletes verdicts that another process may be writing, and there are {share.processes}; "
            "give it to one process, or remove the folders `verdicts` and let several score"
        )
    return words[score]


def report_job(
    job: Job,
    found: Sequence[Judging],
    subjects: Subjects | None,
    sampler: Sampler | None,
    timing: Mapping[str, Mapping[str, float]],
    bootstrap: Bootstrap,
    source: Path,
    console: Console,
) -> Path:
    """Add the verdicts of a job up, print its tables and write results.json, whose path is returned.

    Args:
        found: as `judge` returned them.
        subjects: the models, None for images of another program, which have no sampler either.
        timing: of the drawing, by role.
        source: folder of the program, for the commit it stands at.
    """
    benchmark = job.benchmark
    judged: list[Judged] = [line for one in found for line in one.collect()]
    if isinstance(benchmark, JudgesModels):
        assert sampler is not None
        judged = benchmark.judge_models(
            job.candidates, job.folders, job.splits, sampler, job.config.batch_size, console
        )
    scores = add_up(judged, benchmark, job.splits, bootstrap)
    content = compose_results(
        benchmark=benchmark,
        candidates=job.candidates,
        config=_plain(job.config),
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


def _plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
