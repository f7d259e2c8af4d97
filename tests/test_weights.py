"""Weights that are asked of the hub: what comes from its cache, and how soon their absence is told."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from stage.weights import Home, locate

HOME = Home("owner/name", "model.pt")


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub at a port where nobody listens, and an empty cache."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}"
        )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.mark.parametrize("home", [HOME, Home("owner/name")], ids=["file", "folder"])
@pytest.mark.parametrize("revision", [None, "v2", "1" * 40])
def test_without_a_network_it_is_told_at_once(
    home: Home, revision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Not after the half minute in which the hub's client tries again and logs each time."""
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"before the first rollout.*hub did not give it") as told:
        locate("owner/name", revision, home)
    assert time.monotonic() - began < 5
    assert home.download() in str(told.value) and "\n" not in str(told.value)
    assert not caplog.records


def test_what_was_downloaded_before_needs_no_network(no_network: Path) -> None:
    """The cache laid out by hand: a branch names a commit, a commit has files."""
    commit, repository = "0" * 40, no_network / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "model.pt").write_bytes(b"weights")
    assert locate("owner/name", None, HOME) == snapshot / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"owner/name has no other\.pt"):
        locate("owner/name", None, Home("owner/name", "other.pt"))
