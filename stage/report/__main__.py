"""Reports from the command line.

python -m stage.report RUN                              report.html and report.md of a run or an evaluation
python -m stage.report compare A B                      two evaluations, paired prompt by prompt
python -m stage.report compare RUN RUN ... --output FOLDER    several runs side by side
python -m stage.report ablation RUN RUN ... --output FOLDER   what differs between them, with tests and what is wrong
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    commands = {"compare": compare, "ablation": ablation}
    command = commands.get(arguments[0] if arguments else "")
    page = report(arguments) if command is None else command(arguments[1:])
    if page is not None:
        print(f"page in {page}")


def report(arguments: Sequence[str]) -> Path:
    """Parse `RUN` and write its report."""
    parser = argparse.ArgumentParser(
        prog="python -m stage.report",
        description="Write report.html and report.md into the folder of a run or of one of its evaluations: scores, "
        "curves, images before and after. `python -m stage.report compare --help` is about several runs.",
    )
    parser.add_argument("run", type=Path, help="folder with metrics.csv or results.json")
    folder = parser.parse_args(arguments).run

    from stage.report.page import write_report

    return write_report(folder)


def compare(arguments: Sequence[str]) -> Path | None:
    """Parse `RUN RUN ... --output FOLDER` and write the comparison; or print the paired table of two evaluations."""
    parser = argparse.ArgumentParser(
        prog="python -m stage.report compare",
        description="Lay runs side by side. Runs that differ in nothing but their seed form a group; the page shows "
        "mean curves over the updates, and final scores with intervals over seeds. Differences are to the first group. "
        "Without --output, two evaluations are paired prompt by prompt and their table is printed.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, evaluated if possible")
    parser.add_argument("--output", type=Path, help="folder for report.html and report.md")
    parsed = parser.parse_args(arguments)
    if parsed.output is None:
        if len(parsed.runs) != 2:
            parser.error(
                f"a paired table is of two evaluations, got {len(parsed.runs)}; for several runs give --output FOLDER"
            )
        from stage.report.paired import paired_markdown

        print(paired_markdown(*parsed.runs))
        return None

    from stage.report.compare import write_comparison

    return write_comparison(parsed.runs, parsed.output)


def ablation(arguments: Sequence[str]) -> Path:
    """Parse `RUN RUN ... --output FOLDER` and write the ablation."""
    parser = argparse.ArgumentParser(
        prog="python -m stage.report ablation",
        description="From the runs of an ablation to an answer: report.html, report.md and report.json. Runs that "
        "differ in nothing but their seed are a variant. Final and best scores have 95 %% intervals over seeds; "
        "differences to the baseline are paired by seed, with p-values corrected for their number. Runs that diverged "
        "or stopped, missing seeds, runs given twice and mixed versions of the code are named first and averaged with "
        "nothing.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder; folder or .wandb file of an offline run; wandb:ENTITY/PROJECT[/ID] when logged in",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the three files")
    parser.add_argument(
        "--baseline", help="label of the variant to compare with; plain GRPO if it is not said"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="the whole in one picture, for a README"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="TITLE",
        help="beginnings of the titles of up to three tables for the picture",
    )
    parsed = parser.parse_args(arguments)

    from stage.report.ablation_page import write_ablation

    return write_ablation(parsed.runs, parsed.output, parsed.baseline, parsed.picture, parsed.scores)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
