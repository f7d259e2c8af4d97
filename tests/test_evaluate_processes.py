"""Several processes of `python evaluate.py`, started by torchrun and by Lightning, killed and started again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder
from stage.benchmarks.share import join
from stage.data import read_prompts
from stage.policy.janus import load_policy
from stage.policy.sampler import Sampler
from tests.benchmarks.example import PLAIN
from tests.evaluation_world import World, make_world

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
IMAGES = 30  # of each of three prompts
ASKED = ("splits=[validation]", f"benchmark.images_per_prompt={IMAGES}", "batch_size=2")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def start(world: World, launcher: list[str], *arguments: str) -> subprocess.Popen[str]:
    command = [*launcher, str(ROOT / "evaluate.py"), *world.evaluation, *ASKED, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=world.root, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said


def pictures(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.png"))
    }


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_what_processes_of_lightning_were_killed_in_processes_of_torchrun_end(world: World) -> None:
    """Two real processes each: images, verdicts and scores are those of one process, bit for bit."""
    finish(start(world, [sys.executable], "output=one"))
    killed = start(world, [sys.executable], "output=two", "processes=2")
    images = world.root / "two" / "validation" / "images"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(images.glob("*.png"))) < 6:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)  # the group is ours alone, and Lightning's process is in it
    killed.communicate()
    half = {file: file.stat().st_mtime_ns for file in images.glob("*.png")}
    assert 6 <= len(half) < 3 * IMAGES
    said = finish(start(world, TORCHRUN, "output=two"))
    assert said.count("results in two/results.json") == 1  # the first alone reports
    assert {file: file.stat().st_mtime_ns for file in half} == half  # none was made twice
    assert pictures(world.root / "two") == pictures(world.root / "one")
    one, two = results(world.root / "one"), results(world.root / "two")
    for same in ("scores", "images", "judge"):
        assert one[same] == two[same]


def test_processes_are_asked_for_once() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        join(0, "cpu", {})
    with pytest.raises(ValueError, match="torchrun has started the processes already, and processes=2"):
        join(2, "cpu", {"RANK": "0", "WORLD_SIZE": "2"})
    assert join(1, "cpu", {"RANK": "1", "WORLD_SIZE": "2"}).rank == 1


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model, 144 prompts: matrix products of other shapes round otherwise, and hardly a token falls."""
    policy = load_policy("package://stage/shapes/assets/tiny_janus", PLAIN, "float32", [], False).eval()
    prompts = read_prompts("package://stage/shapes/assets/validation.jsonl")
    found = []
    for batch_size in (64, 23):
        folder = ImageFolder(
            tmp_path / str(batch_size), {"seed": 1234, "checkpoint": "tiny"}, prompts, 2, tokens=True
        )
        draw(policy, Sampler(1.0, 1.0), folder, batch_size=batch_size, drawn=lambda count: None)
        found.append(np.stack([folder.load_tokens(item) for item in folder.planned]))
    equal, total = int((found[0] == found[1]).sum()), found[0].size
    with capsys.disabled():
        print(f"\n{equal} of {total} tokens are equal at batch sizes 64 and 23")
    assert total == 144 * 2 * policy.num_image_tokens and equal >= 0.999 * total
