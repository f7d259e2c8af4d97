"""What T2I-CompBench's plain prompts say: category, line, relation, numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage.benchmarks.compbench import numeracy, read_compbench, spatial
from stage.rewards.mentions import read_mentions

PLURALS = {"cup": "cup", "cups": "cup", "woman": "woman", "women": "woman", "ice cream": "ice cream"}


def test_relations() -> None:
    found = spatial("a girl on the top of a frog")
    assert found["nouns"] == ["girl", "frog"]
    assert found["spatial_info"] == {"obj1": "girl", "obj2": "frog", "locality": "on the top of"}
    with pytest.raises(ValueError, match="'a dog behind a cat' does not"):
        spatial("a dog behind a cat")


def test_numbers() -> None:
    info = numeracy("Three cups, an ice cream, and two women filled the room", PLURALS)["numeracy_info"]
    assert [(entry["obj_name"], entry["num"]) for entry in info] == [
        ("cup", 3),
        ("ice cream", 1),
        ("woman", 2),
    ]
    with pytest.raises(ValueError, match="counts none"):
        numeracy("three dogs", PLURALS)


def test_lines_are_counted_by_category(tmp_path: Path) -> None:
    for name, lines in (
        ("color", "a red cup\na blue cup"),
        ("spatial", "a cup near a woman"),
        ("objects", "cup - cups"),
    ):
        (tmp_path / f"{name}.txt").write_text(lines + "\n")
    paths = {"color": str(tmp_path / "color.txt"), "2d_spatial_unofficial": str(tmp_path / "spatial.txt")}
    found = read_compbench(paths, str(tmp_path / "objects.txt"))
    assert [(p.metadata["category"], p.metadata["line"]) for p in found] == [
        ("color", 0), ("color", 1), ("2d_spatial_unofficial", 0),
    ]  # fmt: skip
    assert "nouns" not in found[0].metadata
    assert read_mentions(found[2]).nouns == ("cup", "woman")


def test_the_published_lists_are_read_whole(shared: Path) -> None:
    data = shared / "data" / "t2i_compbench"
    paths = {"2d_spatial": str(data / "spatial_val.txt"), "numeracy": str(data / "numeracy_val.txt")}
    found = read_compbench(paths, str(data / "new_objects.txt"))
    assert len(found) == 600 and all(read_mentions(prompt).nouns for prompt in found)
