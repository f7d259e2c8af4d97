"""`benchmark=geneval` on recorded detections: the official verdict of each, and aggregates against a count by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stage.benchmarks.adding import add_up
from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Judged
from stage.benchmarks.intervals import Bootstrap
from stage.rewards.geneval import GenEvalReward
from stage.types import Detection, Detections, Prompt
from tests.test_conf import composed


class Recorded:
    """Gives the detections of a case by the number that is written into the first pixels of its picture."""

    def __init__(self, cases: Sequence[dict[str, Any]]) -> None:
        self.cases = cases

    def detect(self, images: np.ndarray) -> list[Detections]:
        return [
            {
                name: [Detection((x0, y0, x1, y1), score) for x0, y0, x1, y1, score in boxes]
                for name, boxes in self._case(image)["detections"].items()
            }
            for image in images
        ]

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        case = self._case(image)
        places = {
            (tuple(box[:4]), box[4]): color
            for box, color in zip(case["detections"][class_name], case["colors"][class_name], strict=True)
        }
        return [places[item.box, item.score] for item in objects]

    def _case(self, image: np.ndarray) -> dict[str, Any]:
        return self.cases[int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])]


def geneval(cases: Sequence[dict[str, Any]]) -> Benchmark:
    """The benchmark as conf/benchmark/geneval.yaml has it, with recorded detections and the prompts of the cases."""
    node: Any = OmegaConf.to_container(composed("evaluate", "benchmark=geneval").benchmark, resolve=False)
    scorer = node.pop("scorer")
    # The cases hold what the detector's threshold has let through already, for counting too.
    limits = {"counting_threshold": scorer["threshold"]}
    known = {key: scorer[key] for key in ("partial", "weights", "threshold", "max_objects", "nms_threshold")}
    margin = scorer["position_margin"]
    reward = GenEvalReward(Recorded(cases), None, **known, **limits, position_margin=margin)
    prompts = [
        Prompt(n, f"{n}: {case['metadata']['prompt']}", case["metadata"]) for n, case in enumerate(cases)
    ]
    made = instantiate(OmegaConf.create({**node, "splits": {}, "scorer": None}))
    return Benchmark(**{**vars(made), "splits": {"test": prompts}, "scorer": reward, "images_per_prompt": 1})


def test_verdicts_and_aggregates_of_the_golden_cases(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "geneval_scoring_cases.json").read_text())
    bench = geneval(cases)
    prompts = bench.prompts("test")
    pictures = torch.zeros(len(cases), 1, 2, 2, 3, dtype=torch.uint8)
    for number in range(len(cases)):
        pictures[number, 0, 0, 0, :2] = torch.tensor(divmod(number, 256), dtype=torch.uint8)
    verdicts = bench.judge(pictures, prompts)
    assert [bool(found[0].parts["correct"]) for found in verdicts] == [case["correct"] for case in cases]
    judged = [
        Judged("base", "test", Path("x.png"), p.text, p.id, n, 0, (bench.task(p),), verdicts[n][0])
        for n, p in enumerate(prompts)
    ]
    rows = add_up(judged, bench, ["test"], Bootstrap(0.95, 50, 0))["test"]["correct"]
    counts: dict[str, list[bool]] = {}
    for case in cases:
        counts.setdefault(case["metadata"]["tag"], []).append(case["correct"])
    shares = {tag: sum(found) / len(found) for tag, found in counts.items()}
    assert {task: row["base"]["mean"] for task, row in rows.items() if task != "overall"} == pytest.approx(
        shares
    )
    assert rows["overall"]["base"]["mean"] == pytest.approx(sum(shares.values()) / len(shares))
