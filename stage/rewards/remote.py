"""A reward that another process computes: `reward=remote reward.url=http://HOST:PORT`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from pydantic import BaseModel, ValidationError
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)
from torch import Tensor

from stage.rewards.wire import (
    VERSION,
    About,
    Checked,
    CheckRequest,
    ScoreAnswer,
    ScoreRequest,
    encode_image,
    from_answer,
    from_prompts,
)
from stage.types import Prompt, Scores


class Unreachable(Exception):
    """A transport error or a 5xx: another attempt, at the next server, may succeed."""


class RemoteReward:
    """Asks reward services (`python -m stage.rewards.serve`) for scores; several take turns.

    Only transport errors and answers of status 5xx are tried again, at the next server, with exponential backoff.
    Whatever else goes wrong, and a pool that stays dead, raises: an image never gets a reward that nobody gave.

    Args:
        url: of one server, or a list. All must serve the same scorer.
        token: what the servers ask for, null for none.
        scorer: sha256 that `/v1/about` must name; null takes what the first server says.
        timeout_seconds: for one answer; connect_seconds: to reach a server.
        attempts: tries of one request in all; give_up_seconds: no other begins after so long. As soon as one request is
            given up no other is tried again, so that a dead pool raises within this time and two answers' time.
        backoff_seconds, max_backoff_seconds: the first and the longest pause between tries.
        images_per_request: at most; at least one prompt with one image, and all of its images where they are compared.
        requests_in_flight: at a time.

    Raises:
        ValueError: no server answers, or they serve different scorers. `provenance` is theirs.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token: str | None,
        scorer: str | None,
        timeout_seconds: float,
        connect_seconds: float,
        attempts: int,
        give_up_seconds: float,
        backoff_seconds: float,
        max_backoff_seconds: float,
        images_per_request: int,
        requests_in_flight: int,
    ) -> None:
        self.urls = [url] if isinstance(url, str) else list(url)
        if not self.urls or min(attempts, images_per_request, requests_in_flight) < 1:
            raise ValueError(
                f"a remote reward needs at least one url, attempt, image and request; got {self.urls}, {attempts}, "
                f"{images_per_request} and {requests_in_flight}"
            )
        self.images_per_request, self.requests_in_flight = images_per_request, requests_in_flight
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        timeout = httpx.Timeout(timeout_seconds, connect=connect_seconds)
        # The environment's proxies are for the world outside, and would be given the token.
        self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=False)
        self._retry = Retrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_attempt(attempts) | stop_before_delay(give_up_seconds),
            wait=wait_random_exponential(multiplier=backoff_seconds, max=max_backoff_seconds),
            reraise=True,
        )
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self.scorer = scorer
        self.provenance: dict[str, Any] = {}
        self.compares_group = False
        self._meet()

    def _meet(self) -> None:
        """Learn what the servers score with; one that is down now may come back later."""
        abouts = []
        for url in self.urls:
            try:
                abouts.append(self._once("GET", url, "/v1/about", None, About))
            except Unreachable as error:
                if len(self.urls) == 1:
                    raise ValueError(f"{error}. Start it with python -m stage.rewards.serve.") from error
        if not abouts:
            raise ValueError(
                f"a remote reward needs a server, none of {', '.join(self.urls)} answers. Start one with "
                "python -m stage.rewards.serve."
            )
        found = {about.scorer for about in abouts} | ({self.scorer} if self.scorer else set())
        if len(found) != 1:
            raise ValueError(
                f"all servers must serve the scorer that is asked for; found {', '.join(sorted(found))}. Start them "
                "with the same configuration and weights."
            )
        self.scorer = abouts[0].scorer
        self.compares_group = abouts[0].compares_group
        self.provenance = {"scorer": self.scorer, "reward": abouts[0].reward, **abouts[0].provenance}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError where the servers can never score one of these prompts."""
        for start in range(0, len(prompts), 256):
            body = CheckRequest(version=VERSION, prompts=from_prompts(prompts[start : start + 256]))
            self._ask("/v1/check", body, Checked, threading.Event())

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to the parts `[P, G, R]` of the servers' scorer.

        Raises ConnectionError when every attempt failed, ValueError for a request or an answer that is wrong.
        """
        # All at once and at once: beside a reference on the same device, later copies would wait for its kernels.
        shown = images.cpu()
        each = images.shape[1] if self.compares_group else self.images_per_request
        pieces = [
            (prompts[row : row + 1], shown[row : row + 1, start : start + each])
            for row in range(len(prompts))
            for start in range(0, images.shape[1], each)
        ]
        dead = threading.Event()
        with ThreadPoolExecutor(self.requests_in_flight) as pool:
            try:
                found = list(pool.map(lambda piece: self._score(piece[0], piece[1], dead), pieces))
            except BaseException:
                dead.set()  # or the pool would wait for all tries of the others
                raise
        first = found[0]
        if any((s.names, s.weights, s.ranges) != (first.names, first.weights, first.ranges) for s in found):
            raise ValueError(
                "all answers must speak of the same parts; the servers differ. Restart them alike."
            )
        rows = len(pieces) // len(prompts)
        reasons = [
            tuple(reason for s in found[p * rows : (p + 1) * rows] for reason in s.reasons[0])
            for p in range(len(prompts))
        ]
        parts = torch.cat([scores.parts[0] for scores in found]).unflatten(0, tuple(images.shape[:2]))
        return Scores(parts.to(images.device), first.names, first.weights, tuple(reasons), first.ranges)

    def _score(self, prompts: Sequence[Prompt], images: Tensor, dead: threading.Event) -> Scores:
        pictures = images[0].numpy()
        body = ScoreRequest(
            version=VERSION,
            prompts=from_prompts(prompts),
            images=[[encode_image(picture) for picture in pictures]],
        )
        answer = self._ask("/v1/score", body, ScoreAnswer, dead)
        if answer.scorer != self.scorer:
            raise ValueError(
                f"a run must be scored by one scorer, {self.scorer}; a server now answers with {answer.scorer}. "
                "Restart it with the former configuration and weights."
            )
        return from_answer(answer, 1, len(pictures))

    def _ask(self, path: str, body: BaseModel, expected: type[Any], dead: threading.Event) -> Any:
        content = body.model_dump_json()
        with self._lock:
            start = next(self._turn)  # where this request begins; its next try is at the next server
        urls = (self.urls[turn % len(self.urls)] for turn in itertools.count(start))
        stop = self._retry.stop | stop_when_event_set(dead)  # type: ignore[operator]
        retry = self._retry.copy(stop=stop, sleep=sleep_using_event(dead))
        try:
            return retry(lambda: self._once("POST", next(urls), path, content, expected))
        except Unreachable as error:
            raise ConnectionError(
                f"the reward servers {', '.join(self.urls)} did not answer, last: {error}. No reward was made up: "
                "mend the servers and resume the run."
            ) from error

    def _once(self, method: str, url: str, path: str, content: str | None, expected: type[Any]) -> Any:
        """One request to one server; Unreachable where another try makes sense."""
        try:
            response = self._client.request(
                method,
                f"{url.rstrip('/')}{path}",
                content=content,
                headers={"Content-Type": "application/json"},
            )
        except httpx.TransportError as error:
            raise Unreachable(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        if response.status_code >= 500:
            raise Unreachable(f"{url}: status {response.status_code}, {response.text[:500]}")
        if response.status_code != 200:
            raise ValueError(f"{url} refused a request: status {response.status_code}, {response.text[:500]}")
        try:
            return expected.model_validate_json(response.content)
        except ValidationError as error:
            raise ValueError(f"{url} gave an answer that does not fit version {VERSION}: {error}") from error
