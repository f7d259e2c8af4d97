"""The generator of training prompts: GenEval's words and schema, nothing that is evaluated, the shares that are set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from stage.fingerprints import of_list, of_picture, of_text
from stage.prompt_files import read_prompts
from stage.prompts import (
    CLASSES,
    COLORS,
    TASKS,
    article,
    plural,
    prompt_line,
    training_list,
    wording,
)
from stage.request import parse_request

SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


def test_words_by_hand() -> None:
    assert article("apple") == "an apple" and article("orange dog") == "an orange dog"
    assert article("umbrella") == "an umbrella" and article("hair drier") == "a hair drier"
    assert plural("dog") == "dogs" and plural("bus") == "buses" and plural("bench") == "benchs"
    counting = [{"class": "wine glass", "count": 3}]
    assert wording("counting", counting) == "a photo of three wine glasses"
    position = [CAT, {**DOG, "position": ["left of", 0]}]
    assert wording("position", position) == "a photo of a dog left of a cat"
    attributes = [{**DOG, "color": "orange"}, {**CAT, "color": "blue"}]
    assert wording("color_attr", attributes) == "a photo of an orange dog and a blue cat"


@pytest.mark.parametrize("tag", TASKS)
def test_every_prompt_of_a_task_is_another_one_that_can_be_scored(tag: str) -> None:
    count = TASKS[tag][0]
    indices = range(count) if count < 10_000 else range(0, count, 97)
    lines = [prompt_line(tag, index) for index in indices]
    assert len({line["prompt"] for line in lines}) == len(lines)
    for line in lines[:: max(1, len(lines) // 500)]:
        request = parse_request(line)
        assert request.tag == tag and all(clause.name in CLASSES for clause in request.include)
        assert all(clause.color in (None, *COLORS) for clause in request.include)
        assert not any(clause.name == "person" and clause.color for clause in request.include)


def test_sizes_of_the_tasks() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert {tag: count for tag, (count, _) in TASKS.items()} == {
        "single_object": 80, "two_object": 80 * 79, "counting": 80 * 3, "colors": 79 * 10,
        "position": 80 * 79 * 4, "color_attr": 79 * 78 * 10 * 9,
    }  # fmt: skip


def test_shares_and_what_is_left_out() -> None:
    evaluated = [
        prompt_line(tag, index) for tag in TASKS for index in range(0, 240, 3) if index < TASKS[tag][0]
    ]
    excluded = {of_picture(parse_request(line)) for line in evaluated}
    lines, short = training_list(340, SHARES, 3, excluded)
    counts = Counter(line["tag"] for line in lines)
    # 340 = 20 * 17; a third of the 240 counting prompts is left out, 160 remain for 100
    assert counts == {"position": 140, "counting": 100, "color_attr": 60, "colors": 20, "two_object": 20}
    assert not short and len({line["prompt"] for line in lines}) == 340
    assert not excluded & {of_picture(parse_request(line)) for line in lines}


def test_a_task_without_enough_prompts_gives_what_it_has() -> None:
    lines, short = training_list(2000, {"counting": 1, "two_object": 1}, 0, set())
    assert Counter(line["tag"] for line in lines) == {"counting": 240, "two_object": 1000}
    assert short == {"counting": 760}


def test_the_seed_decides() -> None:
    first, again, other = (training_list(170, SHARES, seed, set())[0] for seed in (1, 1, 2))
    assert first == again != other
    longer = [line for line in training_list(340, SHARES, 1, set())[0] if line["tag"] == "position"]
    assert [line for line in first if line["tag"] == "position"] == longer[:70]


@pytest.mark.parametrize(
    ("count", "shares", "seed", "words"),
    [
        (10, {"writing": 1}, 0, "writing"),
        (10, {"counting": -1, "colors": 2}, 0, "at least 0"),
        (10, {"counting": 0}, 0, "one above 0"),
        (0, SHARES, 0, "count is at least 1"),
        (10, SHARES, -1, "got 10 and -1"),
    ],
)
def test_what_is_refused(count: int, shares: dict[str, float], seed: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training_list(count, shares, seed, set())


def test_the_wording_is_that_of_the_evaluation(shared: Path) -> None:
    """All 553 prompts can be drawn, in their words."""
    file = shared / "data" / "geneval_evaluation_metadata.jsonl"
    if not file.is_file():
        pytest.skip(f"no GenEval metadata at {file}")
    prompts = read_prompts(file)
    for prompt in prompts:
        assert wording(prompt.metadata["tag"], prompt.metadata["include"]) == prompt.text
    for tag in ("single_object", "two_object", "counting", "colors", "position"):
        mine = {json.dumps(prompt_line(tag, index), sort_keys=True) for index in range(TASKS[tag][0])}
        theirs = {json.dumps(dict(p.metadata), sort_keys=True) for p in prompts if p.metadata["tag"] == tag}
        assert theirs <= mine


def test_words_alone_leave_a_prompt_out() -> None:
    first, second = (line["prompt"] for line in training_list(2, {"colors": 1}, 0, set())[0])
    lines, _ = training_list(2, {"colors": 1}, 0, {of_text(first.upper() + ".")})
    assert lines[0]["prompt"] == second and len(lines) == 2


def program(folder: Path, root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stage.prompts", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_program_writes_a_list_that_loads(tmp_path: Path, root: Path) -> None:
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text("".join(json.dumps(prompt_line("counting", i)) + "\n" for i in range(200)))
    done = program(
        tmp_path, root, f"exclude=[{evaluated}]", "evaluated=null", "output=new/train.jsonl", "count=340"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "counting: 40 prompts in place of the 100 of its share, which is every one of its 240 that no excluded list "
        "asks for",
        "280 prompts in new/train.jsonl (position 140, counting 40, color_attr 60, colors 20, two_object 20); none "
        "asks for one of the 200 different pictures of the excluded lists",
    ]
    assert len(read_prompts(tmp_path / "new" / "train.jsonl")) == 280


def test_the_evaluation_is_left_out_without_its_list(tmp_path: Path, root: Path, shared: Path) -> None:
    """By default the 552 pictures that 553 prompts ask for are left out, here where everything there is is taken."""
    done = program(tmp_path, root, "output=train.jsonl", "count=30000", "shares.single_object=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("one of the 552 different pictures of the excluded lists")
    # all 80 single objects are evaluated; of 240 counts and 790 colours what is not
    tags = Counter(prompt.metadata["tag"] for prompt in read_prompts(tmp_path / "train.jsonl"))
    assert tags["single_object"] == 0 and tags["counting"] == 240 - 80 and tags["colors"] == 790 - 94
    file = shared / "data" / "geneval_evaluation_metadata.jsonl"
    if not file.is_file():
        pytest.skip(f"no GenEval metadata at {file}")
    assert not of_list(file) & of_list(tmp_path / "train.jsonl")
