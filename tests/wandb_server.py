"""A W&B server on the loopback: it knows sweeps, agents and views, and hands out runs with W&B's own sweep engine."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

sweeps: Any = importlib.import_module("sweeps")  # to a type checker it is our folder of that name
ENTITY, PROJECT, SWEEP = "team", "stage", "sw33p1d0"


class Server(ThreadingHTTPServer):
    """Answers GraphQL over HTTP; `handed` are the runs that agents got, `refused` the queries that it does not know."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.config: dict[str, Any] = {}
        self.handed: list[Any] = []
        self.refused: list[str] = []
        self.views: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict[str, Any]) -> Any:
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}, "entityName": ENTITY}
        if "upsertSweep" in query:
            self.config = yaml.safe_load(variables["config"])
            faults = sweeps.config.cfg.schema_violations_from_proposed_config(self.config)
            return {
                "upsertSweep": {
                    "sweep": {"name": SWEEP, "project": project},
                    "configValidationWarnings": faults,
                }
            }
        if "SweepWithRuns" in query:
            found = {"id": "s", "name": SWEEP, "state": "RUNNING", "config": yaml.dump(self.config)}
            return {"project": {"sweep": {**found, "runs": {"edges": []}}}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            running = json.loads(variables["runState"])
            commands = [] if running else [self._next()]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "upsertView" in query:
            self.views.append(variables)
            view = {
                "id": "v",
                **{key: variables[key] for key in ("name", "type", "displayName", "description", "spec")},
            }
            place = {"entityName": variables["entityName"], "name": variables["projectName"]}
            return {"upsertView": {"view": {**view, "project": place}, "inserted": True}}
        if "GetProjects" in query:
            node = {**project, "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            page = {"endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": page, "edges": [{"node": node, "cursor": "0"}]}}
        if "viewer" in query or "serverInfo" in query.replace("ServerInfo", "serverInfo"):
            viewer = {
                "id": "u",
                "entity": ENTITY,
                "username": "someone",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {
                "viewer": viewer,
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []},
            }
        self.refused.append(query)
        return {"project": project}

    def _next(self) -> dict[str, Any]:
        found = sweeps.next_run(self.config, self.handed)
        if found is None:
            return {"type": "exit"}
        found.state, found.name = sweeps.RunState.finished, f"run{len(self.handed)}"
        self.handed.append(found)
        return {"type": "run", "run_id": found.name, "program": self.config["program"], "args": found.config}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps({"data": self.server.answer(body["query"], body.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[Server]:
    """A server that answers until the end of the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
