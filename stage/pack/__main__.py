"""Train and evaluate many small runs side by side. `python -m stage.pack --help` says what can be set."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from stage import launch

PROGRAMS = Path(__file__).parents[2]  # where train.py and evaluate.py lie
FAILED, TIME_OVER = 1, 3  # exit status


@hydra.main(config_path="../../conf", config_name="pack", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        sys.exit(work(config))


def work(config: DictConfig) -> int:
    """Restore, run what is missing, archive; return the exit status."""
    from stage.pack import archive
    from stage.pack.plan import check_folders, plan
    from stage.pack.pool import Pool

    root, say = Path.cwd(), partial(print, flush=True)
    runs, output = plan(config, root), root / str(config.output)
    for file in config.restore:
        archive.unpack(Path(str(file)).expanduser(), output)
    check_folders(runs)
    file = None if config.archive is None else Path(str(config.archive)).expanduser()
    if file is not None:
        archive.check(file, runs, config.archive_weights)
    pool = Pool(
        runs,
        programs=PROGRAMS,
        processes=config.processes,
        threads=config.threads,
        limit_seconds=config.limit_seconds,
        grace_seconds=config.grace_seconds,
        say_every=config.say_every,
        say=say,
    )
    outcome = pool.work()
    if file is not None:
        if config.archive_thin:
            parts = [archive.pack_thin(runs, file)]
        else:
            parts = archive.pack(runs, output, file, config.archive_mebibytes, config.archive_weights)
        for part in parts:
            say(f"{part.stat().st_size / archive.MEBIBYTE:.1f} MiB in {launch.short(part)}")
    for name, reason in outcome.failed.items():
        say(f"failed: {name}: {reason}")
    say(
        f"{len(outcome.done)} of {len(runs)} runs done, {len(outcome.unfinished)} unfinished, "
        f"{len(outcome.failed)} failed; in {launch.short(output)}"
    )
    if outcome.signal_number is not None:
        return launch.exit_status(outcome.signal_number)
    return FAILED if outcome.failed else TIME_OVER if outcome.unfinished else 0


if __name__ == "__main__":
    launch.run(main)
