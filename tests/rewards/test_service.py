"""The reward service as its clients meet it: token, limits, bad bodies, counters, schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from stage.rewards.service import Limits, build_app, check_exposure, scorer_identity
from stage.rewards.wire import encode_image
from tests.rewards.serving import TOKEN, Brightness, numbered_images, service, some_prompts

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(build_app(service(Brightness())), headers=HEADERS) as found:
        yield found


def body(count: int = 2, group: int = 2, **changes: Any) -> dict[str, Any]:
    images = numbered_images(count, group).numpy()
    return {
        "version": 1,
        "prompts": [{"id": p.id, "text": p.text, "metadata": dict(p.metadata)} for p in some_prompts(count)],
        "images": [[encode_image(image) for image in row] for row in images],
    } | changes


def test_scores_are_those_of_the_scorer(client: TestClient) -> None:
    answer = client.post("/v1/score", json=body())
    expected = Brightness()(numbered_images(2, 2), some_prompts(2))
    assert answer.status_code == 200
    found = answer.json()
    assert found["parts"] == expected.parts.tolist() and found["names"] == ["bright", "length"]
    assert found["scorer"] == "f" * 64


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", TOKEN[:-1], "Bearer ä"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("GET", "/v1/about"), ("POST", "/v1/score"), ("POST", "/v1/check")],
)
def test_without_the_token_nothing_is_told(header: str | None, method: str, path: str) -> None:
    with TestClient(build_app(service(Brightness()))) as client:
        headers = {} if header is None else {"Authorization": header.encode()}
        answer = client.request(method, path, headers=headers, json=body() if method == "POST" else None)  # type: ignore[arg-type]
        assert answer.status_code == 401
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
        ({"prompts": []}, "prompts"),
        ({"images": [["?"], ["?"]]}, "base64"),
        ({"images": body()["images"][:1]}, "2 lists"),
        ({"prompts": [{"id": 0, "text": "unscorable"}, {"id": 1, "text": "b"}]}, "Choose another"),
    ],
)
def test_a_wrong_body_is_the_clients_fault(client: TestClient, changes: dict[str, Any], says: str) -> None:
    answer = client.post("/v1/score", json=body(**changes))
    assert answer.status_code == 422
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1, "\\ud800": 1}',
        b'{"version": NaN}',
    ],
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/score", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    json.loads(answer.content)


def test_a_large_body_is_refused_with_and_without_a_stated_length() -> None:
    with TestClient(build_app(service(Brightness(), max_bytes=1000)), headers=HEADERS) as client:
        assert client.post("/v1/score", json=body(8, 8)).status_code == 413
        pieces = (b" " * 400 for _ in range(4))
        assert client.post("/v1/score", content=pieces).status_code == 413
        assert client.get("/v1/about").status_code == 200


def test_a_scorer_that_fails_is_an_error_and_never_a_score(client: TestClient) -> None:
    answer = client.post("/v1/score", json=body(1, 2, prompts=[{"id": 0, "text": "broken"}]))
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the scorer failed: RuntimeError: the scorer is broken"}


def test_a_client_has_a_rate() -> None:
    with TestClient(build_app(service(Brightness(), images_per_minute=6)), headers=HEADERS) as client:
        assert [client.post("/v1/score", json=body(2, 2)).status_code for _ in range(2)] == [200, 429]


def test_prompts_can_be_checked_alone(client: TestClient) -> None:
    good = {"version": 1, "prompts": body()["prompts"]}
    assert client.post("/v1/check", json=good).json() == {"version": 1, "scorer": "f" * 64}
    bad = good | {"prompts": [{"id": 0, "text": "unscorable"}]}
    assert client.post("/v1/check", json=bad).status_code == 422


def test_the_counters_count(client: TestClient) -> None:
    client.post("/v1/score", json=body(2, 2))
    client.post("/v1/score", json=body(version=2))
    text = client.get("/metrics").text
    assert "stage_scored 4.0" in text and "stage_calls 1.0" in text and "stage_waiting 0.0" in text
    assert 'stage_answers_total{status="422"} 1.0' in text


def test_a_client_that_hangs_up_is_no_error() -> None:
    """It goes before its body has come: nothing is answered, nothing counted, and nothing raised into the log."""
    made = service(Brightness())
    app, sent = build_app(made), []
    headers = [(b"authorization", HEADERS["Authorization"].encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/score",
        "raw_path": b"/v1/score",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert not sent and "stage_answers_total{" not in generate_latest(made.registry).decode()


def test_about_names_scorer_and_weights(client: TestClient) -> None:
    assert client.get("/v1/about").json() == {
        "version": 1,
        "scorer": "f" * 64,
        "reward": "brightness",
        "provenance": {"weights": "none"},
        "compares_group": False,
    }


def test_the_schema_speaks_of_every_path(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/health", "/metrics", "/v1/about", "/v1/check", "/v1/score"}
    assert schema["info"]["version"] == "1"


def test_the_identity_follows_configuration_and_weights() -> None:
    scorer, other = Brightness(), Brightness()
    other.provenance = {"weights": "others"}
    first = scorer_identity({"a": 1, "b": 2}, scorer)
    assert first == scorer_identity({"b": 2, "a": 1}, scorer)
    assert (
        len({first, scorer_identity({"a": 1, "b": 3}, scorer), scorer_identity({"a": 1, "b": 2}, other)}) == 3
    )


@pytest.mark.parametrize(
    ("host", "token", "fine"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("10.0.0.1", None, False),
        ("some.host", None, False),
        ("0.0.0.0", "secret", True),
    ],
)
def test_only_this_machine_may_come_without_a_token(host: str, token: str | None, fine: bool) -> None:
    if fine:
        check_exposure(host, token)
    else:
        with pytest.raises(ValueError, match="must have a token"):
            check_exposure(host, token)


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        Limits(1, 0.1, 1, 0, 1, 1)


def test_a_fuzz_of_the_schema_finds_no_server_error() -> None:
    app = build_app(service(Brightness()))
    found = schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()
    seen = set().union(*(fuzz(operation.ok()) for operation in found))  # type: ignore[union-attr]
    assert {("/v1/score", 422), ("/v1/check", 200), ("/v1/about", 401), ("/v1/about", 200)} <= seen


def fuzz(operation: Any) -> set[tuple[str, int]]:
    """(path, status) of what the schema's own generator gets, with and without the token."""
    seen = set()

    @settings(
        max_examples=120,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), authorized=st.sampled_from((True, True, True, False)))
    def ask(case: Any, authorized: bool) -> None:
        status = case.call(headers=HEADERS if authorized else {}).status_code
        seen.add((operation.path, status))
        assert status < 500
        assert authorized or operation.path == "/health" or status == 401

    ask()
    return seen
