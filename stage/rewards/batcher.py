"""Requests of many clients become one call of the scorer, and a repeated request gets its first answer again."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from stage.types import Prompt, Scorer, Scores


class Overloaded(Exception):
    """More images wait than the service has room for; the client should come back later."""


@dataclass(frozen=True)
class Job:
    """One request: images uint8 `[P, G, H, W, 3]`, P prompts, and where the answer goes."""

    key: str
    images: Tensor
    prompts: Sequence[Prompt]
    answer: asyncio.Future[Scores]

    @property
    def count(self) -> int:
        return self.images.shape[:2].numel()


class Batcher:
    """Collects requests for up to `max_wait_seconds` or `max_images` and scores those of one shape together.

    Args:
        scorer: called in a thread of its own, one call at a time.
        max_images: in one call; a single request may have more.
        max_wait_seconds: how long the first request of a batch waits for others.
        max_waiting: images in the queue, above which `score` raises `Overloaded`.
        remembered: answers kept for requests that come again, because their answer got lost on the way.
    """

    def __init__(
        self, scorer: Scorer, *, max_images: int, max_wait_seconds: float, max_waiting: int, remembered: int
    ) -> None:
        self.scorer, self.max_images, self.max_wait_seconds = scorer, max_images, max_wait_seconds
        self.max_waiting, self.remembered = max_waiting, remembered
        self.waiting = self.scored = self.calls = 0  # images in the queue; images and calls since the start
        self.seconds = 0.0  # spent in the scorer
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._answers: OrderedDict[str, asyncio.Future[Scores]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._left: Job | None = None  # taken from the queue, and of another shape than the batch

    async def score(self, key: str, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """The scores of one request; `key` is a hash of its content. Raises what the scorer raises for it."""
        known = self._answers.get(key)
        if known is None:
            known = self._enqueue(Job(key, images, prompts, asyncio.get_running_loop().create_future()))
        # A client that hangs up must not take the answer away from the one that asks again.
        return await asyncio.shield(known)

    def _enqueue(self, job: Job) -> asyncio.Future[Scores]:
        if self.waiting and self.waiting + job.count > self.max_waiting:
            raise Overloaded(f"{self.waiting} images are waiting, {job.count} more do not fit")
        self.waiting += job.count
        self._answers[job.key] = job.answer
        while len(self._answers) > self.remembered and next(iter(self._answers.values())).done():
            self._answers.popitem(last=False)
        self._queue.put_nowait(job)
        return job.answer

    async def run(self) -> None:
        """Score what comes until cancelled."""
        while True:
            batch = await self._collect()
            await self._score_all(batch)

    async def _collect(self) -> list[Job]:
        """At least one job, and those that follow it in time, of the same shape of images."""
        first = self._left or await self._queue.get()
        self._left, batch, count = None, [first], first.count
        until = time.monotonic() + self.max_wait_seconds
        while count < self.max_images:
            try:
                job = await asyncio.wait_for(self._queue.get(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                break
            if job.images.shape[1:] != first.images.shape[1:] or count + job.count > self.max_images:
                self._left = job
                break
            batch.append(job)
            count += job.count
        return batch

    async def _score_all(self, batch: list[Job]) -> None:
        try:
            for job, scores in zip(batch, await self._call(batch), strict=True):
                self._finish(job, scores)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            for job in batch:  # one client's images must not fail another's
                await self._score_all([job])

    async def _call(self, batch: list[Job]) -> list[Scores]:
        images = torch.cat([job.images for job in batch])
        prompts = [prompt for job in batch for prompt in job.prompts]
        started = time.perf_counter()
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self.scorer, images, prompts)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return split(found, [len(job.prompts) for job in batch])

    def _finish(self, job: Job, scores: Scores) -> None:
        self.waiting -= job.count
        self.scored += job.count
        job.answer.set_result(scores)

    def _fail(self, job: Job, error: Exception) -> None:
        # Forgotten, so that the request can be tried again.
        self.waiting -= job.count
        self._answers.pop(job.key, None)
        job.answer.set_exception(error)
        job.answer.exception()  # seen, even if the client has gone: asyncio would complain about it at exit


def split(scores: Scores, lengths: Sequence[int]) -> list[Scores]:
    """Scores of prompts one after the other, cut back into those of each request.

    Raises ValueError when the scorer gave another number of rows.
    """
    if len(scores.parts) != sum(lengths) or len(scores.reasons) != sum(lengths):
        raise ValueError(
            f"a scorer must give one row a prompt; got {len(scores.parts)} rows and {len(scores.reasons)} reasons "
            f"for {sum(lengths)} prompts"
        )
    cut, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        cut.append(
            Scores(
                scores.parts[rows].cpu(), scores.names, scores.weights, scores.reasons[rows], scores.ranges
            )
        )
        start += length
    return cut
