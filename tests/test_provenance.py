"""One record of what a scorer is made of, whatever it is made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stage.provenance import changed_files, hashes, scorer_record, weights_of
from stage.rewards.combine import Combine
from tests.tiny_training import Redness


class Weighted(Redness):
    def __init__(self, **provenance: Any) -> None:
        super().__init__()
        self.provenance = provenance


def test_a_scorer_with_weights_and_one_without() -> None:
    record = scorer_record(Weighted(path="w", revision="v1", sha256={"w.pt": "a"}))
    assert record == {
        "class": f"{__name__}.Weighted",
        "weights": {"path": "w", "revision": "v1", "sha256": {"w.pt": "a"}},
    }
    assert scorer_record(Redness()) == {"class": "tests.tiny_training.Redness", "weights": {}}


def test_a_combination_has_its_scorers_by_name() -> None:
    inner = Combine(
        {"b": Weighted(sha256={"w.pt": "b"}), "c": Weighted(sha256={"w.pt": "c"})}, {"b": 1.0, "c": 1.0}
    )
    outer = Combine(
        {"a": Weighted(sha256={"w.pt": "a"}), "d": inner, "e": Redness()}, dict.fromkeys("ade", 1.0)
    )
    found = scorer_record(outer)["weights"]
    assert set(found) == {"a", "d"}
    assert dict(hashes(found)) == {"a.w.pt": "a", "d.b.w.pt": "b", "d.c.w.pt": "c"}


def test_a_record_is_plain_json() -> None:
    found = weights_of(Weighted(path=Path("here"), tower={"sha256": {"t.pt": "t"}}, sides=(1, 2)))
    assert found == json.loads(json.dumps(found))
    assert found["path"] == "here" and found["sides"] == [1, 2]
    assert dict(hashes(found)) == {"tower.t.pt": "t"}
    wrong = Weighted()
    wrong.provenance = ["w.pt"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="provenance is a mapping"):
        weights_of(wrong)


def test_files_that_changed() -> None:
    before = {"a": {"sha256": {"w": "1", "v": "1"}}, "b": {"sha256": {"w": "2"}}}
    now = {"a": {"path": "moved", "sha256": {"w": "1", "v": "3"}}, "c": {"sha256": {"w": "2"}}}
    assert changed_files(before, now) == ["a.v", "b.w", "c.w"]
    assert changed_files(before, before) == []


def test_the_reward_of_the_embedded_world_names_its_detector(root: Path) -> None:
    found = scorer_record(instantiate(OmegaConf.load(root / "conf" / "reward" / "shapes.yaml")))
    file = root / "stage" / "shapes" / "assets" / "detector.safetensors"
    assert dict(hashes(found)) == {
        "weights.detector.detector.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()
    }
