"""Prompt files in the shapes that people have, what is wrong with a line, and prompts that a reward cannot score."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stage.prompt_files import check_prompts, prompt_id, read_prompts
from stage.types import Prompt

MIXED: tuple[dict[str, Any], ...] = (
    {
        "prompt": "a car below a zebra",
        "nouns": ["car", "zebra"],
        "spatial_info": {"obj1": "car", "obj2": "zebra", "locality": "below"},
        "task_type": "spatial",
    },
    {
        "prompt": "four coasters",
        "nouns": ["coaster"],
        "numeracy_info": [{"obj_name": "coaster", "num": 4}],
        "task_type": "numeracy",
    },
    {
        "prompt": "a purple elephant",
        "nouns": ["elephant"],
        "attr_nouns": ["purple elephant"],
        "task_type": "color",
    },
    {"prompt": "a child plays", "nouns": ["child"], "task_type": "non"},
)


def write(path: Path, *lines: str | dict[str, Any] | bytes) -> Path:
    rows = [json.dumps(row) if isinstance(row, dict) else row for row in lines]
    path.write_bytes(b"\n".join(row.encode() if isinstance(row, str) else row for row in rows) + b"\n")
    return path


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# --- Shapes


def test_plain_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a red car\r", '  a sign that says "OPEN"  ', "héron — “oui”")
    found = read_prompts(file)
    assert texts(found) == ["a red car", 'a sign that says "OPEN"', "héron — “oui”"]
    assert found[0] == Prompt(prompt_id("a red car"), "a red car", {"prompt": "a red car"})


def test_the_mixed_list_keeps_its_fields(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "a.jsonl", *MIXED))
    assert [prompt.metadata for prompt in found] == list(MIXED)


def test_geneval_and_other_lines_in_one_file(tmp_path: Path) -> None:
    geneval = {"tag": "x", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    assert texts(read_prompts(write(tmp_path / "a.jsonl", geneval, *MIXED)))[:2] == [
        "a dog",
        MIXED[0]["prompt"],
    ]


def test_counts_may_be_strings(tmp_path: Path) -> None:
    geneval = {
        "tag": "counting", "prompt": "two dogs",
        "include": [{"class": "dog", "count": "2"}], "exclude": [{"class": "dog", "count": " 3 "}],
    }  # fmt: skip
    mixed = {**MIXED[1], "numeracy_info": [{"obj_name": "coaster", "num": "4"}]}
    first, second = read_prompts(write(tmp_path / "a.jsonl", geneval, mixed))
    assert first.metadata["include"] == [{"class": "dog", "count": 2}]
    assert first.metadata["exclude"] == [{"class": "dog", "count": 3}]
    assert second.metadata == MIXED[1]


def test_tables(tmp_path: Path) -> None:
    comma = write(
        tmp_path / "a.csv", '"Prompts","Category"', '"A ""red"", big car.","Colors"', '"two\nlines","x"'
    )
    assert [prompt.metadata for prompt in read_prompts(comma)] == [
        {"prompt": 'A "red", big car.', "Category": "Colors"},
        {"prompt": "two\nlines", "Category": "x"},
    ]
    tab = write(tmp_path / "a.tsv", b"\xef\xbb\xbfPrompt\tCategory", "a cat, sitting\tAnimals")
    assert texts(read_prompts(tab)) == ["a cat, sitting"]


def test_what_begins_with_a_brace_is_json(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.txt", *MIXED))[1].metadata == MIXED[1]


def test_repeated_prompts_are_read_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert texts(read_prompts(write(tmp_path / "a.txt", "a", "b", "a", "b", "c"))) == ["a", "b", "c"]
    assert caplog.messages == [
        f"{tmp_path / 'a.txt'}:3: 2 prompts stand on an earlier line already and are read once"
    ]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*'x' is on line 1 already with other metadata"):
        read_prompts(write(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "x", "nouns": ["dog"]}))


# --- Lines that are wrong

BAD: dict[str, tuple[str, Sequence[str | dict[str, Any] | bytes], int, str]] = {
    "an empty line": ("a.txt", ["a", " ", "b"], 2, "the line is empty; remove it"),
    "no UTF-8": ("a.txt", ["a", b"caf\xe9"], 2, "not UTF-8 .*at byte 3"),
    "no UTF-8 in a table": ("a.csv", ["prompt", "a", b"b,caf\xe9"], 3, "not UTF-8 .*at byte 5"),
    "no column of prompts": ("a.csv", ["name,kind", "a,b"], 1, r"over the prompts, got \['name', 'kind'\]"),
    "two headings": ("a.csv", ["prompt,prompt", "a,b"], 1, "different headings"),
    "a cell too many": ("a.csv", ["prompt,kind", "a,b", "one, two,c"], 3, "2, got 3; put cells that hold ','"),
    "a quote in the middle": ("a.csv", ["prompt", 'a', '"b"c'], 3, "the row cannot be read"),
    "an empty cell": ("a.csv", ["prompt,kind", "a,b", ",c"], 3, "non-empty string, got ''"),
    "nouns in a string": ("a.jsonl", [MIXED[0], {**MIXED[1], "nouns": "dog"}], 2, "nouns must be a list .* 'dog'"),
    "an empty noun": ("a.jsonl", [{**MIXED[1], "nouns": [""]}], 1, "nouns must be a list"),
    "no second object": (
        "a.jsonl", [{"prompt": "x", "spatial_info": {"obj1": "dog", "locality": "above"}}], 1, "obj1, obj2 and loc",
    ),
    "spatial as a list": ("a.jsonl", [{"prompt": "x", "spatial_info": ["dog"]}], 1, "spatial_info must name"),
    "num in words": (
        "a.jsonl", [{"prompt": "x", "numeracy_info": [{"obj_name": "dog", "num": "two"}]}], 1, "positive num",
    ),
    "num of 0": ("a.jsonl", [{"prompt": "x", "numeracy_info": [{"obj_name": "dog", "num": 0}]}], 1, "positive num"),
    "num is true": (
        "a.jsonl", [{"prompt": "x", "numeracy_info": [{"obj_name": "dog", "num": True}]}], 1, "positive num",
    ),
    "no objects": ("a.jsonl", [{"prompt": "x", "numeracy_info": []}], 1, "numeracy_info must list"),
    "half of GenEval": ("a.jsonl", [{"prompt": "x", "tag": "colors", "nouns": ["dog"]}], 1, "include must list"),
    "negative count": (
        "a.jsonl", [{"prompt": "x", "tag": "x", "include": [{"class": "dog", "count": "-1"}]}], 1, "got '-1'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    name, lines, number, words = BAD[case]
    with pytest.raises(ValueError, match=rf"{name}:{number}: .*({words})"):
        read_prompts(write(tmp_path / name, *lines))


# --- Before the first image


class Long:
    """Scores prompts of more than two letters."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if len(prompt.text) < 3:
                raise ValueError(f"{prompt.text!r} is short")


def test_a_scorer_is_asked_about_each_list() -> None:
    good, bad = Prompt(1, "long enough"), Prompt(2, "ab")
    check_prompts(Long(), {"data.train": [good], "data.validation": []})
    check_prompts(object(), {"data.train": [bad]})  # one that cannot tell
    with pytest.raises(ValueError, match=r"data\.validation: 'ab' is short"):
        check_prompts(Long(), {"data.train": [good], "data.validation": [good, bad]})


# --- Real lists


COUNTS = {
    "geneval_evaluation_metadata.jsonl": 553,
    "geneval_and_t2i_train.jsonl": 7223,
    "ocr_test.txt": 1018,
    "drawbench.csv": 200,
    "coco_object_names.txt": 80,
    "t2i_compbench/color_val.txt": 295,  # of 300 lines
    "t2i_compbench/numeracy_val.txt": 300,
    "t2i_compbench/new_objects.txt": 88,  # of 101 lines
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_lists_load(name: str, shared: Path) -> None:
    file = shared / "data" / name
    if not file.is_file():
        pytest.skip(f"no list at {file}")
    found = read_prompts(file)
    assert len(found) == COUNTS[name] == len(set(texts(found)))
    assert all(prompt.text == prompt.text.strip() for prompt in found)
