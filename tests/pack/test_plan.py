"""What a pack consists of, and what the folders say is left to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from stage.pack.plan import RECORD, PackedRun, begin, check_folders, finish, next_step, plan, updates_done
from tests.pack.programs import write_checkpoint
from tests.test_conf import CONF, EXPERIMENTS

PACK = OmegaConf.load(CONF / "pack.yaml")


def planned(root: Path, **changes: Any) -> list[PackedRun]:
    return plan(OmegaConf.merge(PACK, changes), root)


def step(run: PackedRun, root: Path) -> tuple[str, list[str]] | None:
    found = next_step(run, root)
    return None if found is None else (found.kind, [word for word in found.command if "=" in word])


def test_every_variant_with_every_seed_seed_by_seed(tmp_path: Path) -> None:
    runs = planned(tmp_path, only=["stage", "grpo"], seeds=[4, 2])
    assert [run.name for run in runs] == ["stage/seed_4", "grpo/seed_4", "stage/seed_2", "grpo/seed_2"]
    assert runs[0].folder == tmp_path / "outputs" / "pack" / "stage" / "seed_4"


def test_the_default_grid_is_the_ablation_of_the_paper_at_two_learning_rates() -> None:
    runs = planned(Path())
    assert len(runs) == 40 and {run.seed for run in runs} == {1, 2, 3, 4, 5}
    names = {file.stem for file in EXPERIMENTS.glob("*.yaml")}
    for run in runs:
        assert run.overrides[0].removeprefix("experiment=") in names
    fast = {run.variant: run.overrides[1:] for run in runs if run.variant.endswith("_fast")}
    assert fast == {"grpo_fast": ("optimizer.lr=3.0e-4",), "stage_fast": ("optimizer.lr=3.0e-4",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["dapo"]}, "only names variants; dapo is none of grpo"),
        ({"only": ["grpo", "grpo"]}, "each once"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "at least one"),
        ({"updates": 0}, "updates must be a whole number"),
        ({"processes": 0}, "processes must be a whole number"),
        ({"threads": True}, "threads must be a whole number"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda"),
    ],
)
def test_what_no_pack_can_have(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, **changes)


def test_the_device_goes_to_training_evaluation_and_judge(tmp_path: Path) -> None:
    (run,) = planned(
        tmp_path, only=["grpo"], seeds=[1], device="cuda", evaluate=["splits=[heldout]"], train=["a=1"]
    )
    assert run.overrides == (
        "experiment=tiny_grpo",
        "trainer.accelerator=gpu",
        "reward.detector.device=cuda",
        "a=1",
    )
    assert run.evaluation == ("device=cuda", "reward.detector.device=cuda", "splits=[heldout]")


def test_the_steps_of_a_run(tmp_path: Path) -> None:
    """Fresh, then resumed from where it was saved, then evaluated, then nothing; longer again with more updates."""
    (run,) = planned(tmp_path, only=["stage"], seeds=[3], updates=20, evaluate=["splits=[heldout]"])
    last = run.folder / "checkpoints" / "last.ckpt"
    fresh = ["experiment=tiny_stage", "seed=3", "updates=20", f"output={run.folder}"]
    assert step(run, tmp_path) == ("train", fresh)
    write_checkpoint(last, 0)
    assert step(run, tmp_path) == ("train", fresh)  # nothing learned yet: nothing to resume
    write_checkpoint(last, 10)
    assert step(run, tmp_path) == ("resume", [f"resume={last}", "updates=20"])
    write_checkpoint(last, 20)
    evaluate = next_step(run, tmp_path)
    assert step(run, tmp_path) == ("evaluate", [f"checkpoint={last}", "splits=[heldout]"])
    assert evaluate is not None
    begin(run, evaluate)
    finish(run, evaluate, 2.5)
    assert next_step(run, tmp_path) is None
    (longer,) = planned(tmp_path, only=["stage"], seeds=[3], updates=30, evaluate=["splits=[heldout]"])
    assert step(longer, tmp_path) == ("resume", [f"resume={last}", "updates=30"])
    (other,) = planned(tmp_path, only=["stage"], seeds=[3], updates=20, evaluate=[])
    assert step(other, tmp_path) == ("evaluate", [f"checkpoint={last}"])
    (without,) = planned(tmp_path, only=["stage"], seeds=[3], updates=20, evaluate=None)
    assert next_step(without, tmp_path) is None


def test_a_restored_run_is_done_without_its_checkpoint(tmp_path: Path) -> None:
    (run,) = planned(tmp_path, only=["stage"], seeds=[3], updates=20)
    run.folder.mkdir(parents=True)
    record = {"overrides": list(run.overrides), "evaluated": {"updates": 20, "overrides": []}}
    (run.folder / RECORD).write_text(json.dumps(record))
    assert next_step(run, tmp_path) is None


def test_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    (run,) = planned(tmp_path, only=["stage"], seeds=[3], updates=20)
    first = next_step(run, tmp_path)
    assert first is not None
    for seconds in (1.5, 2.0):
        begin(run, first)
        finish(run, first, seconds)
    assert json.loads((run.folder / RECORD).read_text())["seconds"] == {"train": 3.5}


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    (run,) = planned(tmp_path, only=["stage"], seeds=[3])
    first = next_step(run, tmp_path)
    assert first is not None
    begin(run, first)
    check_folders([run])
    (other,) = planned(tmp_path, only=["stage"], seeds=[3], train=["optimizer.lr=1"])
    with pytest.raises(
        ValueError, match=r"run of other settings, experiment=tiny_stage, and not .*lr=1; remove"
    ):
        check_folders([other])
    (run.folder / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"packed\.json is damaged"):
        check_folders([run])


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", 0),
        ("update,a\n", 0),
        ("update,a\n0,1\n", 0),
        ("update,a\n7,1\n8,2\n", 8),
        ("update,a\n7,1\n8", 8),
    ],
)
def test_progress_is_read_from_the_last_line(tmp_path: Path, text: str, done: int) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert updates_done(tmp_path) == done
