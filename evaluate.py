"""Score a checkpoint beside its base. `python evaluate.py --help` says what can be set; conf/evaluate.yaml too."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stage import launch


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        try:
            evaluate(config)
        except KeyboardInterrupt:
            print("stopped; finished images are kept, the same command goes on from there", flush=True)
            sys.exit(launch.exit_status(signal.SIGINT))


def evaluate(config: DictConfig) -> None:
    """Draw what is missing, score what is there, write results.json and report.html."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from rich.console import Console

    from stage.benchmarks.evaluation import add_up, draw_missing, open_folders, score
    from stage.benchmarks.layout import lay_out
    from stage.benchmarks.results import compose_results, print_scores, write_results
    from stage.prompt_files import check_prompts
    from stage.report.page import write_report
    from stage.score_checks import check_itself
    from stage.subject import choose_device, find_subjects

    launch.quiet_libraries()
    console, device = Console(), choose_device(config.device)
    subjects = find_subjects(config, HydraConfig.get().overrides.task)
    benchmark, bootstrap = instantiate(config.benchmark), instantiate(config.intervals)
    check_prompts(
        benchmark.scorer, {f"benchmark.splits.{name}": benchmark.prompts(name) for name in config.splits}
    )
    check_itself(benchmark.scorer, config.self_check)
    sampler = instantiate(subjects.sampler)
    candidates = lay_out(subjects.models, subjects.sampler, config.seed, device, config.output)
    # All folders are checked before the first image is drawn.
    folders = [open_folders(candidate, benchmark, config.splits) for candidate in candidates]
    judged, timing = [], {}
    for candidate, images in zip(candidates, folders, strict=True):
        role = candidate.role
        timing[role] = draw_missing(candidate, images, sampler, batch_size=config.batch_size, console=console)
        judged += score(candidate, images, benchmark, batch_size=config.batch_size, console=console)
    scores = add_up(judged, benchmark, config.splits, bootstrap)
    output = candidates[-1].folder
    content = compose_results(
        benchmark=benchmark,
        candidates=candidates,
        config=launch.plain(config),
        trained_with=subjects.trained_with,
        timing=timing,
        scores=scores,
        judged=judged,
        source=Path(__file__).parent,
    )
    results = write_results(output, content)
    report = write_report(output)
    print_scores(scores, benchmark.headline, bootstrap.confidence, console)
    print(f"results in {launch.short(results)}, page in {launch.short(report)}", flush=True)


if __name__ == "__main__":
    launch.run(main)
