"""Notebooks: they run from a checkout in less than two minutes each, define nothing, and are committed with output."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 120  # seconds
LARGEST = 1_500_000  # bytes
SILENT = 2  # cells without output: imports, and a filter of warnings


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tables(notebook: Any) -> list[str]:
    """The tables that the notebook shows, as markdown: rounded numbers of archived runs, alike on every machine."""
    return [
        output.data["text/markdown"]
        for cell in code(notebook)
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]


def test_both_are_there() -> None:
    assert [file.stem for file in FILES] == ["01_one_step_by_hand", "02_read_an_ablation"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_imports_and_defines_nothing(file: Path) -> None:
    for cell in code(nbformat.read(file, as_version=4)):
        made = [
            n
            for n in ast.walk(ast.parse(cell.source))
            if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)
        ]
        assert not made, cell.source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_committed_with_its_output(file: Path) -> None:
    """Run from top to bottom, without an error or a warning, with pictures, and small."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(not cell.outputs for cell in cells) <= SILENT
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert file.stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(file, as_version=4)
    committed = tables(notebook)
    started = time.monotonic()
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()
    assert time.monotonic() - started < LONGEST
    assert tables(notebook) == committed  # else run it again and commit its output
    words = "".join(o.text for cell in code(notebook) for o in cell.outputs if o.output_type == "stream")
    differences = [
        float(line.split()[-1]) for line in words.splitlines() if line.startswith("largest difference")
    ]
    assert all(difference < 1e-6 for difference in differences)
    if file.stem.startswith("01"):
        assert len(differences) == 3
