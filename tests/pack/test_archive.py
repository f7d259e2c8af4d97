"""What is carried to another machine: enough for reports, in small files, and nothing outside of the folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from stage.pack.archive import MEBIBYTE, check, pack, pack_thin, unpack
from stage.pack.plan import PackedRun
from stage.report.ablation import ablate
from stage.training_checkpoint import read_training_checkpoint
from tests.pack.programs import write_checkpoint


def run_of(root: Path, variant: str, seed: int, size: int = 1000) -> PackedRun:
    folder = root / variant / f"seed_{seed}"
    for name in (
        "config.yaml",
        "metrics.csv",
        "packed.json",
        "images/update_00000.png",
        "images/update_00020.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    for name in ("last", "last/drift"):
        (folder / "evaluation" / name).mkdir(parents=True)
        (folder / "evaluation" / name / "results.json").write_text(f"{variant} {seed} {name}")
    (folder / "evaluation" / "last" / "00000_0.png").write_bytes(b"an evaluated picture")
    write_checkpoint(folder / "checkpoints" / "last.ckpt", 20)
    return PackedRun(variant, seed, folder, 20, (), ())


def test_there_and_back(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", variant, seed) for seed in (1, 2) for variant in ("grpo", "stage")]
    missing = PackedRun("grpo", 3, tmp_path / "a" / "grpo" / "seed_3", 20, (), ())
    (file,) = pack([*runs, missing], tmp_path / "a", tmp_path / "out" / "x.tar.gz", 15, ["stage/seed_2"])
    unpack(file, tmp_path / "b")
    found = {
        path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()
    }
    grpo = {name.partition("grpo/seed_1/")[2] for name in found if name.startswith("grpo/seed_1/")}
    assert grpo == {
        "config.yaml",
        "metrics.csv",
        "packed.json",
        "evaluation/last/results.json",
        "evaluation/last/drift/results.json",
        "images/update_00000.png",
        "images/update_00020.png",
    }
    assert "grpo/seed_2/images/update_00000.png" not in found  # the first picture is that of the first seed
    assert {name for name in found if name.endswith(".ckpt")} == {"stage/seed_2/checkpoints/last.ckpt"}
    assert (tmp_path / "b/stage/seed_1/metrics.csv").read_bytes() == (
        runs[1].folder / "metrics.csv"
    ).read_bytes()


def test_weights_can_be_evaluated_and_have_no_optimizer(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", "stage", 1)
    (file,) = pack([run], tmp_path / "a", tmp_path / "x.tar.gz", 15, ["stage/seed_1"])
    assert file.stat().st_size < 100_000  # the optimizer's state alone is 400,000 bytes
    unpack(file, tmp_path / "b")
    found = read_training_checkpoint(tmp_path / "b" / "stage" / "seed_1" / "checkpoints" / "last.ckpt")
    assert found["update"] == 20 and "optimizer_states" not in found
    assert torch.equal(found["state_dict"]["policy.weight"], torch.full((3,), 20.0))


def test_what_is_too_large_for_one_file_goes_on_in_the_next(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", "stage", seed, size=200_000) for seed in range(5)]
    files = pack(runs, tmp_path / "a", tmp_path / "x.tar.gz", 2.2, [])
    assert [file.name for file in files] == ["x.tar.gz", "x-2.tar.gz", "x-3.tar.gz"]
    assert all(file.stat().st_size <= 2.2 * MEBIBYTE for file in files)
    for file in files:
        unpack(file, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("stage/seed_*/metrics.csv"))) == 5


def test_an_empty_pack_is_an_empty_archive(tmp_path: Path) -> None:
    (file,) = pack([], tmp_path, tmp_path / "x.tar.gz", 15, [])
    unpack(file, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_nothing_is_unpacked_outside_of_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../outside.txt")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"bad"))
    with pytest.raises(ValueError, match=r"x\.tar\.gz is damaged or no archive of a pack"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "b")
    assert not (tmp_path / "outside.txt").exists()


def test_what_is_refused_before_anything_runs(tmp_path: Path) -> None:
    run = PackedRun("stage", 1, tmp_path, 20, (), ())
    check(tmp_path / "x.tar.gz", [run], ["stage/seed_1"])
    with pytest.raises(ValueError, match=r"must end in \.tar\.gz"):
        check(tmp_path / "x.zip", [run], [])
    with pytest.raises(ValueError, match="stage/seed_2 is none of them"):
        check(tmp_path / "x.tar.gz", [run], ["stage/seed_2"])
    (tmp_path / "x.tar.gz").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "b")


def thin_run(root: Path) -> PackedRun:
    """A run whose files name the folder it lies in, and whose metrics have more columns than reports read."""
    run = run_of(root, "stage", 1)
    settings = {"seed": 1, "output": str(run.folder), "trainer": {"default_root_dir": str(run.folder)}}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (run.folder / "metrics.csv").write_text(
        "update,policy/kl,policy/ratio_max,validation/strict\n0,,,0.5\n1,0.123456789,1,\n2,1e-9,1,0.75\n"
    )
    (run.folder / "packed.json").write_text(json.dumps({"overrides": ["a=1"]}))
    for name in ("last", "last/drift"):
        model = {"path": str(run.folder / "checkpoints"), "sha256": "ab", "update": 2, "model": {"path": "x"}}
        found = {
            "models": {"tuned": model},
            "scores": {"test": 1},
            "images": [{"file": "a.png"}],
            "command": "x",
        }
        (run.folder / "evaluation" / name / "results.json").write_text(json.dumps(found))
    return run


def test_a_thin_archive_names_no_place_and_no_single_image(tmp_path: Path) -> None:
    run = thin_run(tmp_path / "a")
    file = pack_thin([run], tmp_path / "x.tar.gz")
    first = file.read_bytes()
    assert pack_thin([run], tmp_path / "x.tar.gz").read_bytes() == first
    unpack(file, tmp_path / "b")
    there = tmp_path / "b" / "stage" / "seed_1"
    for path in (path for path in there.rglob("*") if path.is_file()):
        assert str(tmp_path) not in path.read_text()
    assert (there / "metrics.csv").read_text() == (
        "update,validation/strict,policy/kl\n0,0.5,\n1,,0.123457\n2,0.75,1e-09\n"
    )
    settings = yaml.safe_load((there / "config.yaml").read_text())
    assert settings == {"seed": 1, "output": "stage/seed_1", "trainer": {"default_root_dir": "stage/seed_1"}}
    results = json.loads((there / "evaluation" / "last" / "drift" / "results.json").read_text())
    assert results["models"] == {"tuned": {"sha256": "ab", "update": 2}} and results["scores"] == {"test": 1}
    assert results["images"] == [] and "command" not in results


def test_the_archive_of_the_first_result_is_whole(root: Path, tmp_path: Path) -> None:
    """40 runs that an ablation reads without a finding, and whose numbers are those of the JSON beside them."""
    results = root / "experiments" / "results"
    unpack(results / "first_result.tar.gz", tmp_path)
    found = ablate([str(path) for path in sorted(tmp_path.glob("*/seed_*"))], None)
    assert not found.findings and sum(len(variant.runs) for variant in found.variants) == 40
    kept = json.loads((results / "first_result.json").read_text())["scores"]
    stated = {
        score["title"]: {row["variant"]: row["mean"]["mean"] for row in score["rows"]} for score in kept
    }
    for table in found.tables:
        for row in table.rows:
            assert row.cell.mean == pytest.approx(stated[table.title][row.label], abs=1e-6)
    text = (results / "first_result.md").read_text()
    table = next(table for table in found.tables if table.title == "shapes, validation: strict")
    for row in table.rows:
        assert f"| {row.label} | 5 | {row.cell.text} ({row.cell.interval}) |" in text
