"""The selfcheck: bundled pictures, tables by the hash of the weights, and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from stage.rewards import selfcheck
from stage.types import Prompt, Scores

SETTINGS: dict[str, Any] = {"table": None, "record": False, "tolerance": 0.01}


class Brightness:
    """Mean of the pixels, plus `shift` for every image that is not the first of a call."""

    def __init__(self, sha256: str = "a", shift: float = 0.0) -> None:
        self.provenance: dict[str, Any] = {"sha256": {"w.pt": sha256}, "tower": {"sha256": {"t.pt": "b"}}}
        self.shift = shift

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        parts = images.float().mean((2, 3, 4)) / 255
        parts[1:] += self.shift
        return Scores(parts.unsqueeze(-1), ("score",), (2.0,), tuple(("",) * 2 for _ in prompts))


def test_bundled_pictures() -> None:
    images = selfcheck.pictures()
    assert images.shape == (2, 2, 384, 384, 3) and images.dtype == torch.uint8
    assert torch.equal(images[0, 0], images[1, 1]) and torch.equal(images[0, 1], images[1, 0])
    assert not torch.equal(images[0, 0], images[0, 1])
    red, orange = images[0, 0, 100, 150], images[1, 0, 190, 150]
    assert red[0] > 150 > red[1] and orange[0] > orange[1] > orange[2]


def test_scores_are_recorded_and_compared(tmp_path: Path) -> None:
    table = tmp_path / "tables" / "scores.json"
    text = selfcheck.check(Brightness(), {**SETTINGS, "table": table, "record": True})
    assert f"recorded in {table}" in text
    images = selfcheck.pictures().double()
    (found,) = json.loads(table.read_text()).values()
    assert found[0][0] == pytest.approx(2 * images[0, 0].mean().item() / 255, abs=1e-5)
    assert found[1] == found[0][::-1]
    assert "as expected" in selfcheck.check(Brightness(), {**SETTINGS, "table": table})
    found[0][0] += 0.02
    table.write_text(json.dumps({selfcheck.key(Brightness()): found}))
    with pytest.raises(ValueError, match=r"0\.0200 away at most with 0\.01 allowed"):
        selfcheck.check(Brightness(), {**SETTINGS, "table": table})
    assert "as expected" in selfcheck.check(Brightness(), {**SETTINGS, "table": table, "tolerance": 0.03})
    # Other weights are another line of the table.
    assert "nothing to compare with" in selfcheck.check(Brightness("c"), {**SETTINGS, "table": table})


def test_every_hash_counts() -> None:
    other = Brightness()
    other.provenance["tower"]["sha256"] = {"t.pt": "c"}
    assert len({selfcheck.key(Brightness()), selfcheck.key(Brightness("c")), selfcheck.key(other)}) == 3


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not depend on the pictures beside it"):
        selfcheck.check(Brightness(shift=0.5), SETTINGS)
    with pytest.raises(ValueError, match="a reward with weights, function names none"):
        selfcheck.check(test_every_hash_counts, SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got table=null"):
        selfcheck.check(Brightness(), {**SETTINGS, "record": True})
    with pytest.raises(ValueError, match="record it first"):
        selfcheck.check(Brightness(), {**SETTINGS, "table": tmp_path / "none.json"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is JSON"):
        selfcheck.check(Brightness(), {**SETTINGS, "table": tmp_path / "broken.json"})


def test_the_bundled_table_is_readable() -> None:
    table = selfcheck.read_table(Path(selfcheck.__file__).parent / "assets" / "selfcheck.json")
    assert all(torch.tensor(scores).shape == (2, 2) for scores in table.values())


@pytest.mark.parametrize(
    "name", ["hps", "clip", "aesthetic", "pickscore", "imagereward", "git", "gdino", "orm"]
)
def test_the_command_takes_every_reward_with_weights(root: Path, name: str) -> None:
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        config = compose("selfcheck", [f"reward={name}", "reward.path=here", "table=scores.json"])
    assert config.reward.path == "here" and dict(config)["tolerance"] == 0.01


@pytest.mark.slow
def test_the_command_says_what_is_missing(root: Path, tmp_path: Path) -> None:
    """In one line, without a traceback: what to download and where to put it."""
    command = [sys.executable, "-m", "stage.rewards.selfcheck", "reward=hps", "reward.device=cpu"]
    done = subprocess.run(
        [*command, f"reward.path={tmp_path}/HPS.pt"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in done.stderr
