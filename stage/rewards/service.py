"""Any reward behind HTTP: an ASGI application with a token, limits, health, metrics and an OpenAPI document."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from stage.provenance import weights_of
from stage.rewards import members
from stage.rewards.batcher import Batcher, Overloaded
from stage.rewards.wire import (
    VERSION,
    About,
    Checked,
    CheckRequest,
    ScoreAnswer,
    ScoreRequest,
    decode_images,
    to_answer,
    to_prompts,
)
from stage.types import ChecksPrompts, Prompt, Scorer

RETRY_AFTER_SECONDS = 1
OPEN_PATHS = ("/health", "/openapi.json")  # what is told without a token
# What /metrics says of the batcher: its attribute, and words.
GAUGES = {
    "stage_scored": ("scored", "Images scored"),
    "stage_calls": ("calls", "Calls of the scorer"),
    "stage_waiting": ("waiting", "Images waiting"),
    "stage_scorer_seconds": ("seconds", "Seconds spent in the scorer"),
}


@dataclass(frozen=True)
class Limits:
    """What one service takes.

    max_images: in one call of the scorer; max_wait_seconds: how long a request waits for others to join it.
    max_waiting: images in the queue, above which clients are told to come back (503).
    max_bytes: of a request's body (413). images_per_minute: of one client address (429).
    remembered: answers kept for requests that come again.
    """

    max_images: int
    max_wait_seconds: float
    max_waiting: int
    max_bytes: int
    images_per_minute: int
    remembered: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} must be positive; got {value}. Raise it.")


def scorer_identity(config: Mapping[str, Any], scorer: Scorer) -> str:
    """sha256 over what the scorer computes: its configuration and the weights it says it read."""
    content = {"config": config, "provenance": weights_of(scorer)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_exposure(host: str, token: str | None) -> None:
    """Raise ValueError for a service that other machines could reach without a token."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if token is None and not local:
        raise ValueError(
            f"a service that other machines can reach must have a token; host is {host!r} and there is none. "
            "Set serve.token, or host=127.0.0.1."
        )


class LimitBody:
    """ASGI middleware: a body of more than `max_bytes` is refused with 413, before it is in memory."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        body, more = b"", True
        while more:  # a body without a stated length is counted as it comes
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.max_bytes:
                await self._refuse(scope, receive, send)
                return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Any:
            return next(parts, None) or await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        text = f"a request may have {self.max_bytes} bytes; send fewer images at once"
        await problem(413, text)(scope, receive, send)


class RequireToken:
    """ASGI middleware: without the token nothing is read and nothing is told, apart from `OPEN_PATHS`."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.expected = app, None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.expected is not None and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                text = "a request needs the header Authorization: Bearer TOKEN"
                await problem(401, text, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class CountAnswers:
    """ASGI middleware: counts answers by status as they begin. A client that hangs up first is no answer."""

    def __init__(self, app: Any, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.counter.labels(message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)


def problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as JSON in ASCII, whatever characters the client sent."""
    content = json.dumps({"detail": text})
    return Response(content, status, dict(headers or {}), media_type="application/json")


class Service:
    """The state behind the application: the scorer, its batcher, its counters."""

    def __init__(
        self, scorer: Scorer, *, reward: str, identity: str, token: str | None, limits: Limits
    ) -> None:
        self.scorer, self.reward, self.identity, self.token, self.limits = (
            scorer,
            reward,
            identity,
            token,
            limits,
        )
        self.batcher = Batcher(
            scorer,
            max_images=limits.max_images,
            max_wait_seconds=limits.max_wait_seconds,
            max_waiting=limits.max_waiting,
            remembered=limits.remembered,
        )
        self.registry = CollectorRegistry()
        self.answers = Counter("stage_answers", "Answers by status", ["status"], registry=self.registry)
        for name, (attribute, text) in GAUGES.items():
            gauge = Gauge(name, text, registry=self.registry)
            gauge.set_function(partial(getattr, self.batcher, attribute))
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def allow(self, client: str, images: int) -> None:
        """Raise 429 for a client that sent more than its images of this minute."""
        limit = RateLimitItemPerMinute(self.limits.images_per_minute)
        if not self._limiter.hit(limit, client, cost=images):
            raise HTTPException(
                429,
                f"a client may send {self.limits.images_per_minute} images a minute; raise limits.images_per_minute",
            )

    def check(self, prompts: tuple[Prompt, ...]) -> None:
        """Raise 422 for prompts that this reward can never score."""
        if isinstance(self.scorer, ChecksPrompts):
            try:
                self.scorer.check(prompts)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error

    async def score(self, body: bytes, request: ScoreRequest) -> ScoreAnswer:
        prompts = to_prompts(request.prompts)
        self.check(prompts)
        try:
            images = await asyncio.to_thread(decode_images, request.images, len(prompts))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        try:
            scores = await self.batcher.score(hashlib.sha256(body).hexdigest(), images, prompts)
            return to_answer(scores, self.identity)
        except Overloaded as error:
            raise HTTPException(503, str(error), {"Retry-After": str(RETRY_AFTER_SECONDS)}) from error
        except Exception as error:
            # Whatever a scorer raises is told to the client, which stops training with it.
            raise HTTPException(500, f"the scorer failed: {type(error).__name__}: {error}") from error


def build_app(service: Service) -> FastAPI:
    """The application of one service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.batcher.run())
        yield
        task.cancel()

    app = FastAPI(
        title="stage reward service", version=str(VERSION), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(LimitBody, max_bytes=service.limits.max_bytes)
    app.add_middleware(RequireToken, token=service.token)  # the later one comes first
    app.add_middleware(CountAnswers, counter=service.answers)
    app.add_exception_handler(RequestValidationError, _explain_schema)
    app.add_exception_handler(HTTPException, _explain)

    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        401: {"description": "no token, or a wrong one"},
        413: {"description": "the body is too large"},
        422: {"description": "the body does not fit the schema, or cannot be scored"},
        429: {"description": "too many images a minute"},
        503: {"description": "too many images are waiting; come back later"},
    }

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "scorer": service.identity}

    @app.get("/metrics", responses={401: errors[401]})
    def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/about", responses={401: errors[401]})
    def about() -> About:
        return About(
            version=VERSION,
            scorer=service.identity,
            reward=service.reward,
            provenance=weights_of(service.scorer),
            compares_group=members.compares_group(service.scorer),
        )

    @app.post("/v1/check", responses=errors)
    def check(body: CheckRequest) -> Checked:
        service.check(to_prompts(body.prompts))
        return Checked(version=VERSION, scorer=service.identity)

    @app.post("/v1/score", responses=errors)
    async def score(request: Request, body: ScoreRequest) -> ScoreAnswer:
        client = request.client.host if request.client else "unknown"
        service.allow(client, sum(len(row) for row in body.images))
        return await service.score(await request.body(), body)


async def _explain(request: Request, error: Any) -> Response:
    return problem(error.status_code, str(error.detail), error.headers)


async def _explain_schema(request: Request, error: Any) -> Response:
    found = [
        f"{'.'.join(str(step) for step in entry['loc'])}: {entry['msg']}" for entry in error.errors()[:5]
    ]
    return problem(422, "; ".join(found))
