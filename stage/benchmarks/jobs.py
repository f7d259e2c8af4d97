"""One command, several benchmarks: all images first, model by model, then all scores, benchmark by benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Candidate, draw_missing, open_folders
from stage.benchmarks.images import ImageFolder, Images
from stage.benchmarks.layout import lay_out, lay_out_images
from stage.benchmarks.models import JudgesModels
from stage.benchmarks.outside import OutsideFolder
from stage.benchmarks.share import Share
from stage.policy.sampler import Sampler
from stage.prompt_files import check_prompts
from stage.score_checks import check_itself
from stage.subject import Subjects

GROUP = "benchmark"


@dataclass(frozen=True)
class Job:
    """A benchmark with the images it is about: `folders` by role and split. `config` is that of this benchmark."""

    config: DictConfig
    benchmark: Benchmark
    splits: Sequence[str]
    candidates: Sequence[Candidate]
    folders: Mapping[str, Mapping[str, Images]]

    @property
    def output(self) -> Path:
        """Where its results go."""
        return self.candidates[-1].folder


def configurations(config: DictConfig, overrides: Sequence[str]) -> list[DictConfig]:
    """One configuration a benchmark: each of `benchmarks=[a,b]`, or of a list such as `benchmark=paper`, alone.

    Args:
        config: as composed for the command.
        overrides: the command line; what it says of `benchmark...` beside the choice holds for each of them.
    """
    names = config.benchmarks or OmegaConf.select(config, f"{GROUP}.benchmarks")
    if names is None:
        return [config]
    rest = [item for item in overrides if not item.startswith((f"{GROUP}=", "benchmarks="))]
    return [compose("evaluate", [*rest, f"{GROUP}={name}"]) for name in dict.fromkeys(names)]


def open_benchmark(config: DictConfig) -> Benchmark:
    """The benchmark of a configuration, without its scorer when nothing is to be scored.

    Raises ValueError for prompts that its scorer cannot score.
    """
    node = config[GROUP]
    if not config.score and "scorer" in node:
        node = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(node, resolve=True)), {"scorer": None})
    benchmark: Benchmark = instantiate(node)
    names = benchmark.chosen(config.splits)
    check_prompts(benchmark.scorer, {f"{GROUP}.splits.{name}": benchmark.prompts(name) for name in names})
    check_itself(benchmark.scorer, config.self_check)
    return benchmark


def of_models(config: DictConfig, benchmark: Benchmark, subjects: Subjects, device: torch.device) -> Job:
    """Images that models draw; raises ValueError for folders that hold those of other settings.

    And for models or a sampler that the benchmark cannot evaluate.
    """
    benchmark.check_models(subjects.sampler)
    candidates = lay_out(
        subjects.models, subjects.sampler, config.seed, device, config.output, benchmark.subfolder
    )
    splits = benchmark.chosen(config.splits)
    folders = {
        item.role: open_folders(item, benchmark, splits) if benchmark.draws else {} for item in candidates
    }
    return Job(config, benchmark, splits, candidates, folders)


def of_images(config: DictConfig, benchmark: Benchmark) -> Job:
    """Images of another program: `images=FOLDER`, or `images={base: FOLDER, tuned: FOLDER}` for a paired comparison.

    Raises ValueError for a folder that does not hold exactly the images of the benchmark.
    """
    if isinstance(benchmark, JudgesModels):
        raise ValueError(
            f"benchmark {benchmark.name!r} looks at models, and images of another program come without one; give "
            "checkpoint=PATH instead of images=FOLDER"
        )
    asked: Any = config.images
    named = {"images": asked} if isinstance(asked, str) else dict(asked)
    if set(named) not in ({"images"}, {"base", "tuned"}):
        raise ValueError(
            f"images names one folder, or one for base and one for tuned, got {named}; write "
            "images=FOLDER or 'images={base: FOLDER, tuned: FOLDER}'"
        )
    paths = {role: Path(str(path)).expanduser() for role, path in named.items()}
    splits = benchmark.chosen(config.splits)
    folders = {
        role: {split: _outside(path, benchmark, split, len(splits) > 1) for split in splits}
        for role, path in paths.items()
    }
    candidates = lay_out_images(folders, paths, config.output, benchmark.subfolder)
    return Job(config, benchmark, splits, candidates, folders)


def _outside(path: Path, benchmark: Benchmark, split: str, several: bool) -> OutsideFolder:
    prompts = benchmark.prompts(split)
    inner = path / split if several or (path / split).is_dir() else path
    return OutsideFolder(inner, prompts, benchmark.images_per_prompt, [benchmark.task(p) for p in prompts])


def nothing_drawn(jobs: Sequence[Job]) -> list[dict[str, dict[str, float]]]:
    """The timing of jobs whose images come from another program."""
    return [{} for _ in jobs]


def draw_all(
    jobs: Sequence[Job], sampler: Sampler, *, batch_size: int, console: Console, share: Share
) -> list[dict[str, dict[str, float]]]:
    """Stage one for all jobs, which have the same models; each is read once. Images and seconds by job and role.

    Those that keep tokens come first: others of the same prompts can do with their images, but not the other way round.
    """
    timing: list[dict[str, dict[str, float]]] = [{} for _ in jobs]
    for position, candidate in enumerate(jobs[0].candidates):
        load = cache(candidate.load)
        pairs = zip(jobs, timing, strict=True)
        for job, spent in sorted(pairs, key=lambda pair: not pair[0].benchmark.keeps_tokens):
            item = replace(job.candidates[position], load=load)
            folders = {n: f for n, f in job.folders[item.role].items() if isinstance(f, ImageFolder)}
            if not folders:  # questions, for example
                continue
            if len(jobs) > 1:
                console.print(f"{job.benchmark.name}:")
            spent[item.role] = draw_missing(
                item, folders, sampler, batch_size=batch_size, console=console, share=share
            )
        sampler.release()  # keys, values and the model that they are of: the next one and the scorers need the room
    return timing


def image_folders(jobs: Sequence[Job]) -> list[Path]:
    """Where the images of all jobs lie: of models the folder above the splits, of other programs the one they left."""
    folders = [
        found.folder.parent if isinstance(found, ImageFolder) else found.folder
        for job in jobs
        for splits in job.folders.values()
        for found in splits.values()
    ]
    return list(dict.fromkeys(folders))


def missing(jobs: Sequence[Job]) -> int:
    """How many images of all jobs are not there yet, whoever draws them."""
    return sum(len(f.missing()) for job in jobs for splits in job.folders.values() for f in splits.values())
