"""Between the command line and a run: resuming with changes, experiments, folders, and errors in one line."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from stage import launch

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def test_an_experiment_is_a_delta_that_the_command_line_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "defaults:\n  - override /algorithm: grpo\nupdates: 7\nseed: 5\nalgorithm:\n  beta: 0.5\n"
    (tmp_path / "question.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    launch.register_experiments(tmp_path)
    config = composed("experiment=question", "seed=6")
    assert (config.updates, config.seed, config.algorithm.beta) == (7, 6, 0.5)
    assert config.algorithm.reweight_advantage is False
    assert composed("experiment=question", "algorithm=stage").algorithm.reweight_advantage is True


def test_experiments_are_not_copied_for_every_look_up_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text("updates: 7\n")
    launch.register_experiments(tmp_path)
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store
    composed("experiment=kept").updates = 8
    store.load("experiment/kept.yaml").node.updates = 9
    assert composed("experiment=kept").updates == 7


@pytest.mark.parametrize(
    "override", ["optimizer.lr=1", "+optimizer.lr=1", "++optimizer.lr=1", "~optimizer.lr"]
)
def test_the_key_of_an_override(override: str) -> None:
    assert launch.key(override) == "optimizer.lr"


def test_differences_are_named_with_both_values() -> None:
    old = {"seed": 1, "optimizer": {"lr": 0.1, "eps": 0}, "output": "a", "gone": 2}
    new = {"seed": 1, "optimizer": {"lr": 0.2, "eps": 0}, "output": "b", "new": 3}
    assert dict(launch.differences(old, new)) == {
        "optimizer.lr": "0.1 -> 0.2",
        "gone": "2 -> None",
        "new": "None -> 3",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_size=1", "group_size must be a whole number of at least 2; got 1"),
        ("group_size=eight", "got 'eight'"),
        ("group_size=2.5", "got 2.5"),
        ("updates=0", "updates must be a whole number of at least 1; got 0"),
        ("updates=true", "got True"),
        ("seed=-1", "seed must be a whole number of at least 0"),
        ("seed=null", "got None"),
        ("gradient_clip=0", "gradient_clip must be a positive number or null; got 0"),
        ("gradient_clip=hard", "got 'hard'"),
        ("reference_on_cpu=1", "reference_on_cpu must be true or false; got 1"),
        ("+group_sise=4", "nothing reads group_sise"),
    ],
)
def test_numbers_that_no_run_can_have(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.check(composed(override))


@pytest.mark.parametrize("override", ["gradient_clip=null", "gradient_clip=2", "seed=0", "group_size=2"])
def test_numbers_that_a_run_can_have(override: str) -> None:
    launch.check(composed(override))


def fails() -> None:
    raise ValueError("lr must be positive; got -1")


def breaks() -> None:
    raise RuntimeError("a bug")


def test_a_mistake_ends_the_program_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WANTS_TRACEBACK", False)
    with pytest.raises(SystemExit) as caught, launch.mistakes_in_one_line():
        fails()
    assert str(caught.value).splitlines()[0] == "error: lr must be positive; got -1"
    with pytest.raises(RuntimeError, match="a bug"), launch.mistakes_in_one_line():
        breaks()
    monkeypatch.setattr(launch, "WANTS_TRACEBACK", True)
    with pytest.raises(ValueError, match="lr must be positive"), launch.mistakes_in_one_line():
        fails()


@pytest.mark.parametrize("before", [None, "0"])
def test_a_program_leaves_the_environment_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's switch is for this program, not for the next one that this process starts."""
    monkeypatch.setenv(launch.FULL_ERROR, "recorded, so that it is put back")
    os.environ.pop(launch.FULL_ERROR) if before is None else os.environ.update({launch.FULL_ERROR: before})
    seen: list[str | None] = []
    launch.run(lambda: seen.append(os.environ.get(launch.FULL_ERROR)))
    assert seen == ["1"] and os.environ.get(launch.FULL_ERROR) == before
    with pytest.raises(SystemExit):
        launch.run(fails)
    assert os.environ.get(launch.FULL_ERROR) == before


@pytest.mark.parametrize("cuda", [True, False])
def test_an_accelerator_is_never_mps(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would take it for `auto` and for `gpu` where it is there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert launch.accelerator("auto") == ("cuda" if cuda else "cpu")
    assert launch.accelerator("cpu") == "cpu"
    if cuda:
        assert launch.accelerator("gpu") == "cuda"
    else:
        with pytest.raises(ValueError, match="=gpu needs CUDA"):
            launch.accelerator("gpu")
    with pytest.raises(ValueError, match="float64, which MPS does not have"):
        launch.accelerator("mps")
