"""A real browser for the tests of pages: Chromium without a window, driven by chromedriver's JSON over HTTP."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
START = 30  # seconds
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's answers


def missing() -> str | None:
    """What a browser test lacks here, None for nothing."""
    if shutil.which("chromedriver") is None:
        return "no chromedriver was found: install the Debian packages chromium and chromium-driver"
    if not any(map(shutil.which, BROWSERS)):
        return f"none of {', '.join(BROWSERS)} was found: install the Debian package chromium"
    return None


class Browser:
    """One window. `log` holds what the page said on its console, `requests` every address that it asked for."""

    def __init__(self, port: int, folder: Path, size: tuple[int, int]) -> None:
        self.root = f"http://127.0.0.1:{port}"
        binary = next(path for path in map(shutil.which, BROWSERS) if path)
        flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        options = {"binary": binary, "args": flags}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"
        # A window has a least width; what the page sees may be narrower.
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self._chrome("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, page: Path) -> None:
        self._post("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script that ends in `return ...` gives."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def keys(self, *keys: str) -> None:
        """Press and release keys, one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("GET", f"{self.session}/screenshot")))

    def complaints(self) -> list[str]:
        """What stood on the console."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, data apart."""
        lines = [
            json.loads(entry["message"])["message"]
            for entry in self._post("/se/log", {"type": "performance"})
        ]
        asked = [
            line["params"]["request"]["url"]
            for line in lines
            if line["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith("data:")]

    def close(self) -> None:
        self._ask("DELETE", self.session)

    def _chrome(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        return self._ask("POST", self.session + path, content)

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        # Not through a proxy: chromedriver is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextmanager
def driver(folder: Path) -> Iterator[int]:
    """The port of a chromedriver that is ended on leaving."""
    log = folder / "chromedriver.log"
    with log.open("w") as stream:
        process = subprocess.Popen(["chromedriver", "--port=0"], stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield _port(log)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser(port: int, folder: Path, size: tuple[int, int]) -> Iterator[Browser]:
    """A window of `size` pixels with a profile of its own in `folder`."""
    found = Browser(port, folder, size)
    try:
        yield found
    finally:
        found.close()


def _port(log: Path) -> int:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        words: Sequence[str] = log.read_text().split("started successfully on port ")
        if len(words) > 1:
            return int(words[1].split(".")[0])
        time.sleep(0.05)
    raise TimeoutError(f"chromedriver must say its port within {START} s, it said: {log.read_text()}")
