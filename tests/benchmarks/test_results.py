"""results.json, what is recorded in it, and the lines of the terminal."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from stage.benchmarks.provenance import command, versions
from stage.benchmarks.results import interval_text, print_scores, write_results


def test_results_are_plain_json_without_nan(tmp_path: Path) -> None:
    path = write_results(tmp_path / "new", {"prompt": "größer", "low": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "größer", "low": None}
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path / "new", {"mean": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["prompt"] == "größer"


def test_intervals_in_words() -> None:
    assert interval_text({"mean": 0.5, "low": 0.25, "high": 0.75}, signed=False) == "0.500 [0.25, 0.75]"
    assert interval_text({"mean": 0.5, "low": -0.001, "high": 0.75}, signed=True) == "+0.500 [-0.001, +0.750]"
    assert interval_text({"mean": 0.5, "low": None, "high": None}, signed=False) == "0.500"


def test_the_table_of_the_terminal_fits_into_80_columns() -> None:
    entry = {"mean": 0.5, "low": 0.25, "high": 0.75, "prompts": 3}
    rows = {
        task: {"base": entry, "tuned": entry, "difference": entry} for task in ("single_object", "overall")
    }
    console = Console(file=io.StringIO(), width=80)
    print_scores({"validation": {"strict": rows}}, "strict", 0.95, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].strip() == "validation: strict [95% interval over prompts]"
    assert lines[1].split() == ["task", "base", "tuned", "difference"]
    cells = "0.500 [0.25, 0.75] 0.500 [0.25, 0.75] +0.500 [+0.250, +0.750]"
    assert [" ".join(line.split()) for line in lines[2:4]] == [f"single_object {cells}", f"overall {cells}"]


def test_versions_name_what_moves_the_numbers() -> None:
    found = versions()
    assert found["torch"][0].isdigit() and found["python"][0] == "3"


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "splits=[heldout]", "prompt=a 'red' ring"])
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command()}"], capture_output=True, text=True).stdout
    assert words.splitlines()[1:] == ["evaluate.py", "splits=[heldout]", "prompt=a 'red' ring"]
