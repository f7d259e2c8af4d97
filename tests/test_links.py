"""Connections between processes: who is let in, and what is known of the other side."""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stage import links
from stage.links import Link, meet


def pair() -> tuple[Link, Link]:
    left, right = socket.socketpair()
    return Link(left), Link(right)


def test_messages_come_whole_and_in_order_and_the_end_is_known() -> None:
    left, right = pair()
    assert right.receive() == []
    left.send({"a": 1})
    left.send({"b": [2, "ü"]})
    select.select([right], [], [], 1)
    assert right.receive() == [{"a": 1}, {"b": [2, "ü"]}]
    left.send({"last": True})
    left.close()
    assert right.receive() == [{"last": True}] and right.receive() is None


def test_nobody_waits_for_a_side_that_takes_nothing() -> None:
    """Thousands of messages into a full connection: what arrives is whole, and what is left out is left out whole."""
    left, right = pair()
    for number in range(20_000):
        left.send({"number": number, "text": "x" * 100})
    seen: list[dict[str, Any]] = []
    for _ in range(2):  # what was half sent goes out with the next word
        while found := right.receive():
            seen += found
        left.send({"number": -1})
    numbers = [message["number"] for message in seen if message["number"] >= 0]
    assert numbers == sorted(numbers) and 0 < len(numbers) < 20_000


def met(others: int) -> tuple[threading.Thread, list[Any], tuple[int, str]]:
    """A first process that waits for `others`; what it finds, and the port and token that it tells."""
    told: queue.Queue[str] = queue.Queue()
    found: list[Any] = []

    def first() -> None:
        try:
            found.append(meet(0, others + 1, lambda text: [told.put(text) or text]))  # type: ignore[func-returns-value]
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    port, token = json.loads(told.get(timeout=5))
    return thread, found, (port, token)


def test_strangers_are_turned_away() -> None:
    thread, found, (port, token) = met(1)
    for words in (b"GET / HTTP/1.1\n", b'{"rank": 1, "token": "0"}\n', b"[]\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(5)
            assert stranger.recv(10) == b""
    mine = meet(1, 2, lambda text: [json.dumps([port, token]), text])
    thread.join(5)
    assert list(found[0]) == [1] and list(mine) == [0]
    mine[0].send({"here": True})
    select.select([found[0][1]], [], [], 1)
    assert found[0][1].receive() == [{"here": True}]


def test_who_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MEETING", 0.3)
    thread, found, (port, token) = met(2)
    meet(1, 3, lambda text: [json.dumps([port, token]), text])
    thread.join(5)
    assert "must reach the first one within 0 s, got 2 of 3" in str(found[0])
    with pytest.raises(ConnectionError, match=f"got .* at 127.0.0.1, port {port}. Let the machines"):
        meet(2, 3, lambda text: [json.dumps([port, token]), text])


CALLS = """
import socket, sys, time
calls = socket.create_connection((sys.argv[1], int(sys.argv[2])))
calls.sendall(b'{"here": true}\\n')
time.sleep(60)
"""
HERE, THERE, PREFIX = "10.213.57.1", "10.213.57.2", "/30"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machine() -> Iterator[str]:
    """Another machine, as far as the network goes: a namespace of its own at the other end of a cable."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("a machine that vanishes is made with `ip netns`, which needs root")
    name = f"stage{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", "stage0", "type", "veth", "peer", "name", "stage1", "netns", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("addr", "add", HERE + PREFIX, "dev", "stage0")
        ip("link", "set", "stage0", "up")
        ip("-n", name, "addr", "add", THERE + PREFIX, "dev", "stage1")
        ip("-n", name, "link", "set", "stage1", "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", "stage0"], check=False)
        ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_a_machine_that_is_gone_closes_nothing_and_is_known(
    machine: str, monkeypatch: pytest.MonkeyPatch, speaks: bool
) -> None:
    """Whether or not something is on its way to it. Before that, a process there that says nothing is no matter."""
    monkeypatch.setattr(links, "GONE", 3)
    with socket.create_server((HERE, 0)) as server:
        port = str(server.getsockname()[1])
        words = ["ip", "netns", "exec", machine, sys.executable, "-c", CALLS, HERE, port]
        with subprocess.Popen(words) as calls:
            server.settimeout(10)
            link = Link(links.watched(server.accept()[0]))
            select.select([link], [], [], 5)
            assert link.receive() == [{"here": True}]
            assert not select.select([link], [], [], 5)[0]
            ip("-n", machine, "addr", "flush", "dev", "stage1")
            if speaks:
                link.send({"anybody": "there"})
            gone = time.monotonic()
            ready, _, _ = select.select([link], [], [], 20)
            assert ready and link.receive() is None
            assert 1 < time.monotonic() - gone < 10
            calls.kill()
