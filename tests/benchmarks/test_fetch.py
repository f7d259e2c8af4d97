"""Fetching from a file server on this machine: what arrives, what is refused, what is not fetched twice."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from stage.benchmarks.fetch import SOURCES, main
from stage.paths import resolve

CONTENT = b'{"prompt": "a photo of a bench"}\n'
RIGHT = hashlib.sha256(CONTENT).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "list.jsonl").write_bytes(CONTENT)
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def run(tmp_path: Path, url: str, sha256: str | None, *names: str) -> None:
    sources = {"small": {"list.jsonl": {"url": url, "sha256": sha256}}}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    main(
        [
            *(names or ("small",)),
            "--datasets",
            str(tmp_path / "d"),
            "--sources",
            str(tmp_path / "sources.yaml"),
        ]
    )


def test_a_list_arrives_once(tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, f"{server}/list.jsonl", RIGHT)
    file = tmp_path / "d" / "small" / "list.jsonl"
    assert file.read_bytes() == CONTENT and f"{len(CONTENT)} bytes" in capsys.readouterr().out
    run(tmp_path, "http://127.0.0.1:9/gone", RIGHT)  # not asked for
    assert "there already" in capsys.readouterr().out
    file.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"has the sha256 .* published is"):
        run(tmp_path, f"{server}/list.jsonl", RIGHT)
    assert file.read_bytes() == b"mine"


def test_another_file_is_refused(tmp_path: Path, server: str) -> None:
    with pytest.raises(SystemExit, match=f"sha256 {RIGHT}, expected {'0' * 64}; nothing was kept"):
        run(tmp_path, f"{server}/list.jsonl", "0" * 64)
    assert not (tmp_path / "d").exists()


def test_a_file_without_a_known_checksum_says_its_own(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, f"{server}/list.jsonl", None)
    assert f"sha256 {RIGHT}, which nothing was compared with" in capsys.readouterr().out


def test_what_cannot_be_fetched(tmp_path: Path, server: str) -> None:
    with pytest.raises(SystemExit, match=r"cannot be fetched .*copy the file to"):
        run(tmp_path, f"{server}/none.jsonl", RIGHT)
    with pytest.raises(SystemExit, match="data sets are small, got large"):
        run(tmp_path, f"{server}/list.jsonl", RIGHT, "large")


def test_the_known_lists_have_an_address_and_a_checksum() -> None:
    sources = yaml.safe_load(resolve(SOURCES).read_text())
    assert {"geneval", "ocr", "drawbench", "hpsv2", "t2i_compbench"} == set(sources)
    for files in sources.values():
        for source in files.values():
            assert source["url"].startswith("https://") and len(source["sha256"] or "0" * 64) == 64
