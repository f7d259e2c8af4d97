"""From run folders to an answer: variants, differences, and everything wrong that must be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from stage.report.ablation import ablate
from stage.report.ablation_page import write_ablation
from stage.report.overview import paper_score
from stage.report.picture import COLORS
from stage.report.read import read_run
from stage.report.sources import read_sources
from stage.report.statistics import paired
from stage.report.variants import counterpart, fault, find_variants
from tests.report.example import write_config, write_metrics, write_picture, write_results
from tests.report.test_page import HOSTILE, check_self_contained
from tests.test_conf import composed

SCORES = {"grpo": (0.52, 0.50, 0.54), "stage": (0.60, 0.56, 0.65)}


def write(folder: Path, algorithm: str, seed: int, score: float | None = 0.5, **config: Any) -> Path:
    write_metrics(folder, lift=0.1 + 0.01 * seed)
    write_config(folder, algorithm, seed, **config)
    (folder / "code.json").write_text(json.dumps([{"since": 0, "commit": None, "sha256": "a" * 64}]))
    if score is not None:
        write_results(folder / "evaluation" / "last", {"validation": score, "heldout": score - 0.1})
    return folder


def grid(root: Path, rate: float = 1e-4, lift: float = 0.0) -> list[str]:
    """Three seeds of GRPO and of STAGE."""
    return [
        str(write(root / name / f"seed_{seed}", name, seed, score + lift, optimizer={"lr": rate}))
        for name, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def kinds(found: Any) -> list[str]:
    return [finding.kind for finding in found.findings]


def test_two_variants_by_hand(tmp_path: Path) -> None:
    found = ablate(grid(tmp_path), None)
    assert [variant.label for variant in found.variants] == ["grpo", "stage"] and not found.findings
    table = found.tables[0]
    assert table.title == "shapes, validation: strict" and table.main and table.comparisons == 1
    first, second = table.rows
    assert first.cell.mean == pytest.approx(0.52) and first.over is None and first.p is None
    assert second.cell.mean == pytest.approx(1.81 / 3) and second.over == "grpo"
    gaps = paired(dict(enumerate(SCORES["stage"])), dict(enumerate(SCORES["grpo"])))
    assert gaps is not None and second.difference is not None
    assert second.difference.mean == pytest.approx((0.08 + 0.06 + 0.11) / 3)
    assert second.p == second.adjusted == gaps.p  # one comparison: nothing to correct
    assert second.to_base is not None and second.to_base.mean == pytest.approx(1.81 / 3 - 0.5)


def test_a_variant_is_compared_under_its_own_settings(tmp_path: Path) -> None:
    """Two learning rates: STAGE at the higher one is laid beside GRPO at the higher one, and that beside the first."""
    sources = [*grid(tmp_path / "a"), *grid(tmp_path / "b", rate=3e-4, lift=0.2)]
    found = ablate(sources, None)
    labels = [variant.label for variant in found.variants]
    assert labels == [
        "grpo, lr=0.0001",
        "stage, lr=0.0001",
        "grpo, lr=0.0003",
        "stage, lr=0.0003",
    ]
    others = [counterpart(variant, found.variants) for variant in found.variants]
    assert [other and other.label for other in others] == [None, labels[0], labels[0], labels[2]]
    rows = found.tables[0].rows
    assert rows[2].difference is not None and rows[2].difference.mean == pytest.approx(0.2)
    assert rows[1].p is not None and rows[3].p is not None
    # GRPO differs by 0.2 for every seed, which no test can judge, so two comparisons are corrected together.
    assert found.tables[0].comparisons == 2 and rows[1].adjusted == pytest.approx(2 * rows[1].p)


def test_what_most_variants_have_is_in_no_label(tmp_path: Path) -> None:
    sources = [*grid(tmp_path / "a"), str(write(tmp_path / "fast", "grpo", 0, optimizer={"lr": 3e-4}))]
    labels = [variant.label for variant in ablate(sources, None).variants]
    assert labels == ["grpo", "stage", "grpo, lr=0.0003"]


def test_another_baseline(tmp_path: Path) -> None:
    found = ablate(grid(tmp_path), "stage")
    assert [variant.label for variant in found.variants] == ["stage", "grpo"]
    assert found.tables[0].rows[1].over == "stage"
    with pytest.raises(ValueError, match="no variant is called 'dapo'; there are grpo, stage"):
        ablate(grid(tmp_path), "dapo")


def test_a_run_that_stopped_counts_in_no_mean(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    write_metrics(tmp_path / "stage" / "seed_1", updates=12)
    found = ablate(sources, None)
    (finding,) = found.findings
    assert finding.kind == "a run that is not whole"
    assert "stage, seed 1" in finding.text and "stopped after update 12 of 30" in finding.text
    row = found.tables[0].rows[1]
    assert row.seeds == (0, 2) and row.cell.mean == pytest.approx((0.60 + 0.65) / 2)
    assert found.overview[2][1] == "2 of 3"


@pytest.mark.parametrize("cell", ["nan", "inf", "-inf"])
def test_a_run_that_diverged_counts_in_no_mean(tmp_path: Path, cell: str) -> None:
    sources = grid(tmp_path)
    metrics = tmp_path / "stage" / "seed_1" / "metrics.csv"
    lines = metrics.read_text().splitlines()
    lines[20] = ",".join([*lines[20].split(",")[:2], cell, *lines[20].split(",")[3:]])
    metrics.write_text("\n".join(lines) + "\n")
    run = read_run(metrics.parent)
    assert (
        run.not_finite == ("policy/kl", 19) and fault(run) == "diverged: policy/kl is not finite in update 19"
    )
    found = ablate(sources, None)
    assert kinds(found) == ["a run that is not whole"] and found.tables[0].rows[1].seeds == (0, 2)


def test_a_seed_that_one_variant_lacks_is_named_and_not_paired(tmp_path: Path) -> None:
    sources = [source for source in grid(tmp_path) if not source.endswith("stage/seed_2")]
    found = ablate(sources, None)
    assert kinds(found) == ["missing seeds", "few seeds"]
    assert found.findings[0].text == "stage lacks 2 of 0, 1, 2"
    row = found.tables[0].rows[1]
    assert row.difference is not None and row.difference.mean == pytest.approx((0.08 + 0.06) / 2)


def test_the_same_settings_and_seed_twice_count_once(tmp_path: Path) -> None:
    sources = [*grid(tmp_path), str(write(tmp_path / "again", "stage", 1, 0.99))]
    found = ablate(sources, None)
    assert kinds(found) == ["the same run twice"] and "again" in found.findings[0].text
    assert found.tables[0].rows[1].cell.mean == pytest.approx(1.81 / 3)


def test_two_runs_with_one_name_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "grpo" / "seed_0", "grpo", 0)
    write(tmp_path / "b" / "grpo" / "seed_0", "grpo", 1)
    runs, clashes = read_sources([str(tmp_path / name / "grpo" / "seed_0") for name in ("a", "b")])
    assert len(clashes) == 1 and clashes[0].startswith("2 runs are called grpo/seed_0: ")
    assert len({run.name for run in runs}) == 2
    assert "one name for two runs" in kinds(ablate([str(run.folder) for run in runs], None))


def test_versions_of_the_code_are_not_averaged(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    other = [{"since": 0, "commit": "c" * 40, "changed": False, "sha256": "b" * 64}]
    (tmp_path / "stage" / "seed_1" / "code.json").write_text(json.dumps(other))
    found = ablate(sources, None)
    labels = [variant.label for variant in found.variants]
    assert len(labels) == 3 and labels[2] == "stage, code bbbbbbbb"
    assert "mixed versions of the code" in kinds(found)
    text = next(f.text for f in found.findings if f.kind.startswith("mixed"))
    assert "version bbbbbbbb (commit cccccccc) made stage/seed_1." in text
    assert found.tables[0].rows[1].cell.mean == pytest.approx((0.60 + 0.65) / 2)


def test_a_run_that_was_not_evaluated_is_named(tmp_path: Path) -> None:
    sources = [
        *grid(tmp_path),
        str(write(tmp_path / "late", "stage", 3, None)),
        str(write(tmp_path / "g", "grpo", 3)),
    ]
    found = ablate(sources, None)
    assert kinds(found) == ["not evaluated"] and "stage, seed 3" in found.findings[0].text
    assert found.tables[0].rows[1].seeds == (0, 1, 2)


def test_without_any_evaluation_that_is_said(tmp_path: Path) -> None:
    names = [(name, seed) for name in ("grpo", "stage") for seed in range(3)]
    found = ablate([str(write(tmp_path / f"{name}_{seed}", name, seed, None)) for name, seed in names], None)
    assert kinds(found) == ["nothing is evaluated"] and "python evaluate.py" in found.findings[0].text


def test_two_seeds_are_said_to_be_few(tmp_path: Path) -> None:
    """Student's 97.5 % quantile is 12.706 for one degree of freedom, 2.776 for four."""
    found = ablate([source for source in grid(tmp_path) if not source.endswith("seed_2")], None)
    assert kinds(found) == ["few seeds"]
    text = found.findings[0].text
    assert text.startswith("grpo has 2, stage has 2. ") and "12.7 standard errors" in text and "2.8" in text


def test_an_evaluation_of_other_prompts_is_left_out(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    folder = tmp_path / "stage" / "seed_1" / "evaluation" / "last"
    benchmark = {"name": "shapes", "headline": "strict", "images_per_prompt": 4}
    write_results(folder, {"validation": 0.99, "heldout": 0.99}, benchmark=benchmark)
    found = ablate(sources, None)
    assert kinds(found) == ["evaluated otherwise"] and "stage, seed 1" in found.findings[0].text
    assert found.tables[0].rows[1].seeds == (0, 2)


def test_other_benchmarks_and_checkpoints_have_scores_of_their_own(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    for source in sources:
        benchmark = {"name": "drift", "headline": "strict", "images_per_prompt": 1}
        write_results(
            Path(source) / "evaluation" / "last" / "drift",
            {"validation": 0.3, "heldout": 0.2},
            benchmark=benchmark,
        )
        write_results(Path(source) / "evaluation" / "best", {"validation": 0.7, "heldout": 0.6})
    found = ablate(sources, None)
    titles = {table.title: table.main for table in found.tables}
    assert titles["drift, validation: strict"] and titles["shapes, validation: strict"]
    assert titles["shapes, heldout: strict, best checkpoint"] is False
    assert "drift validation strict" in found.overview[0]


def test_entropy_and_kl_end_with_the_mean_of_the_last_tenth(tmp_path: Path) -> None:
    """30 updates: the last three of entropy are 2 - u / 60, that is 1.5333.., 1.5166.., 1.5."""
    found = ablate(grid(tmp_path), None)
    table = next(t for t in found.tables if t.title.startswith("entropy"))
    assert table.rows[0].cell.mean == pytest.approx((1.533333 + 1.516667 + 1.5) / 3, abs=1e-6)


def test_images_and_hours_are_counted(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    for source in sources:
        rows = [
            "update,reward/mean,time/images_per_second,time/total",
            *(f"{n},0.5,32,2" for n in range(1, 31)),
        ]
        (Path(source) / "metrics.csv").write_text("\n".join(rows) + "\n")
    heading, first, _ = ablate(sources, None).overview
    cells = dict(zip(heading, first, strict=True))
    assert cells["images"] == "1,920" and cells["hours"] == "0.017"  # 30 updates of 64 images and 2 seconds


def test_the_papers_numbers_stand_beside_the_same_switches(tmp_path: Path) -> None:
    heading, first, second = ablate(grid(tmp_path), None).overview
    assert heading[-1] == "paper, GenEval of 7B" and (first[-1], second[-1]) == ("0.86", "0.88")
    other = write(tmp_path / "gspo", "grpo", 0) / "config.yaml"
    target = {"algorithm": {"ratio": {"_target_": "stage.objective.ratios.SequenceRatio"}}}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(other), target), other)
    (variant,), _ = find_variants([read_run(other.parent)], None)
    assert paper_score(variant) is None


@pytest.mark.parametrize(
    ("experiment", "printed"),
    [
        ("tiny_grpo", 0.86),
        ("tiny_stage", 0.88),
        ("tiny_entropy", 0.87),
        ("tiny_reweight_both", 0.86),
        ("tiny_without_kl", 0.87),
        ("tiny_without_entropy_and_kl", 0.81),
        ("tiny_reweight_kl", None),
        ("without_kl", None),
    ],
)
def test_the_rows_of_the_papers_ablation_are_those_of_its_experiments(
    tmp_path: Path, experiment: str, printed: float | None
) -> None:
    file = write(tmp_path, "grpo", 0) / "config.yaml"
    algorithm = composed("train", f"experiment={experiment}").algorithm
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), {"algorithm": algorithm}), file)
    (variant,), _ = find_variants([read_run(tmp_path)], None)
    assert paper_score(variant) == printed


def test_published_tables_stand_beside_ours(tmp_path: Path) -> None:
    printed = {"source": "a paper", "rows": {"GRPO": {"overall": 0.86, "colors": 0.9}}}
    source = write(tmp_path / "run", "grpo", 0)
    benchmark = {"name": "geneval", "headline": "strict", "images_per_prompt": 4, "published": printed}
    write_results(source / "evaluation" / "last", {"validation": 0.7, "heldout": 0.6}, benchmark=benchmark)
    write_ablation([str(source)], tmp_path / "out", None)
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "beside a paper" in text
        and "| ours: grpo | 0.700 | 0.700 |" in text
        and "| GRPO | 0.9 | 0.86 |" in text
    )


def test_the_page_is_self_contained_and_hostile_names_stay_text(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    for source in sources:
        write_picture(Path(source) / "images" / "update_00000.png", 1)
        write_picture(Path(source) / "images" / "update_00030.png", 2)
    sources.append(str(write(tmp_path / HOSTILE.replace("/", ""), "stage", 3)))
    page = write_ablation(sources, tmp_path / "out", None)
    assert page.name == "report.html"
    parsed = check_self_contained(page.read_text())
    assert len(parsed.of("img")) == 3  # before training, and the end of each variant
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["findings"][0]["kind"] == "missing seeds"
    (row,) = [r for r in numbers["scores"][0]["rows"] if r["variant"] == "grpo"]
    assert row["mean"]["mean"] == pytest.approx(0.52) and row["p"] is None


def test_the_whole_in_one_picture(tmp_path: Path) -> None:
    sources = grid(tmp_path)
    write_ablation(sources, tmp_path / "out", None, tmp_path / "one" / "picture.png", ["shapes, heldout"])
    with Image.open(tmp_path / "one" / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color in COLORS[:2]:  # both variants are in it
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels.astype(int) - rgb).sum(axis=1) < 6).sum() > 100
    with pytest.raises(ValueError, match="no score begins with 'clip'; there are shapes, validation: strict"):
        write_ablation(sources, tmp_path / "out", None, tmp_path / "picture.png", ["clip"])
