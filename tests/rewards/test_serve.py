"""`python -m stage.rewards.serve`: a real reward in a process of its own, and the client that trains with it."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from stage.data import read_prompts
from stage.rewards.serve import find_token
from tests.rewards.test_remote import free_port

ROOT = Path(__file__).resolve().parents[2]


def test_a_fresh_token_lies_where_only_its_owner_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = find_token(None, True), find_token(None, True)
    file = tmp_path / "outputs" / "serve" / "token"
    assert first != second == file.read_text() and len(second or "") >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "outputs/serve/token" in capsys.readouterr().out
    assert find_token("mine", True) == "mine"
    assert find_token("mine", False) is None


def serve(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAGE_REWARD_TOKEN": "secret"}
    return subprocess.Popen(
        [sys.executable, "-m", "stage.rewards.serve", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_served_reward_scores_as_the_same_reward_here(tmp_path: Path) -> None:
    port = free_port()
    server = serve(tmp_path, "reward=shapes", f"port={port}")
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert re.fullmatch(rf"reward shapes at http://127\.0\.0\.1:{port}, scorer [0-9a-f]{{64}}\n", line)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            asked = [f"reward.url=http://127.0.0.1:{port}", "reward.token=secret"]
            remote_config = compose("train", ["reward=remote", *asked]).reward
            local = instantiate(compose("train", ["reward=shapes"]).reward)
        remote = until_it_listens(remote_config)
        prompts = read_prompts("package://stage/shapes/assets/validation.jsonl")[:3]
        images = torch.randint(
            0, 256, (3, 2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        found, expected = remote(images, prompts), local(images, prompts)
        assert torch.equal(found.parts, expected.parts)
        assert found.reasons == expected.reasons
    finally:
        server.terminate()
        assert server.wait(timeout=30) in (
            0,
            -signal.SIGTERM,
        )  # answers what is under way, then ends as it was told


def until_it_listens(config: Any) -> Any:
    """The line is printed before the socket is open."""
    for _ in range(100):
        try:
            return instantiate(config)
        except Exception:
            time.sleep(0.1)
    return instantiate(config)


@pytest.mark.slow
def test_a_service_for_everybody_without_a_token_does_not_start(tmp_path: Path) -> None:
    server = serve(tmp_path, "reward=shapes", "host=0.0.0.0", "authentication=false")
    output, _ = server.communicate(timeout=120)
    assert server.returncode == 1
    assert "must have a token" in output and "Traceback" not in output
