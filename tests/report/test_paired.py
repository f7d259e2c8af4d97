"""Two evaluations prompt by prompt: hand arithmetic, and everything that forbids a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stage.report.__main__ import main
from stage.report.paired import paired_markdown, paired_tables
from stage.report.read import read_run
from tests.report.example import write_results

JUDGE = {"class": "a.B", "weights": {"sha256": {"x.pt": "1", "y.pt": "2"}}}
SCORER = {"_target_": "a.B", "threshold": 0.3, "detector": {"device": "cpu", "batch_size": 8}}
BENCHMARK = {
    "name": "shapes",
    "headline": "strict",
    "beside": ["partial"],
    "prompts_sha256": {"validation": "p"},
}
STRICT = {"a": [1, 0, 1, 1], "b": [1, 1, 0, 1]}  # two of colours, two of counting


def write(folder: Path, scores: list[int], change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """An evaluation whose tuned model has these strict scores on both splits."""
    folder.mkdir(parents=True)
    write_results(folder, {"validation": 0.6, "heldout": 0.4})
    results = json.loads((folder / "results.json").read_text())
    results |= {"judge": JUDGE, "config": {"benchmark": {"scorer": SCORER}}, "benchmark": dict(BENCHMARK)}
    for line in results["images"]:
        if line["model"] == "tuned":
            line["parts"]["strict"] = float(scores[line["index"]])
    if change is not None:
        change(results)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def tables(*folders: Path) -> list[Any]:
    found = [read_run(folder).evaluation for folder in folders]
    assert found[0] is not None and found[1] is not None
    return paired_tables(found[0], found[1])


def test_a_paired_table_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / name, scores) for name, scores in STRICT.items())
    first = tables(a, b)[0]
    assert first.title == "validation: strict"
    assert [row[:2] for row in first.rows] == [
        ["task", "prompts"],
        ["colors", "2"],
        ["counting", "2"],
        ["overall", "4"],
    ]
    means = [[cell.split(" ")[0] for cell in row[2:]] for row in first.rows[1:]]
    assert means == [
        ["0.500", "1.000", "+0.500"],
        ["1.000", "0.500", "\N{MINUS SIGN}0.500"],
        ["0.750", "0.750", "0.000"],
    ]
    assert first.rows[1][4] == "+0.500 (0.000 to +1.000)"  # one of two prompts gained
    assert [table.title for table in tables(a, b)] == [
        f"{split}: {part}" for split in ("validation", "heldout") for part in ("strict", "partial")
    ]
    main(["compare", str(a), str(b)])
    said = capsys.readouterr().out
    assert (
        "| colors | 2 | 0.500 (0.000 to 1.000) | 1.000 (1.000 to 1.000) | +0.500 (0.000 to +1.000) |" in said
    )


def test_an_evaluation_against_itself_has_no_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a", STRICT["a"])
    assert all(row[4] == "0.000 (0.000 to 0.000)" for row in tables(a, a)[0].rows[1:])


def test_a_prompt_counts_in_all_its_rows(tmp_path: Path) -> None:
    def rows(results: dict[str, Any]) -> None:
        for line in results["images"]:
            line["rows"] = [line["task"], "short"]

    a, b = (write(tmp_path / name, scores, rows) for name, scores in STRICT.items())
    found = {row[0]: row for row in tables(a, b)[0].rows}
    assert found["short"][1] == "4" and list(found) == ["task", "colors", "short", "counting", "overall"]


def test_published_numbers_stand_beside(tmp_path: Path) -> None:
    def published(results: dict[str, Any]) -> None:
        results["benchmark"]["published"] = {"source": "a paper", "rows": {"Theirs": {"overall": 0.9}}}

    a, b = (write(tmp_path / name, scores, published) for name, scores in STRICT.items())
    text = paired_markdown(a, b)
    assert "Published: a paper" in text and "| ours: B | 0.750 |" in text and "| Theirs | 0.9 |" in text


def set_in(*path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(results: dict[str, Any]) -> None:
        *inner, last = path
        for key in inner:
            results = results[key]
        results[last] = value

    return change


def less(results: dict[str, Any]) -> None:
    """Without the last two images of the tuned model on validation."""
    gone = [x for x in results["images"] if x["model"] == "tuned" and x["split"] == "validation"][-2:]
    results["images"] = [line for line in results["images"] if line not in gone]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("judge", "class", value="a.C"), r"differ in the class, a.B and a.C"),
        (set_in("judge", "weights", "sha256", "x.pt", value="3"), r"in 1 weight files \(x.pt\).*judges them"),
        (set_in("config", "benchmark", "scorer", "threshold", value=0.5), r"1 settings \(threshold 0.3 and 0.5\)"),
        (set_in("benchmark", "prompts_sha256", "validation", value="q"), "in prompts_sha256"),
        (set_in("benchmark", "name", value="geneval"), "in name .* has shapes.* has geneval"),
        (less, r"of 4 on validation 2 are in .*a alone\. Nothing was averaged"),
        (lambda results: results["images"][4].update(prompt="other"), "of 4 on validation 1 have another prompt"),
    ],
)  # fmt: skip
def test_what_changed_between_two_evaluations_is_said(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    a, b = write(tmp_path / "a", STRICT["a"]), write(tmp_path / "b", STRICT["b"], change)
    with pytest.raises(ValueError, match=said):
        tables(a, b)


def test_where_a_scorer_ran_does_not_matter_and_other_draws_are_told(tmp_path: Path) -> None:
    def moved(results: dict[str, Any]) -> None:
        results["config"]["benchmark"]["scorer"]["detector"] |= {"device": "cuda", "weights": "elsewhere"}
        results["settings"]["tuned"]["sampler"]["guidance_scale"] = 5.0

    a, b = write(tmp_path / "a", STRICT["a"]), write(tmp_path / "b", STRICT["b"], moved)
    text = paired_markdown(a, b)
    assert (
        "Drawn differently, sampler: A {'guidance_scale': 2.0" in text and "seed" not in text.split("##")[0]
    )


def test_a_folder_that_was_not_evaluated(tmp_path: Path) -> None:
    a = write(tmp_path / "a", STRICT["a"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.csv").write_text("update,reward/mean\n1,0.5\n")
    with pytest.raises(ValueError, match="was not evaluated"):
        paired_markdown(a, tmp_path / "b")
    with pytest.raises(SystemExit):
        main(["compare", str(a), str(a), str(a)])
