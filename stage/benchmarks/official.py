"""Lay images out as T2I-CompBench's own scripts expect them: `python -m stage.benchmarks.official IMAGES OUT`.

IMAGES is the folder of a split that evaluate.py drew, with its manifest. OUT gets a folder for each category:

    OUT/color/samples/a green bench and a blue bowl_000003.png

numbered through within the category, ten or so images of a prompt after one another. The scripts of
Karine-Huang/T2I-CompBench are then run on OUT/color and leave a vqa_result.json there, which
`benchmark=t2i_compbench_official` reads (`stage.rewards.official_compbench`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stage.benchmarks.images import MANIFEST, write_atomic


def lay_out_official(images: Path, out: Path) -> dict[str, int]:
    """Copy all images of a split; return how many there are of each category. What is there already stays.

    Raises:
        FileNotFoundError: the folder has no manifest, or lacks images that it names; says how many.
        ValueError: a prompt has no category, or holds what no file name or script can take.
    """
    if not (images / MANIFEST).is_file():
        raise FileNotFoundError(
            f"images of evaluate.py come with {MANIFEST}, {images} has none; give such a folder"
        )
    lines = [json.loads(line) for line in (images / MANIFEST).read_text(encoding="utf-8").splitlines()]
    gone = [line["file"] for line in lines if not (images / line["file"]).is_file()]
    if gone:
        raise FileNotFoundError(
            f"{len(gone)} of {len(lines)} images are missing in {images}, the first is {gone[0]}; draw them first"
        )
    group = max(line["sample"] for line in lines) + 1
    counts: Counter[str] = Counter()
    for line in lines:
        known, text = line["metadata"], str(line["prompt"])
        if "category" not in known or "line" not in known or "/" in text or "_" in text:
            raise ValueError(
                f"the scripts find the prompt in the file name, up to an underscore, and each needs its category and "
                f"line, got {text!r} with {sorted(known)}; draw benchmark=t2i_compbench"
            )
        name = f"{text}_{known['line'] * group + line['sample']:06d}.png"
        target = out / str(known["category"]) / "samples" / name
        if not target.is_file():
            write_atomic(target, (images / line["file"]).read_bytes())
        counts[str(known["category"])] += 1
    return dict(counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stage.benchmarks.official", description=__doc__)
    parser.add_argument(
        "images", metavar="IMAGES", help="folder of a split, such as RUN/evaluation/last/NAME/val"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        counts = lay_out_official(Path(options.images), Path(options.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{options.out}/{name}: {count} images" for name, count in counts.items()))


if __name__ == "__main__":
    main()
