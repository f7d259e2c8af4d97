"""The benchmark record: what it refuses, how it judges, how it groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stage.benchmarks.shapes import ShapesBenchmark
from stage.types import Prompt
from tests.benchmarks.example import Bright, benchmark, prompts


def test_verdicts_stand_where_their_images_stand() -> None:
    # Prompt p, sample g has the pixel value 100 p + 50 g.
    values = torch.tensor([[0, 50], [100, 150], [200, 250]], dtype=torch.uint8)
    images = values[..., None, None, None].expand(3, 2, 4, 4, 3)
    verdicts = benchmark(2).judge(images, prompts())
    partial = [[verdict.parts["partial"] for verdict in group] for group in verdicts]
    np.testing.assert_allclose(partial, values.numpy() / 255, atol=1e-6)
    assert [[verdict.parts["strict"] for verdict in group] for group in verdicts] == [[0, 0], [0, 1], [1, 1]]
    assert verdicts[2][0].reason == "mean 0.7843"  # 200 / 255


def test_tasks_keep_the_order_of_the_file() -> None:
    mixed = prompts((("b", "one"), ("a", "two"), ("b", "three")))
    groups = benchmark().by_task(mixed, [0.1, 0.2, 0.3])
    assert {task: values.tolist() for task, values in groups.items()} == {"b": [0.1, 0.3], "a": [0.2]}
    assert list(groups) == ["b", "a"]


def test_a_prompt_without_a_tag_counts_in_one_task() -> None:
    assert benchmark().task(Prompt(1, "anything")) == "all"


def test_an_unknown_split_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no split 'test'; benchmark 'example' has validation, heldout"):
        benchmark().prompts("test")


def test_what_no_benchmark_can_be() -> None:
    with pytest.raises(ValueError, match="at least one image per prompt, got 0"):
        benchmark(0)
    with pytest.raises(ValueError, match="'empty' has no prompts"):
        ShapesBenchmark("x", {"empty": ()}, 1, Bright(), "strict", [])
    with pytest.raises(ValueError, match=r"'a ring'.*more than once"):
        ShapesBenchmark("x", {"twice": (Prompt(1, "a ring"), Prompt(1, "a ring"))}, 1, Bright(), "strict", [])


def test_a_scorer_without_the_headline_is_refused() -> None:
    other = ShapesBenchmark("x", {"all": prompts()}, 1, Bright(), "beauty", [])
    with pytest.raises(ValueError, match="must name a part 'beauty', it named partial, strict"):
        other.judge(torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), prompts())


def test_only_shapes_itself_lies_beside_the_folders_of_others() -> None:
    assert benchmark().subfolder == "example"
    assert ShapesBenchmark("shapes", {"all": prompts()}, 1, Bright(), "strict", []).subfolder == ""
