"""An evaluation with reasoning keeps the plan of every image beside it, and says it in its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stage.benchmarks.evaluation import Candidate, draw_missing, open_folders
from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder
from stage.benchmarks.judging import Judging
from stage.benchmarks.results import _image_line
from stage.policy import drawing
from stage.policy.janus import JanusPolicy
from stage.policy.plans import plan_texts
from stage.policy.sampler import Sampler
from tests.benchmarks.example import PLAIN, benchmark, prompts, tiny_policy
from tests.benchmarks.test_evaluation import QUIET

REASONING = Sampler(2.0, 1.0, "text", 1.0, 7, 1.0)
SETTINGS: dict[str, Any] = {"checkpoint": "c" * 64, "seed": 3, "sampler": {"reasoning": "text"}}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    policy = tiny_policy(tmp_path_factory.mktemp("model"))
    policy.template = replace(PLAIN, instruction="a photo of {prompt} :")
    policy.model.generation_config.eos_token_id = [2, 9, 12, 17, 20]
    return policy


def drawn(policy: JanusPolicy, path: Path, batch_size: int, images: int = 3) -> dict[str, bytes]:
    folder = ImageFolder(path, SETTINGS, prompts(), images)
    draw(policy, REASONING, folder, batch_size=batch_size, drawn=lambda count: None)
    return {file.name: file.read_bytes() for file in sorted(path.glob("*/*"))}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_plans_and_images_do_not_depend_on_the_batch(
    policy: JanusPolicy, tmp_path: Path, batch_size: int
) -> None:
    whole = drawn(policy, tmp_path / "whole", 64)
    assert len(whole) == 2 * 9 and len({whole[name] for name in whole if name.endswith(".txt")}) > 3
    assert drawn(policy, tmp_path / "parts", batch_size) == whole


def test_the_manifest_names_the_plan_and_its_file_holds_the_words(
    policy: JanusPolicy, tmp_path: Path
) -> None:
    files = drawn(policy, tmp_path, 64)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["plan"] for line in lines] == [
        f"plans/{index:05d}_{sample}.txt" for index in range(3) for sample in range(3)
    ]
    ids = [prompt.id for prompt in prompts()]
    asked = drawing.tokenize(policy, REASONING, [prompt.text for prompt in prompts()])
    noise = drawing.noise(policy, REASONING, 3, 0, ids, 3)
    samples = drawing.draw(policy, REASONING, asked, noise)
    assert samples.plans is not None
    words = [words for group in plan_texts(policy, samples.plans) for words in group]
    assert [files[Path(line["plan"]).name].decode() for line in lines] == words


def test_results_say_the_plan(policy: JanusPolicy, tmp_path: Path) -> None:
    for name, sampler, settings in (
        ("with", REASONING, SETTINGS),
        ("without", Sampler(2.0, 1.0), {**SETTINGS, "sampler": {"reasoning": None}}),
    ):
        item = Candidate("base", tmp_path / name, settings, {}, lambda: policy)
        folders = open_folders(item, benchmark(2), ["heldout"])
        draw_missing(item, folders, sampler, batch_size=4, console=QUIET)
        judging = Judging(item, folders, benchmark(2))
        judging.score(batch_size=4, console=QUIET)
        judged = judging.collect()
        lines = [_image_line(found, item.folder) for found in judged]
        if name == "without":
            assert not any("plan" in line for line in lines)
            assert "plan" not in (item.folder / "heldout" / "manifest.jsonl").read_text()
            assert not (item.folder / "heldout" / "plans").exists()
        else:
            files = [
                item.folder / "heldout" / "plans" / f"{i:05d}_{s}.txt" for i in range(2) for s in range(2)
            ]
            assert [line["plan"] for line in lines] == [file.read_text() for file in files]
