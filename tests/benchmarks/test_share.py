"""The shares of several processes: disjoint, complete, and the same images bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stage.benchmarks.images import ImageFolder
from stage.benchmarks.share import Share, share_of
from tests.benchmarks.example import prompts, tiny_policy
from tests.benchmarks.test_evaluation import SETTINGS, digests, draw_all

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from stage.benchmarks.share import share_of
from stage.benchmarks.generate import draw
from stage.policy.sampler import Sampler
from tests.benchmarks.example import tiny_policy
from tests.benchmarks.test_evaluation import folder
model, out = map(Path, sys.argv[1:])
share = share_of()
print(draw(tiny_policy(model), Sampler(2.0, 1.0), folder(out), batch_size=4, drawn=lambda n: None, share=share))
if share.first:
    share.wait(lambda: len(folder(out).missing()), 60)
    print("all there")
"""


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_image_belongs_to_one_process(tmp_path: Path, processes: int) -> None:
    planned = ImageFolder(tmp_path, SETTINGS, prompts(), 2).planned
    shares = [Share(rank, processes).of(planned) for rank in range(processes)]
    assert sorted((item for share in shares for item in share), key=lambda item: item.file) == list(planned)
    assert all(len({item.index for item in share}) <= -(-3 // processes) for share in shares)


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    """Real processes, as torchrun starts them; bit for bit, no image by both."""
    whole = draw_all(tiny_policy(tmp_path / "model"), tmp_path / "one", 4)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0].split("\n") for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert [int(lines[0]) for lines in said] == [8, 4]  # lines 0 and 2, and line 1, with four images each
    assert said[0][1] == "all there"
    assert digests(tmp_path / "two") == whole


def test_the_environment_of_torchrun() -> None:
    assert share_of({}) == Share(0, 1) and share_of({"RANK": "3", "WORLD_SIZE": "4"}) == Share(3, 4)
    for environment in ({"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}):
        with pytest.raises(ValueError, match="RANK"):
            share_of(environment)


def test_a_process_that_stopped_is_not_waited_for_forever() -> None:
    left = iter([3, 2, 2, 2])
    with pytest.raises(
        TimeoutError, match=r"2 images are missing and none appeared for 0 s.*same command again"
    ):
        Share(0, 2).wait(lambda: next(left), 0)
    Share(0, 2).wait(lambda: 0, 0)
