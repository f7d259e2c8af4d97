"""Rows, overall scores and win rates by hand, lists as people have them, and published numbers beside ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stage.benchmarks.adding import add_up, win_rate
from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.categories import Key, QuotedText
from stage.benchmarks.lists import read_list, read_lists
from stage.benchmarks.published import read_published
from stage.rewards.ocr import quoted
from stage.types import Prompt
from tests.benchmarks.example import Bright, prompts
from tests.benchmarks.test_evaluation import BOOTSTRAP, judged_by_hand

PUBLISHED = "package://stage/benchmarks/assets/published.json"
LENGTHS = QuotedText(quoted, [4, 8], [1, 2])


def made(**changed: Any) -> Benchmark:
    plain = Benchmark(
        "x", {"validation": prompts()}, 2, Bright(), "strict", (), Key("tag"), True, False, None
    )
    return replace(plain, **changed)


def test_overall_is_the_mean_of_rows_or_of_prompts() -> None:
    base = [*judged_by_hand("base", [[1, 0], [0, 0], [1, 1]])]
    tuned = [*judged_by_hand("tuned", [[1, 1], [1, 0], [1, 0]])]
    for macro, expected in (
        (True, (0.625, 0.625, 0.0)),  # ((1/2 + 0) / 2 + 1) / 2; ((1 + 1/2) / 2 + 1/2) / 2
        (False, (0.5, 2 / 3, 1 / 6)),  # (1/2 + 0 + 1) / 3; (1 + 1/2 + 1/2) / 3
    ):
        row = add_up([*base, *tuned], made(macro=macro), ["validation"], BOOTSTRAP)["validation"]["strict"]
        found = row["overall"]
        assert [found[name]["mean"] for name in ("base", "tuned", "difference")] == pytest.approx(expected)
        assert row["colors"]["tuned"]["mean"] == 0.75 and found["base"]["prompts"] == 3


def test_win_rate_by_hand() -> None:
    assert win_rate([0.1, 0.5, 0.5, 0.9], [0.2, 0.5, 0.4, 1.0]) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    base = [*judged_by_hand("base", [[1, 0], [0, 0], [1, 1]])]
    tuned = [*judged_by_hand("tuned", [[1, 1], [1, 0], [1, 0]])]
    bench = made(win_rate=True, macro=False)
    rows = add_up([*tuned, *base], bench, ["validation"], BOOTSTRAP)["validation"]["strict"]
    # Prompts: (tie, win), (win, tie), (tie, loss) -> 3/4, 3/4, 1/4.
    assert rows["colors"]["win_rate"]["mean"] == pytest.approx(0.75)
    assert rows["counting"]["win_rate"]["mean"] == pytest.approx(0.25)
    assert rows["overall"]["win_rate"]["mean"] == pytest.approx(7 / 12)
    assert "win_rate" not in add_up(base, bench, ["validation"], BOOTSTRAP)["validation"]["strict"]["overall"]


def test_rows_of_quoted_text() -> None:
    said = {text: LENGTHS(Prompt(1, f'a sign "{text}"')) for text in ("OPEN", "Be at ease", "Good bye")}
    assert said["OPEN"] == ("1 to 4 letters", "1 word")
    assert said["Be at ease"] == ("5 to 8 letters", "3 or more words")  # 8 letters without spaces
    assert said["Good bye"] == ("5 to 8 letters", "2 words")
    assert LENGTHS(Prompt(1, 'a sign "much too long"', {"level": 2}))[0::2] == (
        "9 or more letters",
        "level 2",
    )
    bench = made(
        splits={"test": [Prompt(n, f'"{t}"') for n, t in enumerate(said)]}, rows=LENGTHS, macro=False
    )
    groups = bench.by_task(bench.prompts("test"), [0.0, 0.5, 1.0])
    assert groups["5 to 8 letters"].tolist() == [0.5, 1.0] and groups["2 words"].tolist() == [1.0]
    assert [group.tolist() for group in bench.overall(groups, [0.0, 0.5, 1.0])] == [[0.0, 0.5, 1.0]]
    with pytest.raises(ValueError, match=r"rising positive numbers, got \[4, 4\]"):
        QuotedText(quoted, [4, 4], [1])


def test_a_list_that_is_not_there_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m stage.benchmarks.fetch geneval.*datasets=FOLDER"):
        read_list(str(tmp_path / "none.jsonl"), "geneval")


def test_lists_by_style(tmp_path: Path) -> None:
    (tmp_path / "anime.json").write_text(json.dumps(["a cat", 'a dog, "happy"']))
    (tmp_path / "photo.json").write_text(json.dumps(["a cat"]))
    paths = {name: str(tmp_path / f"{name}.json") for name in ("anime", "photo")}
    found = read_lists(paths, "style", "hpsv2")
    assert [(p.text, p.metadata["style"]) for p in found] == [
        ("a cat", "anime"), ('a dog, "happy"', "anime"), ("a cat", "photo"),
    ]  # fmt: skip
    # One prompt in two styles counts in both; twice in one is refused.
    assert made(splits={"test": found}, rows=Key("style")).task(found[2]) == "photo"
    with pytest.raises(ValueError, match="'a cat' more than once"):
        made(splits={"test": [found[0], found[0]]}, rows=Key("style"))


def test_a_json_list_with_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["a cat", 3]')
    with pytest.raises(ValueError, match=r"a.json:2: an element is a text or an object, got a int"):
        read_list(str(tmp_path / "a.json"), "hpsv2")
    (tmp_path / "a.json").write_text('["a cat",')
    with pytest.raises(ValueError, match=r"a.json:1: the file is not JSON"):
        read_list(str(tmp_path / "a.json"), "hpsv2")


def test_published_numbers_stand_below_ours() -> None:
    published = read_published(PUBLISHED, "geneval")
    assert "2509.25027" in published.source
    row = {"base": {"mean": 0.5}, "tuned": {"mean": 0.6}, "difference": {"mean": 0.1}}
    table = published.beside({"counting": row, "ours_only": row, "overall": row})
    assert table[0] == ["", "counting", "overall"]
    assert table[1:3] == [["ours: base", "0.500", "0.500"], ["ours: tuned", "0.600", "0.600"]]
    assert ["STAGE", "0.82", "0.88"] in table
    with pytest.raises(ValueError, match=r"no published table 'gen'.*geneval"):
        read_published(PUBLISHED, "gen")


def test_published_tables_are_those_of_the_shared_numbers(shared: Path) -> None:
    given = json.loads((shared / "data" / "paper_numbers.json").read_text())
    found = read_published(PUBLISHED, "geneval")
    assert {name: list(row.values()) for name, row in found.rows.items()} == given["geneval"]["rows"]
    t2i = read_published(PUBLISHED, "t2i_compbench").rows
    assert t2i["T2I-R1"]["complex"] == 0.3993 and t2i["STAGE"]["numeracy"] == 0.5278


def test_the_lists_that_people_have(shared: Path) -> None:
    data = shared / "data"
    geneval = read_list(str(data / "geneval_evaluation_metadata.jsonl"), "geneval")
    assert len(geneval) == 553 and len({Key("tag")(prompt) for prompt in geneval}) == 6
    assert len(read_list(str(data / "ocr_test.txt"), "ocr")) >= 1000
    assert {row for prompt in read_list(str(data / "ocr_test.txt"), "ocr") for row in LENGTHS(prompt)}
    drawbench = read_list(str(data / "drawbench.csv"), "drawbench")
    assert len(drawbench) >= 195 and len({Key("Category")(prompt) for prompt in drawbench}) == 11
