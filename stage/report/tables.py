"""Scores as rows ready to be shown, in a page or in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OVERALL = "overall"
NAMES = {
    "images": "images",
    "base": "base",
    "tuned": "tuned",
    "difference": "difference",
    "win_rate": "win rate",
}


@dataclass(frozen=True)
class Cell:
    """A mean with its interval, as text; `sign` is +1 or -1 for a difference whose interval excludes zero, else 0.

    `mean`, `low` and `high` are the numbers, for a mark on a scale; the bounds are None where there is no interval.
    """

    text: str
    interval: str
    sign: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """A task of one split with a cell a column, and the number of prompts behind it."""

    task: str
    prompts: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class ScoreTable:
    """One split: `columns` are the keys of `cells` in order; `reach` is the largest difference, for a common scale."""

    split: str
    part: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    reach: float

    @property
    def overall(self) -> Row:
        return self.rows[-1]


def score_table(split: str, part: str, tasks: Mapping[str, Mapping[str, Any]]) -> ScoreTable:
    """The table of one split and part of results.json's `scores`; the row `overall` comes last."""
    order = [task for task in tasks if task != OVERALL] + [OVERALL]
    columns = tuple(column for column in NAMES if column in tasks[OVERALL])
    rows = tuple(
        Row(
            task,
            int(tasks[task][columns[0]]["prompts"]),
            {c: cell(tasks[task][c], c == "difference") for c in columns},
        )
        for task in order
    )
    bounds = [
        abs(value)
        for row in rows
        for name, item in row.cells.items()
        if name == "difference"
        for value in (item.mean, item.low, item.high)
        if value is not None
    ]
    return ScoreTable(split, part, columns, rows, max([*bounds, 0.05]))


def cell(entry: Mapping[str, Any], signed: bool, digits: int = 3) -> Cell:
    """Text of one `{mean, low, high}`; differences carry their sign, with a true minus."""
    low, high = entry["low"], entry["high"]
    known = low is not None and high is not None
    interval = f"{number(low, signed, digits)} to {number(high, signed, digits)}" if known else ""
    sign = 0 if not signed or not known or low <= 0 <= high else (1 if low > 0 else -1)
    return Cell(number(entry["mean"], signed, digits), interval, sign, entry["mean"], low, high)


def number(value: float, signed: bool = False, digits: int = 3) -> str:
    """So many decimals with a true minus; a rounded zero has no sign."""
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    zero = f"{0:.{digits}f}"
    return zero if text.lstrip("+-") == zero else text.replace("-", "\N{MINUS SIGN}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others numbers, and bars in cells are escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_escaped(str(item)) for item in line) + " |" for line in lines)


def score_markdown(table: ScoreTable) -> str:
    """`score_table` in markdown, intervals in brackets and the overall row bold."""
    rows = []
    for row in table.rows:
        cells = [
            item.text if not item.interval else f"{item.text} ({item.interval})"
            for item in row.cells.values()
        ]
        line = [row.task, str(row.prompts), *cells]
        rows.append([f"**{entry}**" for entry in line] if row.task == OVERALL else line)
    return markdown(["task", "prompts", *(NAMES[column] for column in table.columns)], rows)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")
