"""Several benchmarks, two stages apart, and images of other programs, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import evaluate
from stage import mistakes
from tests.evaluation_world import CONF, World, make_world, run_command
from tests.test_conf import composed


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with a second benchmark, `listed`: one split, means over prompts, a win rate, published numbers."""
    monkeypatch.chdir(tmp_path)
    world = make_world(tmp_path)
    (tmp_path / "published.json").write_text(
        json.dumps({"listed": {"source": "a paper", "rows": {"Theirs": {"overall": 0.9}}}})
    )
    node = {
        "_target_": "stage.benchmarks.benchmark.Benchmark",
        "_convert_": "all",
        "name": "listed",
        "splits": {
            "test": {
                "_target_": "stage.benchmarks.lists.read_list",
                "name": "listed",
                "path": str(tmp_path / "validation.jsonl"),
            }
        },
        "images_per_prompt": 2,
        "scorer": {"_target_": "tests.benchmarks.example.Bright", "threshold": 0.5},
        "headline": "partial",
        "beside": ["strict"],
        "rows": {"_target_": "stage.benchmarks.categories.Key", "key": "tag"},
        "macro": False,
        "win_rate": True,
        "published": {
            "_target_": "stage.benchmarks.published.read_published",
            "path": str(tmp_path / "published.json"),
            "table": "listed",
        },
    }
    OmegaConf.save(OmegaConf.create(node), world.groups / "benchmark" / "listed.yaml")
    OmegaConf.save(
        OmegaConf.create({"benchmarks": ["listed", "small"]}), world.groups / "benchmark" / "both.yaml"
    )
    return world


def run(world: World, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    plain = [item for item in world.evaluation if not item.startswith("benchmark=")]
    return run_command(evaluate.main, [*plain, "++benchmark.images_per_prompt=1", *arguments], monkeypatch)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_several_benchmarks_of_a_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, monkeypatch, "benchmark=[small,listed]", f"checkpoint={world.checkpoint}") is None
    folder = world.run / "evaluation" / "last"
    small, listed = results(folder), results(folder / "listed")
    assert small["benchmark"]["name"] == "shapes" and set(small["scores"]) == {"validation", "heldout"}
    assert listed["benchmark"]["images_per_prompt"] == 1 and listed["config"]["benchmark"]["name"] == "listed"
    row = listed["scores"]["test"]["partial"]["overall"]
    assert set(row) == {"base", "tuned", "difference", "win_rate"}
    values = {
        role: [line["parts"]["partial"] for line in listed["images"] if line["model"] == role]
        for role in ("base", "tuned")
    }
    assert row["tuned"]["mean"] == pytest.approx(sum(values["tuned"]) / 3)
    wins = [(b < t) + (b == t) / 2 for b, t in zip(values["base"], values["tuned"], strict=True)]
    assert row["win_rate"]["mean"] == pytest.approx(sum(wins) / 3)
    said = " ".join(capsys.readouterr().out.split())
    assert "ours with the template plain, and a paper" in said and "Theirs 0.9" in said
    page = (folder / "listed" / "report.html").read_text()
    assert "beside published numbers" in page and "Theirs" in page and "win rate" in page
    assert "| Theirs | 0.9 |" in (folder / "listed" / "report.md").read_text()


def test_a_list_of_benchmarks_by_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(world, monkeypatch, "benchmark=both", "output=out") is None
    assert results(world.root / "out" / "listed")["timing"]["base"]["images"] == 3
    assert results(world.root / "out")["timing"]["base"]["images"] == 5


def test_drawn_here_and_scored_there(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "benchmark.scorer._target_=nowhere.Scorer"  # whoever only draws needs no scorer
    assert run(world, monkeypatch, "benchmark=listed", "score=false", broken, "output=out") is None
    assert "score=false scores them" in capsys.readouterr().out
    assert not list((world.root / "out").rglob("results.json"))
    shutil.copytree(world.root / "out" / "listed" / "test", world.root / "elsewhere")
    assert run(world, monkeypatch, "benchmark=listed", "output=out") is None
    here = results(world.root / "out" / "listed")
    assert here["timing"]["base"]["images"] == 0
    # Without the model, as images of anybody.
    assert (
        run(world, monkeypatch, "benchmark=listed", "images=elsewhere", "output=there", "model=tiny") is None
    )
    there = results(world.root / "there" / "listed")
    assert [line["parts"] for line in there["images"]] == [line["parts"] for line in here["images"]]
    assert set(there["scores"]["test"]["partial"]["overall"]) == {"images"}
    assert "elsewhere" in (world.root / "there" / "listed" / "report.html").read_text()
    both = "images={base: elsewhere, tuned: elsewhere}"
    assert run(world, monkeypatch, "benchmark=listed", both, "output=paired") is None
    row = results(world.root / "paired" / "listed")["scores"]["test"]["partial"]["overall"]
    assert row["difference"]["mean"] == 0 and row["win_rate"]["mean"] == 0.5
    next((world.root / "elsewhere" / "images").glob("*.png")).unlink()
    code = run(world, monkeypatch, "benchmark=listed", "images=elsewhere")
    assert isinstance(code, str) and "is not complete: 1 missing" in code


def test_pictures_of_the_same_list_are_drawn_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`twin` has the list of `listed` and a threshold of its own: the same files under other names, judged apart."""
    twin = OmegaConf.load(world.groups / "benchmark" / "listed.yaml")
    OmegaConf.update(twin, "name", "twin")
    OmegaConf.update(twin, "scorer.threshold", 1.0)
    OmegaConf.save(twin, world.groups / "benchmark" / "twin.yaml")
    assert run(world, monkeypatch, "benchmark=[listed,twin]", f"checkpoint={world.checkpoint}") is None
    folder = world.run / "evaluation" / "last"
    first, second = results(folder / "listed"), results(folder / "twin")
    for role in ("base", "tuned"):
        assert first["timing"][role]["images"] == 3 and second["timing"][role]["images"] == 0
    pictures = [sorted((folder / name / "test" / "images").glob("*.png")) for name in ("listed", "twin")]
    assert len(pictures[0]) == 3 and all(a.samefile(b) for a, b in zip(*pictures, strict=True))
    strict = [[line["parts"]["strict"] for line in found["images"]] for found in (first, second)]
    assert strict == [[1.0] * 6, [0.0] * 6]


@pytest.mark.parametrize(
    "name", ["geneval", "drawbench", "hpsv2", "imagereward", "t2i_compbench", "diversity"]
)
def test_scorers_run_where_the_evaluation_does(name: str) -> None:
    def devices(node: Any) -> set[str]:
        rows = node.items() if isinstance(node, dict) else []
        return {str(v) for k, v in rows if k == "device"}.union(*(devices(v) for _, v in rows))

    own = "cuda" if torch.cuda.is_available() else "cpu"
    for given, there in (("cpu", "cpu"), ("cuda:1", "cuda:1"), ("auto", own)):
        config = composed("evaluate", f"benchmark={name}", f"device={given}", "datasets=none")
        OmegaConf.resolve(config)
        assert devices(OmegaConf.to_container(config.benchmark)) == {there}


@pytest.mark.parametrize(
    "name", ["geneval", "ocr", "drawbench", "hpsv2", "imagereward", "t2i_compbench", "diversity", "drift"]
)
def test_a_benchmark_without_its_list_says_how_to_get_it(name: str) -> None:
    from hydra.utils import instantiate

    config = composed("evaluate", f"benchmark={name}", "datasets=none")
    with pytest.raises(Exception) as error:
        instantiate(config.benchmark.splits)
    assert "python -m stage.benchmarks.fetch" in str(mistakes.explain(error.value))


def test_benchmarks_of_the_project_that_choose_a_scorer_each(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GenEval and OCR at once, drawn only: each names its own reward, which one composition could not hold."""
    data = world.root / "data"
    for name, file in (("geneval", "evaluation_metadata.jsonl"), ("ocr", "test.txt")):
        (data / name).mkdir(parents=True)
        line = (world.root / "heldout.jsonl").read_text() if name == "geneval" else 'a sign "two"\n'
        (data / name / file).write_text(line)
    plain = [item for item in world.evaluation if not item.startswith("benchmark=")]
    arguments = [*plain, "benchmark=[geneval,ocr]", f"datasets={data}", "score=false", "output=out"]
    assert run_command(evaluate.main, arguments, monkeypatch) is None
    drawn = {name: len(list((world.root / "out" / name).rglob("*.png"))) for name in ("geneval", "ocr")}
    assert drawn == {"geneval": 2 * 4, "ocr": 1}


def test_what_training_costs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmark=drift from the command: base beside tuned, images with their tokens, a page."""
    node = {**plain_node("drift"), "name": "drift"}
    node["splits"]["test"]["path"] = str(world.root / "validation.jsonl")
    OmegaConf.save(OmegaConf.create(node), world.groups / "benchmark" / "moved.yaml")
    arguments = ("benchmark=moved", f"checkpoint={world.checkpoint}", "benchmark.images_per_prompt=2")
    assert run(world, monkeypatch, *arguments) is None
    folder = world.run / "evaluation" / "last" / "drift"
    first = results(folder)
    row = first["scores"]["test"]["kl"]["overall"]
    assert row["base"]["mean"] == 0 and row["tuned"]["mean"] == row["difference"]["mean"] > 0
    assert set(first["scores"]["test"]) == {"kl", "entropy", "distance", "recall"}
    assert len(list((folder / "test" / "tokens").iterdir())) == 6
    assert "KL" in (folder / "report.html").read_text()
    assert run(world, monkeypatch, *arguments) is None
    assert results(folder)["images"] == first["images"]
    code = run(world, monkeypatch, *arguments, "sampler.temperature=0", "output=cold")
    assert isinstance(code, str) and "at a temperature above 0" in code and not (world.root / "cold").exists()
    code = run(world, monkeypatch, *arguments[::2], f"images={folder}")
    assert isinstance(code, str) and "'drift' looks at models" in code


def test_questions_before_and_after(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmark=understanding from the command: nothing is drawn, answers stand in results and page."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(world.root / "a.png")
    line = {"image": "a.png", "question": "a red circle", "answer": "red"}
    (world.root / "probe.jsonl").write_text(json.dumps(line))
    node = {**plain_node("understanding"), "question": "{image} {question}", "max_new_tokens": 4}
    node["splits"]["probe"]["path"] = str(world.root / "probe.jsonl")
    OmegaConf.save(OmegaConf.create(node), world.groups / "benchmark" / "asked.yaml")
    plain = [item for item in world.evaluation if not item.startswith("benchmark=")]
    arguments = [*plain, "benchmark=asked", f"checkpoint={world.checkpoint}"]
    assert run_command(evaluate.main, arguments, monkeypatch) is None
    folder = world.run / "evaluation" / "last" / "understanding"
    found = results(folder)
    assert [line["model"] for line in found["images"]] == ["base", "tuned"] and found["timing"] == {}
    assert found["scores"]["probe"]["unchanged"]["overall"]["base"]["mean"] == 1
    assert found["benchmark"]["headline"] == "correct"
    page = (folder / "report.html").read_text()
    assert found["images"][1]["reason"] in page and "data:image/png" in page


def plain_node(name: str) -> dict[str, Any]:
    """A file of conf/benchmark, before its interpolations."""
    node = OmegaConf.load(CONF / "benchmark" / f"{name}.yaml")
    return OmegaConf.to_container(node, resolve=False)  # type: ignore[return-value]
