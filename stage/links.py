"""Lines of JSON between the first process and each of the others, beside the collectives of training.

A process that dies closes its end, so that the other side knows at once; nothing here waits for a peer. A machine that
is gone closes nothing: there the kernels ask one another (`watched`).
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from stage.processes import started

MEETING = 60.0  # seconds in which all processes come to the first
GONE = 30  # seconds after which a machine whose kernel answers nothing is gone


class Link:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._unsent, self._unread = b"", b""

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send without waiting; while the other side takes nothing, later messages are left out."""
        if not self._unsent:
            self._unsent = json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # the other side is gone, which `receive` tells
            self._unsent = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, None where the other side is gone."""
        try:
            found = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:  # reset: whoever dies with something unread says it so
            found = b""
        if not found:
            return None
        *lines, self._unread = (self._unread + found).split(b"\n")
        return [json.loads(line) for line in lines]

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):  # the other side is gone already
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()


def meet(rank: int, world: int, exchange: Callable[[str], list[str]]) -> dict[int, Link]:
    """Links of the first process to all others by rank, of another one to the first.

    `exchange` gives the texts of all processes, by rank; every process must call this. Raises OSError where they do
    not come together.
    """
    if rank:
        port, token = json.loads(exchange("")[0])
        host = "127.0.0.1" if started().machines == 1 else os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((host, port), timeout=MEETING)
        except OSError as error:
            raise ConnectionError(
                f"each process must reach the first one, got {error} at {host}, port {port}. Let the machines reach "
                "all ports of one another"
            ) from error
        connection.sendall(json.dumps({"rank": rank, "token": token}).encode() + b"\n")
        return {0: Link(watched(connection))}
    with listening() as server:
        token = secrets.token_hex(16)
        exchange(json.dumps([server.getsockname()[1], token]))
        return gathered(server, world, token)


def gathered(server: socket.socket, world: int, token: str) -> dict[int, Link]:
    """Links to all others, by rank; strangers are turned away."""
    found: dict[int, Link] = {}
    while len(found) < world - 1:
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            raise ConnectionError(
                f"all processes must reach the first one within {MEETING:.0f} s, got {len(found) + 1} of {world}. "
                "Let the machines reach all ports of one another"
            ) from error
        hello = greeting(connection)
        if hmac.compare_digest(str(hello.get("token")), token):
            found[int(hello["rank"])] = Link(watched(connection))
        else:
            connection.close()
    return found


def watched(connection: socket.socket) -> socket.socket:
    """A connection that the kernel ends where the other machine is gone; a process that hangs there does not count.

    What is on its way is given `GONE` seconds; where nothing is, the other kernel is asked after a third of that.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {
        "TCP_KEEPIDLE": max(1, GONE // 3),
        "TCP_KEEPINTVL": max(1, GONE // 6),
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * GONE,
    }
    for name, value in times.items():
        if hasattr(socket, name):  # macOS has not all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def listening() -> socket.socket:
    """A socket on a free port: of this machine alone where all processes are on it."""
    if started().machines == 1:
        server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    server.settimeout(MEETING)
    return server


def greeting(connection: socket.socket) -> dict[str, Any]:
    """The first line that somebody sends, {} where it is none of ours."""
    connection.settimeout(5.0)
    try:
        with connection.makefile("rb") as lines:
            hello = json.loads(lines.readline(200))
    except (ValueError, OSError):
        return {}
    return hello if isinstance(hello, dict) else {}
