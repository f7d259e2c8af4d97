"""The table of memory by strategy and number of GPUs: its shape, its arithmetic, and its place in docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage.memory import SLACK
from stage.speed.memory import COUNTS, rows, table
from stage.speed.models import build_policy


def by_strategy(size: str, kind: str) -> dict[str, list[float]]:
    return {name: [float(cell) for cell in cells] for _, _, name, *cells in rows(size, kind)}


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
    assert by_strategy("7b", "full")["fsdp"][COUNTS.index(8)] == round(SLACK * total / 1e9)


def test_the_table() -> None:
    """Twelve rows of as many cells as the head has."""
    lines = table().splitlines()
    assert len(lines) == 2 + 12 and {line.count("|") for line in lines} == {4 + len(COUNTS)}
    assert lines[0].startswith("| size | trained | strategy | 1 GPU | 2 GPUs |")


def test_more_processes_take_less_each() -> None:
    found = by_strategy("1b", "full")
    whole, copied, layers = found.values()
    assert len(set(whole)) == 1
    assert copied == sorted(copied, reverse=True) and layers == sorted(layers, reverse=True)
    assert all(few <= many for few, many in zip(layers, copied, strict=True))
    assert copied[0] < whole[0]


def test_the_documentation_has_this_table(root: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    assert table() in (root / "docs" / "scaling.md").read_text(encoding="utf-8")
