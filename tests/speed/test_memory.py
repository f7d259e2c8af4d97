"""The table of memory by strategy and number of GPUs: its shape, its arithmetic, and its place in docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage.memory import SLACK
from stage.speed import memory
from stage.speed.memory import COUNTS, row, table
from stage.speed.models import build_policy


def test_a_row_by_hand() -> None:
    """Janus-Pro-7B in full on eight.

    Layers and text embeddings are trained: 30 * 202,383,360 + 102,400 * 4096 + 4096 numbers. A rollout has what is
    frozen in 2 bytes, an eighth of masters (4), moments (8) and reference (2), the copy (2), and keys and values.
    """
    policy = build_policy("7b", "meta", torch.bfloat16)
    trained = 30 * 202_383_360 + 102_400 * 4096 + 4096
    frozen = sum(parameter.numel() for parameter in policy.parameters()) - trained
    keys_values = 16 * 600 * 30 * 2 * 4096 * 2
    total = 2 * frozen + (4 + 8 + 2) * trained // 8 + 2 * trained + keys_values
    found = row("7b", "full")
    assert found[2 + len(COUNTS)] == f"{SLACK * total / 1e9:.0f}"


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of as many cells as the head has, under the names of strategies."""
    monkeypatch.setattr(memory, "row", lambda size, kind: [size, kind, *["1"] * 9])
    lines = table().splitlines()
    assert len(lines) == 6 and {line.count("|") for line in lines} == {12}
    assert lines[0].startswith("| size | trained | single, ddp | fsdp, 1 |")


def test_more_processes_take_less_each() -> None:
    numbers = [float(cell) for cell in row("1b", "full")[2:]]
    copied, layers = numbers[1:5], numbers[5:]
    assert copied == sorted(copied, reverse=True) and layers == sorted(layers, reverse=True)
    assert all(few <= many for few, many in zip(layers, copied, strict=True)) and copied[0] < numbers[0]


def test_the_documentation_has_this_table(root: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    assert table() in (root / "docs" / "scaling.md").read_text(encoding="utf-8")
