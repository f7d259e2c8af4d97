"""Score a checkpoint beside its base. `python evaluate.py --help` says what can be set; conf/evaluate.yaml too."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stage import launch


def main() -> None:
    """The program, on the command line as it was typed."""
    sys.argv[1:] = launch.several(sys.argv[1:], "benchmark")
    composed()


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def composed(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        try:
            evaluate(config)
        except KeyboardInterrupt:
            print("stopped; finished images are kept, the same command goes on from there", flush=True)
            sys.exit(launch.exit_status(signal.SIGINT))


def evaluate(config: DictConfig) -> None:
    """Draw what is missing, score what is there, write results.json and report.html of each benchmark."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from rich.console import Console

    from stage.benchmarks import jobs as plan
    from stage.benchmarks.scoring import AGAIN, asked, judge, report_job
    from stage.benchmarks.share import join, local_device
    from stage.report.page import write_report
    from stage.subject import choose_device, find_subjects

    launch.quiet_libraries()
    overrides = HydraConfig.get().overrides.task
    share = join(config.processes, config.device)
    console, device = Console(quiet=not share.first), choose_device(local_device(config.device))
    score = asked(config.score, share)
    configs = plan.configurations(config, overrides)
    subjects = None if config.images is not None else find_subjects(config, overrides)
    bootstrap = instantiate(config.intervals)
    benchmarks = [plan.open_benchmark(each) for each in configs]
    # All folders are checked before the first image is drawn.
    sampler = None
    if subjects is None:
        jobs = [plan.of_images(*pair) for pair in zip(configs, benchmarks, strict=True)]
        timing = plan.nothing_drawn(jobs)
    else:
        sampler = instantiate(subjects.sampler)
        jobs = [plan.of_models(*pair, subjects, device) for pair in zip(configs, benchmarks, strict=True)]
        timing = plan.draw_all(jobs, sampler, batch_size=config.batch_size, console=console, share=share)
    if score == "no":
        if share.first:
            share.wait(lambda: plan.missing(jobs), config.patience_seconds)
            folders = (
                ", ".join(map(launch.short, plan.image_folders(jobs))) or "no folder, since none are drawn"
            )
            print(f"images in {folders}; the same command without score=false scores them", flush=True)
        return
    again, patience = score == AGAIN, config.patience_seconds
    judged = judge(jobs, console=console, share=share, patience_seconds=patience, again=again)
    if not share.first:
        return
    share.wait(lambda: plan.missing(jobs), config.patience_seconds)
    for job, found, spent in zip(jobs, judged, timing, strict=True):
        results = report_job(job, found, subjects, sampler, spent, bootstrap, Path(__file__).parent, console)
        report = write_report(job.output)
        print(f"results in {launch.short(results)}, page in {launch.short(report)}", flush=True)


if __name__ == "__main__":
    launch.run(main)
