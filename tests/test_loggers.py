"""The metrics file, also over a resume, and Weights & Biases without network or account."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stage.loggers import (
    MetricsFile,
    csv_and_wandb,
    finish_wandb,
    log_image,
    log_reward,
    log_table,
    read_metrics,
)

RECORD = {"class": "a.Reward", "weights": {"path": "w", "revision": None, "sha256": {"w.pt": "abc"}}}


def write(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    file = MetricsFile(folder)
    for update, metrics in rows:
        file.log_metrics(metrics, step=update)


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"b": 0.1, "a": 1 / 3}, step=1)
    file.log_metrics({"b": 0.2, "a": 2.0}, step=2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "update,a,b",
        f"1,{1 / 3!r},0.1",
        "2,2.0,0.2",
    ]


def test_a_late_column_leaves_earlier_rows_empty(tmp_path: Path) -> None:
    write(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0, "v": 9.0}), (3, {"a": 3.0}))
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "update,a,v",
        "1,1.0,",
        "2,2.0,9.0",
        "3,3.0,",
    ]
    assert read_metrics(tmp_path / "metrics.csv")[0] == {"update": "1", "a": "1.0"}


def test_a_resumed_run_keeps_the_rows_before_it(tmp_path: Path) -> None:
    """Rows 1 to 4 are there and row 3 comes: 3 and 4 were of updates that are made again."""
    write(tmp_path, *((update, {"a": float(update)}) for update in (1, 2, 3, 4)))
    write(tmp_path, (3, {"a": 30.0}), (4, {"a": 40.0}))
    assert [row["a"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1.0", "2.0", "30.0", "40.0"]


def test_a_line_cut_short_by_a_kill_does_not_break_the_file(tmp_path: Path) -> None:
    """Wherever it is cut: what is left of the number 12 could be taken for a 1."""
    write(tmp_path, (11, {"a": 1.0, "b": 1.0}), (12, {"a": 2.0, "b": 2.0}))
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        assert [row["update"] for row in read_metrics(path)] == ["11"]
        write(tmp_path, (12, {"a": 20.0, "b": 20.0}))
        assert [row["a"] for row in read_metrics(path)] == ["1.0", "20.0"]


def test_the_configuration_lies_beside_the_metrics(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "run").log_hyperparams({"seed": 3, "optimizer": {"betas": [0.9, 0.99]}})
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found == {"seed": 3, "optimizer": {"betas": [0.9, 0.99]}}


def wandb_loggers(folder: Path, mode: str) -> list:
    return csv_and_wandb(
        str(folder), project="stage", name=None, mode=mode, entity=None, group=None, tags=["t"]
    )


def test_wandb_offline_holds_curves_pictures_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real offline run, read back from its files."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    picture = tmp_path / "update_00002.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    loggers = wandb_loggers(tmp_path, "offline")
    try:
        for logger in loggers:
            logger.log_hyperparams({"seed": 3, "optimizer": {"lr": 0.5}})
            logger.log_metrics({"reward/mean": 0.25}, step=2)
        log_reward(loggers, RECORD)
        log_image(loggers, "images/grid", picture, "a red square", 2)
        log_table(loggers, "images/plans", ("prompt", "sample", "plan"), [("a red square", 1, "red")], 2)
        run = loggers[1].experiment
        identity, name, config = run.id, run.name, dict(run.config)
        summary = {name: run.summary[name] for name in ("reward/mean", "trainer/global_step")}
    finally:
        finish_wandb()
    assert config["seed"] == 3 and config["optimizer"] == {"lr": 0.5}
    assert config["reward_record"] == RECORD
    assert json.loads((tmp_path / "reward.json").read_text()) == RECORD
    assert summary == {"reward/mean": 0.25, "trainer/global_step": 2}
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (table,) = folder.glob("files/media/table/images/*.json")
    assert json.loads(table.read_text())["data"] == [["a red square", 1, "red"]]
    assert list(folder.glob("*.wandb")) and list(folder.glob("files/media/images/images/*.png"))
    assert read_metrics(tmp_path / "metrics.csv")[0]["reward/mean"] == "0.25"
    assert name == tmp_path.name
    assert len(identity) == 16 and identity in folder.name


def test_wandb_knows_two_modes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger\.mode must be online or offline; got 'none'"):
        wandb_loggers(tmp_path, "none")


def test_a_missing_login_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"wandb could not start a run.*logger.mode=offline"):
        wandb_loggers(tmp_path, "online")
    finish_wandb()
