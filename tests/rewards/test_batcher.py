"""Batches across clients: who gets which answer, what is scored together, and what a failure costs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.rewards.batcher import Batcher, Overloaded, split
from stage.types import Prompt, Scores
from tests.rewards.serving import Brightness, numbered_images, some_prompts


class Watched(Brightness):
    """Remembers the shape of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.shapes.append(tuple(images.shape[:2]))
        return super().__call__(images, prompts)


def serve(scorer: Any, calls: Sequence[tuple[str, Tensor, Sequence[Prompt]]], **limits: Any) -> list[Any]:
    """Answers or exceptions of requests that come at the same time."""

    async def all_at_once() -> list[Any]:
        settings = {"max_images": 16, "max_wait_seconds": 0.02, "max_waiting": 100, "remembered": 8} | limits
        batcher = Batcher(scorer, **settings)
        task = asyncio.create_task(batcher.run())
        asked: list[Coroutine[Any, Any, Scores]] = [batcher.score(*call) for call in calls]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert batcher.waiting == 0
        task.cancel()
        return found

    return asyncio.run(all_at_once())


def test_requests_are_put_together_and_everybody_gets_his_own() -> None:
    images, prompts, scorer = numbered_images(6, 2), some_prompts(6), Watched()
    calls = [(str(i), images[i : i + 2], prompts[i : i + 2]) for i in (0, 2, 4)]
    found = serve(scorer, calls)
    alone = Brightness()(images, prompts)
    assert scorer.shapes == [(6, 2)]
    for index, scores in enumerate(found):
        assert torch.equal(scores.parts, alone.parts[2 * index : 2 * index + 2])
        assert scores.reasons == alone.reasons[2 * index : 2 * index + 2]


def test_other_shapes_and_full_batches_go_separately() -> None:
    scorer = Watched()
    calls = [
        ("a", numbered_images(1, 2), some_prompts(1)),
        ("b", numbered_images(1, 3), some_prompts(1)),  # another group size
        ("c", numbered_images(1, 3, side=9), some_prompts(1)),  # another picture size
        ("d", numbered_images(5, 3, side=9), some_prompts(5)),  # 3 + 15 images are more than 16
    ]
    found = serve(scorer, calls)
    assert scorer.shapes == [(1, 2), (1, 3), (1, 3), (5, 3)]
    assert [tuple(scores.parts.shape) for scores in found] == [(1, 2, 2), (1, 3, 2), (1, 3, 2), (5, 3, 2)]


def test_a_request_that_comes_again_is_not_scored_again() -> None:
    scorer = Watched()
    call = ("same", numbered_images(2, 2), some_prompts(2))
    first, second = serve(scorer, [call, call])
    assert scorer.shapes == [(2, 2)] and first is second


def test_one_clients_failure_is_not_anothers() -> None:
    images = numbered_images(1, 2)
    calls = [
        ("a", images, some_prompts(1)),
        ("b", images, [Prompt(0, "broken")]),
        ("c", images, some_prompts(1)),
    ]
    good, bad, also_good = serve(Watched(), calls)
    assert isinstance(bad, RuntimeError)
    assert torch.equal(good.parts, also_good.parts) and good.parts.shape == (1, 2, 2)


def test_a_failure_is_forgotten_and_can_be_tried_again() -> None:
    class Once(Watched):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
            if not self.shapes:
                self.shapes.append((0, 0))
                raise RuntimeError("not yet")
            return super().__call__(images, prompts)

    async def twice() -> Scores:
        batcher = Batcher(Once(), max_images=4, max_wait_seconds=0.0, max_waiting=9, remembered=9)
        task = asyncio.create_task(batcher.run())
        call = ("key", numbered_images(1, 2), some_prompts(1))
        with pytest.raises(RuntimeError, match="not yet"):
            await batcher.score(*call)
        scores = await batcher.score(*call)
        task.cancel()
        return scores

    assert asyncio.run(twice()).parts.shape == (1, 2, 2)


def test_a_full_queue_says_so() -> None:
    calls = [(str(i), numbered_images(2, 2), some_prompts(2)) for i in range(3)]
    found = serve(Watched(), calls, max_waiting=8)
    assert [isinstance(answer, Overloaded) for answer in found] == [False, False, True]


def test_a_client_that_hangs_up_does_not_take_the_answer_along() -> None:
    async def impatient() -> tuple[int, Scores]:
        scorer = Watched()
        batcher = Batcher(scorer, max_images=4, max_wait_seconds=0.05, max_waiting=9, remembered=9)
        task = asyncio.create_task(batcher.run())
        call = ("key", numbered_images(1, 2), some_prompts(1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.score(*call), 0.001)
        scores = await batcher.score(*call)
        task.cancel()
        return len(scorer.shapes), scores

    calls, scores = asyncio.run(impatient())
    assert calls == 1 and scores.parts.shape == (1, 2, 2)


def test_a_scorer_that_loses_rows_is_found_out() -> None:
    scores = Brightness()(numbered_images(3, 2), some_prompts(3))
    with pytest.raises(ValueError, match="3 rows and 3 reasons for 4 prompts"):
        split(scores, [2, 2])
