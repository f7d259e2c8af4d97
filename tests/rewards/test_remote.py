"""The client of the reward service against a real server process that fails, stalls and dies."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from stage.rewards.remote import RemoteReward
from stage.types import Prompt
from tests.rewards.serving import TOKEN, Brightness, Contrast, numbered_images, some_prompts

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(port: int, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A server process that answers."""
    command = [sys.executable, "-m", "tests.rewards.serving", str(port), str(folder), *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError("the server did not start")


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[int]:
    port = free_port()
    process = start(port, folder, *arguments)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def remote(*ports: int, **changes: Any) -> RemoteReward:
    settings: dict[str, Any] = {
        "url": [f"http://127.0.0.1:{port}" for port in ports],
        "token": TOKEN,
        "scorer": None,
        "timeout_seconds": 5.0,
        "connect_seconds": 2.0,
        "attempts": 4,
        "give_up_seconds": 60.0,
        "backoff_seconds": 0.01,
        "max_backoff_seconds": 0.05,
        "images_per_request": 3,
        "requests_in_flight": 4,
    }
    return RemoteReward(**(settings | changes))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running(tmp_path_factory.mktemp("server")) as port:
        yield port


def test_remote_scores_are_local_scores(server: int) -> None:
    """4 samples a prompt in requests of 3 and 1: cut, sent, and put together in order."""
    images, prompts = numbered_images(5, 4), some_prompts(5)
    found, expected = remote(server)(images, prompts), Brightness()(images, prompts)
    assert torch.equal(found.parts, expected.parts)
    assert (found.names, found.weights, found.ranges) == (expected.names, expected.weights, expected.ranges)
    assert found.reasons == expected.reasons


def test_images_that_are_compared_stay_together(tmp_path: Path) -> None:
    """4 samples a prompt, which requests of 3 would cut."""
    images, prompts = numbered_images(5, 4), some_prompts(5)
    with running(tmp_path, "--contrast") as port:
        client = remote(port)
        assert client.compares_group
        torch.testing.assert_close(client(images, prompts).parts, Contrast()(images, prompts).parts)


def test_what_the_servers_score_with_is_known(server: int) -> None:
    reward = remote(server)
    assert reward.scorer == "f" * 64
    assert reward.provenance == {"scorer": "f" * 64, "reward": "brightness", "weights": "none"}


def test_another_scorer_than_asked_for_is_refused(server: int) -> None:
    with pytest.raises(ValueError, match="the scorer that is asked for"):
        remote(server, scorer="0" * 64)


def test_prompts_are_checked_before_the_first_image(server: int) -> None:
    remote(server).check(some_prompts(600))
    with pytest.raises(ValueError, match="Choose another"):
        remote(server).check([*some_prompts(300), Prompt(1, "unscorable")])


def test_a_wrong_token_is_not_tried_again(server: int) -> None:
    with pytest.raises(ValueError, match="401"):
        remote(server, token="wrong", attempts=10**6)


def test_a_failing_scorer_raises_its_reason(server: int) -> None:
    with pytest.raises(ConnectionError, match="the scorer is broken"):
        remote(server, attempts=2)(numbered_images(1, 2), [Prompt(0, "broken")])


def test_no_server_is_an_error_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"stage\.rewards\.serve"):
        remote(free_port())
    with pytest.raises(ValueError, match="none of"):
        remote(free_port(), free_port())


def test_a_dead_server_of_two_costs_nothing_but_time(server: int) -> None:
    images, prompts = numbered_images(6, 3), some_prompts(6)
    found = remote(free_port(), server)(images, prompts)
    assert torch.equal(found.parts, Brightness()(images, prompts).parts)


def test_a_pool_that_dies_raises_and_makes_nothing_up(tmp_path: Path) -> None:
    with running(tmp_path) as port:
        reward = remote(port, attempts=3)
    with pytest.raises(ConnectionError, match="No reward was made up"):
        reward(numbered_images(1, 2), some_prompts(1))


@pytest.mark.slow
def test_every_image_is_scored_once_through_errors_stalls_and_a_kill(tmp_path: Path) -> None:
    """2,000 images, 10 % answers of 500, 5 % stalls beyond the timeout, one SIGKILL and a restart."""
    port = free_port()
    faults = ("--errors", "0.1", "--stalls", "0.05", "--stall-seconds", "3")
    processes = [start(port, tmp_path, *faults)]

    def kill_and_restart() -> None:
        while len(lines(tmp_path)) < 700:
            time.sleep(0.01)
        processes[-1].kill()
        processes[-1].wait()
        time.sleep(0.5)
        processes.append(start(port, tmp_path, *faults))

    images, prompts = numbered_images(250, 8), some_prompts(250)
    reward = remote(port, timeout_seconds=1.0, attempts=30, max_backoff_seconds=2.0, images_per_request=4)
    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    try:
        found = reward(images, prompts)
    finally:
        killer.join()
        processes[-1].kill()
        processes[-1].wait()
    expected = Brightness()(images, prompts)
    assert len(processes) == 2
    assert torch.equal(found.parts, expected.parts) and found.reasons == expected.reasons
    counts = Counter(lines(tmp_path))
    assert set(counts) == set(range(2000))
    # A repeated request gets its first answer; only what the killed process had done may be done again.
    again = sum(count - 1 for count in counts.values())
    print(f"{again} of 2000 images were scored a second time, after the kill")
    assert again <= 4 * reward.requests_in_flight


def lines(folder: Path) -> list[int]:
    file = folder / "scored.txt"
    return [int(line) for line in file.read_text().splitlines()] if file.is_file() else []


@contextmanager
def silent() -> Iterator[int]:
    """A server that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_silent_servers_are_given_up_in_the_stated_time(server: int) -> None:
    """Eight pieces, two at a time: 0.5 s of tries, one more of 0.4 s, and no other piece is begun."""
    with silent() as port:
        reward = remote(server, timeout_seconds=0.4, attempts=1000, give_up_seconds=0.5, requests_in_flight=2)
        reward.urls = [f"http://127.0.0.1:{port}"]
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer, last: .* ReadTimeout"):
            reward(numbered_images(8, 3), some_prompts(8))
        assert 0.4 < time.monotonic() - begun < 0.5 + 2 * 0.4 + 1.0  # all tries of all pieces: 3.6
