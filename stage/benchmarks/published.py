"""Numbers that papers print, to lay beside ours. Read off published tables: check the source before quoting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stage.paths import resolve


@dataclass(frozen=True)
class Published:
    """`rows`: name of the model or method to its score by task; `source`: where they are printed."""

    source: str
    rows: Mapping[str, Mapping[str, float]]

    def beside(self, ours: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
        """Our scores above these as rows of text, headings first: a column for each task that both know.

        Args:
            ours: the rows of one part in results.json.
        """
        tasks = [task for task in ours if any(task in row for row in self.rows.values())]
        roles = [name for name in next(iter(ours.values())) if name not in ("difference", "win_rate")]
        return [
            ["", *tasks],
            *([f"ours: {role}", *(f"{ours[task][role]['mean']:.3f}" for task in tasks)] for role in roles),
            *([name, *(str(row.get(task, "")) for task in tasks)] for name, row in self.rows.items()),
        ]

    def record(self) -> dict[str, Any]:
        """What results.json says about them."""
        return {"source": self.source, "rows": {name: dict(row) for name, row in self.rows.items()}}


def read_published(path: str, table: str) -> Published:
    """One table of a file like stage/benchmarks/assets/published.json.

    Raises:
        ValueError: the file has no such table; names those it has.
    """
    tables = json.loads(resolve(path).read_text(encoding="utf-8"))
    if table not in tables:
        raise ValueError(f"no published table {table!r} in {path}; it has {', '.join(tables)}")
    found = tables[table]
    return Published(str(found["source"]), found["rows"])
