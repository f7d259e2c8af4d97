"""Numbers in words: signs, intervals, markdown."""

from __future__ import annotations

import pytest

from stage.report.tables import cell, markdown, number, score_markdown, score_table
from tests.report.example import entry

TASKS = {
    "overall": {"base": entry(0.5, 0.4, 0.6, 4), "tuned": entry(0.7), "difference": entry(0.2, 0.1, 0.3, 4)},
    "colors": {"base": entry(0.5, 0.4, 0.6), "tuned": entry(0.7), "difference": entry(-0.4, -0.5, -0.3)},
    "counting": {"base": entry(0.5, 0.4, 0.6), "tuned": entry(0.7), "difference": entry(0.1, -0.1, 0.3)},
}


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.5, False, "0.500"),
        (0.5, True, "+0.500"),
        (-0.25, True, "\N{MINUS SIGN}0.250"),
        (-0.0001, True, "0.000"),
    ],
)
def test_numbers(value: float, signed: bool, text: str) -> None:
    assert number(value, signed) == text


def test_a_difference_has_a_sign_only_where_its_interval_leaves_out_zero() -> None:
    assert [cell(entry(*values), True).sign for values in ((0.2, 0.1, 0.3), (-0.2, -0.3, -0.1))] == [1, -1]
    for low, high in ((-0.1, 0.3), (0.0, 0.4), (-0.4, 0.0), (None, None)):
        assert cell(entry(0.2, low, high), True).sign == 0
    assert cell(entry(0.2, 0.1, 0.3), False).sign == 0  # a score is above zero anyway


def test_overall_stands_last_and_the_scale_holds_every_bound() -> None:
    table = score_table("validation", "strict", TASKS)
    assert [row.task for row in table.rows] == ["colors", "counting", "overall"]
    assert table.overall.prompts == 4 and table.columns == ("base", "tuned", "difference")
    assert table.reach == 0.5  # the low bound of colors


def test_markdown_of_scores() -> None:
    lines = score_markdown(score_table("validation", "strict", TASKS)).splitlines()
    assert lines[0] == "| task | prompts | base | tuned | difference |"
    assert lines[2].startswith("| colors | 2 | 0.500 (0.400 to 0.600) | 0.700 | \N{MINUS SIGN}0.400 (")
    assert lines[-1].startswith("| **overall** | **4** |") and "**+0.200 (+0.100 to +0.300)**" in lines[-1]


def test_markdown_keeps_a_cell_in_its_cell() -> None:
    assert markdown(["a", "b"], [["x | y\nz", "<b>"]]).splitlines()[-1] == r"| x \| y z | &lt;b> |"
