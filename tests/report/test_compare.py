"""Several runs: who belongs together, means and intervals over seeds, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from stage.report.compare import comparison_tables, over_seeds, write_comparison
from stage.report.groups import algorithm_label, group_runs
from stage.report.read import read_run
from tests.report.example import write_config, write_metrics, write_results
from tests.report.test_page import HOSTILE, check_self_contained


def write(folder: Path, algorithm: str, seed: int, score: float | None = None, **config: Any) -> Path:
    write_metrics(folder, lift=0.1 + 0.01 * seed)
    write_config(folder, algorithm, seed, **config)
    if score is not None:
        write_results(folder / "evaluation" / "last", {"validation": score, "heldout": score - 0.1})
    return folder


def three_seeds(root: Path) -> list[Path]:
    scores = {"grpo": (0.52, 0.50, 0.54), "stage": (0.60, 0.56, 0.61)}
    return [
        write(root / f"{name}{seed}", name, seed, scores[name][seed]) for name in scores for seed in range(3)
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    groups = group_runs([read_run(folder) for folder in three_seeds(tmp_path)])
    assert [(group.label, list(group.runs)) for group in groups] == [
        ("grpo", [0, 1, 2]),
        ("stage", [0, 1, 2]),
    ]


def test_runs_that_differ_in_more_are_told_apart(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", "grpo", 0),
        write(tmp_path / "b", "grpo", 1, optimizer={"lr": 2e-4}),
        write(tmp_path / "c", "stage", 0),
    ]
    labels = [group.label for group in group_runs([read_run(folder) for folder in folders])]
    assert labels == ["grpo, optimizer.lr=0.0001", "grpo, optimizer.lr=0.0002", "stage"]


def test_a_class_is_told_by_its_name_without_its_arguments(tmp_path: Path) -> None:
    slots: dict[str, dict[str, Any]] = {"GroupMean": {"epsilon": 1e-6}, "FixedLength": {"length": None}}
    folders = []
    for name, arguments in slots.items():
        folders.append(write(tmp_path / name, "stage", 0))
        config = OmegaConf.load(folders[-1] / "config.yaml")
        slot = {"_target_": f"stage.objective.aggregation.{name}", **arguments}
        OmegaConf.update(config, "algorithm.aggregation", slot, force_add=True)
        OmegaConf.save(config, folders[-1] / "config.yaml")
    labels = [group.label for group in group_runs([read_run(folder) for folder in folders])]
    assert labels == ["stage, aggregation=GroupMean", "stage, aggregation=FixedLength"]


def test_loggers_and_callbacks_only_watch(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", "grpo", 1, logger={"csv": 1}, callbacks={"progress": {"every": 5}}),
        write(tmp_path / "b", "grpo", 2, logger={"wandb": 1}, callbacks={"progress": {"every": 1}}),
    ]
    assert [group.label for group in group_runs([read_run(run) for run in runs])] == ["grpo"]


def test_a_seed_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, "grpo", 0) for name in ("a", "b")]
    with pytest.raises(ValueError, match="same settings and the same seed 0; give one of them"):
        group_runs([read_run(folder) for folder in folders])


def test_a_folder_without_a_configuration_belongs_to_no_group(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    with pytest.raises(ValueError, match="belongs to no group"):
        group_runs([read_run(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ((False, False, 0.0), "grpo"),
        ((True, True, 0.4), "stage"),
        ((True, False, 0.0), "grpo + advantage weights"),
        ((False, True, 0.1), "grpo + KL weights + entropy reward"),
    ],
)
def test_algorithms_are_called_by_their_switches(flags: tuple[bool, bool, float], label: str) -> None:
    names = ("reweight_advantage", "reweight_kl", "entropy_coefficient")
    assert algorithm_label({"algorithm": dict(zip(names, flags, strict=True))}) == label


def test_other_algorithms_are_called_by_their_class() -> None:
    assert algorithm_label({"algorithm": {"_target_": "mine.objective.Best"}}) == "Best"
    assert algorithm_label({}) == "unknown algorithm"


def test_three_seeds_by_hand(tmp_path: Path) -> None:
    validation, heldout = comparison_tables(
        group_runs([read_run(folder) for folder in three_seeds(tmp_path)])
    )
    assert (validation.title, heldout.title) == ("strict on validation", "strict on heldout")
    grpo, stage = validation.rows
    # grpo: mean of .52 .50 .54 is .52, standard deviation .02; Student's t for two degrees of freedom is 4.302653.
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert grpo.score.mean == pytest.approx(0.52, abs=1e-12)
    assert (grpo.score.low, grpo.score.high) == pytest.approx((0.52 - half, 0.52 + half), abs=1e-6)
    assert grpo.to_first is None and grpo.seeds == (0, 1, 2)
    assert grpo.to_base is not None and grpo.to_base.mean == pytest.approx(0.02, abs=1e-12)
    # stage over grpo, by seed: .08 .06 .07, so mean .07 and standard deviation .01.
    assert stage.to_first is not None
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert stage.to_first.mean == pytest.approx(0.07, abs=1e-12)
    assert (stage.to_first.low, stage.to_first.high) == pytest.approx((0.07 - half, 0.07 + half), abs=1e-6)
    assert stage.to_first.sign == 1


def test_seeds_are_paired_by_number_and_not_by_place(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a", "grpo", 1, 0.4),
        write(tmp_path / "b", "grpo", 2, 0.8),
        write(tmp_path / "c", "stage", 2, 0.9),
        write(tmp_path / "d", "stage", 3, 0.1),
    ]
    stage = comparison_tables(group_runs([read_run(folder) for folder in folders]))[0].rows[1]
    assert stage.to_first is not None and stage.to_first.mean == pytest.approx(0.1, abs=1e-12)
    assert stage.to_first.interval == ""  # one pair


def test_runs_that_were_not_evaluated_are_named(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", "grpo", 0, 0.5), write(tmp_path / "b", "grpo", 1)]
    table = comparison_tables(group_runs([read_run(folder) for folder in folders]))[0]
    assert table.rows[0].seeds == (0,) and table.note == "Not evaluated and left out: b."


def test_without_any_evaluation_the_last_validation_of_training_counts(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(seed), "grpo", seed) for seed in (0, 2)]
    (table,) = comparison_tables(group_runs([read_run(folder) for folder in folders]))
    assert table.title == "strict on validation, last of training"
    assert table.rows[0].score.mean == pytest.approx((0.60 + 0.62) / 2, abs=1e-12)  # .5 + .1 + .01 seed
    assert table.rows[0].to_base is None


def test_evaluations_that_differ_cannot_be_compared(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", "grpo", 0, 0.5), write(tmp_path / "b", "stage", 0, 0.5)]
    scores = {"validation": 0.5, "heldout": 0.4}
    settings = {"base": {"sampler": {"guidance_scale": 5.0, "temperature": 1.0}, "seed": 0}}
    write_results(folders[1] / "evaluation" / "last", scores, settings=settings)
    with pytest.raises(ValueError, match=r"in settings .*b has sampler.guidance_scale 5.0.*a has 2.0"):
        write_comparison(folders, tmp_path / "out")
    benchmark = {"name": "shapes", "headline": "strict", "images_per_prompt": 4}
    write_results(folders[1] / "evaluation" / "last", scores, benchmark=benchmark)
    with pytest.raises(ValueError, match="in benchmark"):
        write_comparison(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_older_version_did_not_know_is_off(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, "grpo", seed) for seed, name in enumerate("ab")]
    for folder, more in zip(folders, ({}, {"variation": None}), strict=True):
        sampler = {"guidance_scale": 2.0, **more}
        scores = {"validation": 0.5, "heldout": 0.4}
        write_results(folder / "evaluation" / "last", scores, settings={"base": {"sampler": sampler}})
    assert write_comparison(folders, tmp_path / "out").is_file()


def test_one_seed_has_no_interval() -> None:
    assert over_seeds([0.5], signed=False).interval == ""
    same = over_seeds([0.5, 0.5, 0.5], signed=False)
    assert (same.interval, same.low, same.high) == ("", None, None)


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    path = write_comparison(three_seeds(tmp_path), tmp_path / "out")
    page = check_self_contained(path.read_text(encoding="utf-8"))
    assert len(page.of("svg")) == 4 and "grpo against stage" in page.text
    assert "| stage | 3 | 0.590 (" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", "grpo", 0, note=HOSTILE), write(tmp_path / "b", "grpo", 0, note="$x_$")]
    page = check_self_contained(write_comparison(folders, tmp_path / "out").read_text(encoding="utf-8"))
    assert "<script>alert(1)" in page.text
