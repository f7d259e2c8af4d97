"""Where things go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage.benchmarks.layout import lay_out, run_folder
from stage.subject import Subject

CPU = torch.device("cpu")
MODEL = {"template": {"name": "plain"}, "dtype": "float32", "path": "base"}


def folders(tuned: str | None, output: str | None, *, guidance: float = 2.0, seed: int = 0) -> dict[str, str]:
    models = {"base": Subject("base", "b" * 64, MODEL)}
    if tuned is not None:
        models["tuned"] = Subject(tuned, "c" * 64, MODEL)
    found = lay_out(models, {"guidance_scale": guidance}, seed, CPU, output)
    return {candidate.role: candidate.folder.as_posix() for candidate in found}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.csv").touch()
    return Path("run")


def test_a_checkpoint_of_a_run_is_evaluated_in_it(run: Path) -> None:
    found = folders("run/checkpoints/best.ckpt", None)
    assert found["tuned"] == (run.absolute() / "evaluation" / "best").as_posix()
    assert Path(found["base"]).parent == Path(found["tuned"]).parent
    assert Path(found["base"]).name.startswith("base-")


def test_the_base_is_shared_where_its_images_are_the_same(run: Path) -> None:
    best, last = (folders(f"run/checkpoints/{name}.ckpt", None)["base"] for name in ("best", "last"))
    assert best == last
    assert folders("run/checkpoints/best.ckpt", None, guidance=5.0)["base"] != best
    assert folders("run/checkpoints/best.ckpt", None, seed=1)["base"] != best


def test_the_base_alone_lies_where_a_model_without_a_run_looks_for_it(run: Path) -> None:
    alone, beside = folders(None, None), folders("models/mine", None)
    assert alone["base"] == beside["base"]
    assert beside["tuned"] == "outputs/evaluation/mine-cccccccc"


def test_an_output_that_was_asked_for(run: Path) -> None:
    assert folders("run/checkpoints/best.ckpt", "there") == {"base": "there/base", "tuned": "there"}
    assert folders(None, "there") == {"base": "there"}


def test_the_run_around_a_file(run: Path) -> None:
    assert run_folder(Path("run/checkpoints/best.ckpt")) == run.absolute()
    assert run_folder(Path("elsewhere/best.ckpt")) is None
