"""What is read from a folder, whole, cut off or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stage.report.read import read_curves, read_run
from tests.report.example import write_config, write_metrics, write_picture, write_results

BOTH = {"validation": 0.6, "heldout": 0.55}


def test_columns_leave_out_the_updates_without_a_value(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("update,a,b\n0,,0.5\n2,2.0,\n1,1.0,nan\n3,3.0,0.7\n")
    curves = read_curves(tmp_path / "metrics.csv")
    np.testing.assert_array_equal(curves["a"].x, [1, 2, 3])
    np.testing.assert_array_equal(curves["a"].y, [1, 2, 3])
    np.testing.assert_array_equal(curves["b"].x, [0, 3])
    np.testing.assert_array_equal(curves["b"].y, [0.5, 0.7])


def test_a_row_cut_off_by_a_kill_counts_for_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("update,a,b\n1,1.0,2.0\n2,1.5")
    curves = read_curves(tmp_path / "metrics.csv")
    np.testing.assert_array_equal(curves["a"].y, [1.0, 1.5])
    np.testing.assert_array_equal(curves["b"].y, [2.0])


def test_what_is_no_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_curves(path) == {}
    path.write_text("step,a\n1,2\n")
    with pytest.raises(ValueError, match="must have a column 'update'"):
        read_curves(path)
    path.write_text("update,a\n1,2\n2,x y\n")
    with pytest.raises(ValueError, match=r"metrics.csv:3: metrics are numbers, got 'x y'"):
        read_curves(path)


def test_a_run_without_an_evaluation(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_config(tmp_path, seed=3)
    for update in (0, 20, 100):
        write_picture(tmp_path / "images" / f"update_{update:05d}.png", 0)
    run = read_run(tmp_path)
    assert run.evaluation is None and run.config["seed"] == 3 and run.name == tmp_path.name
    assert list(run.grids) == [0, 20, 100]


def test_the_newest_evaluation_of_a_run(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    for age, name in ((20, "best"), (10, "last"), (30, "other")):
        folder = tmp_path / "evaluation" / name
        write_results(folder, BOTH)
        stamp = 1_900_000_000 - age
        os.utime(folder / "results.json", (stamp, stamp))
    run = read_run(tmp_path)
    assert run.evaluation is not None and run.evaluation.folder.name == "last"


def test_an_evaluation_finds_the_run_around_it(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run")
    write_config(tmp_path / "run", seed=5)
    folder = tmp_path / "run" / "evaluation" / "best"
    write_results(folder, BOTH)
    run = read_run(folder)
    assert (run.name, run.config["seed"], run.folder) == ("run", 5, folder)
    assert run.curves and run.evaluation is not None and run.evaluation.folder == folder


def test_an_evaluation_by_itself(tmp_path: Path) -> None:
    write_results(tmp_path, BOTH)
    run = read_run(tmp_path)
    assert not run.curves and run.config == {"checkpoint": "last.ckpt"}
    write_results(tmp_path, BOTH, trained_with={"seed": 9})
    assert read_run(tmp_path).config == {"seed": 9}


def test_folders_without_anything_to_show(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a report needs a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"metrics.csv from training or results.json"):
        read_run(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: [1\n")
    with pytest.raises(ValueError, match=r"config.yaml is damaged"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "results.json").write_text('{"scores": ')
    with pytest.raises(ValueError, match=r"results.json is damaged .* run evaluate.py again"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"scores": {}}')
    with pytest.raises(ValueError, match=r"not written by evaluate.py: it lacks benchmark"):
        read_run(tmp_path)
