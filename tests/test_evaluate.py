"""`python evaluate.py` from the command line to the page, on a random tiny Janus."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import evaluate
from tests.evaluation_world import World, make_world, run_command, write_run
from tests.sliced import slice_up

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


def run(world: World, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    return run_command(evaluate.main, [*world.evaluation, *arguments], monkeypatch)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def pictures(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.png"))
    }


def test_a_checkpoint_beside_its_base(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, monkeypatch, f"checkpoint={world.checkpoint}") is None
    folder = world.run / "evaluation" / "last"
    found = results(folder)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "results in run/evaluation/last/results.json, page in run/evaluation/last/report.html"

    assert len(found["images"]) == 2 * (3 + 2) * 2  # models x prompts x images
    for line in found["images"]:
        assert (folder / line["file"]).is_file() and line["reason"].startswith("mean ")
    # The scores are those of the images, counted here by themselves.
    for split in ("validation", "heldout"):
        for role in ("base", "tuned"):
            tasks: dict[str, list[float]] = {}
            for line in found["images"]:
                if (line["split"], line["model"]) == (split, role):
                    tasks.setdefault(line["task"], []).append(line["parts"]["partial"])
            means = {task: sum(values) / len(values) for task, values in tasks.items()}
            rows = found["scores"][split]["partial"]
            assert {task: rows[task][role]["mean"] for task in means} == pytest.approx(means, abs=1e-9)
            assert rows["overall"][role]["mean"] == pytest.approx(sum(means.values()) / len(means), abs=1e-9)
    assert set(found["scores"]["validation"]["strict"]["overall"]) == {"base", "tuned", "difference"}
    assert found["models"]["tuned"]["update"] == 12
    for role in ("base", "tuned"):
        assert found["models"][role]["model"]["template"]["name"] == "plain"
        assert found["settings"][role]["template"]["name"] == "plain"
    assert found["models"]["tuned"]["sha256"] == hashlib.sha256(world.checkpoint.read_bytes()).hexdigest()
    assert found["judge"] == {"class": "tests.benchmarks.example.Bright", "weights": {}}
    assert found["versions"]["torch"] and found["trained_with"]["seed"] == 0
    assert found["command"].endswith(f"checkpoint={world.checkpoint}")
    page = (folder / "report.html").read_text()
    assert "a photo of a green square" in page and "KL to the reference" in page
    assert not (world.root / "evaluate.log").exists()


def test_a_second_run_draws_nothing_and_says_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (f"checkpoint={world.checkpoint}", "splits=[validation]")
    assert run(world, monkeypatch, *arguments) is None
    folder = world.run / "evaluation" / "last"
    first, drawn = results(folder), pictures(world.run)
    some = sorted(world.run.rglob("validation/images/*.png"))[::2]
    for file in some:
        file.unlink()
    assert run(world, monkeypatch, *arguments) is None
    second = results(folder)
    assert pictures(world.run) == drawn
    assert second["timing"]["base"]["images"] + second["timing"]["tuned"]["images"] == len(some) == 6
    for same in ("scores", "images", "settings", "models"):
        assert second[same] == first[same]


def test_verdicts_are_given_again_when_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (f"checkpoint={world.checkpoint}", "splits=[validation]")
    assert run(world, monkeypatch, *arguments) is None
    first = results(world.run / "evaluation" / "last")
    files = sorted(world.run.rglob("verdicts/*/*.json"))
    for file in files:
        content = json.loads(file.read_text())
        for verdict in content["verdicts"]:
            verdict["reason"] = "made up"
        file.write_text(json.dumps(content))
    assert run(world, monkeypatch, *arguments) is None  # believes what is there
    assert "made up" in (world.run / "evaluation" / "last" / "results.json").read_text()
    assert run(world, monkeypatch, *arguments, "score=again") is None
    assert results(world.run / "evaluation" / "last")["images"] == first["images"]
    assert sorted(world.run.rglob("verdicts/*/*.json")) == files
    assert "score is true, false or again, got 'agian'" in run(world, monkeypatch, *arguments, "score=agian")


def test_another_checkpoint_of_the_run_shares_the_base(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other = world.checkpoint.with_name("best.ckpt")
    other.write_bytes(world.checkpoint.read_bytes())
    for checkpoint in (world.checkpoint, other):
        assert run(world, monkeypatch, f"checkpoint={checkpoint}", "splits=[heldout]") is None
    names = sorted(path.name.partition("-")[0] for path in (world.run / "evaluation").iterdir())
    assert names == ["base", "best", "last"]
    assert results(world.run / "evaluation" / "best")["timing"]["base"]["images"] == 0
    assert results(world.run / "evaluation" / "best")["timing"]["tuned"]["images"] == 4


def test_a_checkpoint_in_parts_has_the_scores_of_one_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = slice_up(world.checkpoint, world.run / "checkpoints" / "parts.ckpt", tmp_path / "results")
    for checkpoint in (world.checkpoint, parts):
        assert run(world, monkeypatch, f"checkpoint={checkpoint}", "splits=[heldout]") is None
    one, two = (results(world.run / "evaluation" / name) for name in ("last", "parts"))
    assert one["scores"] == two["scores"] and two["timing"]["base"]["images"] == 0


def test_the_base_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(world, monkeypatch, "output=alone") is None
    found = results(world.root / "alone")
    assert set(found["scores"]["heldout"]["strict"]["overall"]) == {"base"}
    assert "<h2>Images: heldout</h2>" in (world.root / "alone" / "report.html").read_text()


def test_a_model_folder_outside_of_any_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.policy.tiny_model import build_tiny_janus

    build_tiny_janus(world.root / "mine", seed=1)
    assert run(world, monkeypatch, "checkpoint=mine", "splits=[heldout]") is None
    (folder,) = (world.root / "outputs" / "evaluation").glob("mine-*")
    assert results(folder)["models"]["tuned"]["path"] == "mine"


def test_mistakes_are_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = world.root / "damaged.ckpt"
    damaged.write_bytes(world.checkpoint.read_bytes()[:500])
    for arguments, text in (
        (["checkpoint=nowhere.ckpt"], "nowhere.ckpt"),
        ([f"checkpoint={damaged}"], "damaged.ckpt is damaged"),
        (["splits=[test]"], "no split 'test'; benchmark 'shapes' has validation, heldout"),
        (["splits=[]"], "at least one of validation, heldout"),
        (["benchmark.images_per_prompt=0"], "at least one image per prompt"),
        (["batch_size=0"], "batch_size must be"),
        (["batchsize=3"], "batchsize"),
        (["benchmark=nothing"], "nothing"),
        (["device=gpu"], "device must be"),
        (["sampler.guidance_scale=0.5"], "guidance_scale must be at least 1"),
        (["intervals.confidence=95"], "confidence between 0 and 1"),
        (["seed=-1"], "non-negative seed"),
    ):
        code = run(world, monkeypatch, "output=out", *arguments)
        assert isinstance(code, str) and code.startswith("error: ") and text in code, (arguments, code)
        assert len(code.splitlines()) <= 2 and "Traceback" not in code
    assert not (world.root / "out" / "results.json").exists()


def test_images_of_other_settings_are_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (f"checkpoint={world.checkpoint}", "splits=[heldout]", "output=out")
    assert run(world, monkeypatch, *arguments) is None
    before = pictures(world.root / "out")
    code = run(world, monkeypatch, *arguments, "sampler.guidance_scale=4")
    assert (
        isinstance(code, str) and "holds 4 images of another evaluation" in code and "output=FOLDER" in code
    )
    assert pictures(world.root / "out") == before


def test_a_checkpoint_that_changed_between_the_two_stages(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn, trained on, and scored under the same name: the images are of another model, and are counted."""
    arguments = (f"checkpoint={world.checkpoint}", "splits=[heldout]")
    assert run(world, monkeypatch, *arguments, "score=false") is None
    write_run(world, seed=1)
    code = run(world, monkeypatch, *arguments)
    assert isinstance(code, str)
    assert 'last/heldout holds 4 images of another evaluation (settings.json: "checkpoint": ' in code
    assert not (world.run / "evaluation" / "last" / "results.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_rights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = world.root / "locked"
    locked.mkdir(mode=0o500)
    code = run(world, monkeypatch, f"output={locked}/out")
    assert isinstance(code, str) and code.startswith("error: Permission denied")


def test_an_output_that_is_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "file").write_text("mine")
    code = run(world, monkeypatch, "output=file")
    assert isinstance(code, str) and code.startswith("error: ") and "file" in code
    assert (world.root / "file").read_text() == "mine"


def test_ctrl_c_keeps_what_is_drawn(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stage.benchmarks.images import ImageFolder

    save = ImageFolder.save
    saved: list[int] = []

    def interrupted(self: ImageFolder, *arguments: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "save", interrupted)
        assert run(world, monkeypatch, "output=out") == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    assert len(pictures(world.root / "out")) == 3
    assert run(world, monkeypatch, "output=out") is None
    assert results(world.root / "out")["timing"]["base"]["images"] == 10 - 3


def test_help_is_quick_and_names_what_matters() -> None:
    def cpu_seconds() -> (
        float
    ):  # of finished child processes; unlike a clock it does not count waiting for others
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started = cpu_seconds()
    command = [sys.executable, "-X", "importtime", "evaluate.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert cpu_seconds() - started < 3
    for word in ("checkpoint=PATH", "splits=", "results.json", "report.html", "outputs/"):
        assert word in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and not imported & {
        "torch",
        "transformers",
        "lightning",
        "matplotlib",
        "scipy",
    }


@pytest.mark.slow
def test_killed_and_run_again_as_a_program(world: World) -> None:
    """SIGKILL while images are drawn; what is there is whole, and the next run makes the rest."""
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        *world.evaluation,
        "output=out",
        "batch_size=1",
        "benchmark.images_per_prompt=20",
        "splits=[validation]",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=world.root, env=environment, stdout=subprocess.DEVNULL)
    images = world.root / "out" / "validation" / "images"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(images.glob("*.png"))) < 5:
        time.sleep(0.02)
    process.kill()
    process.wait()
    half = pictures(world.root / "out")
    assert 5 <= len(half) < 60
    done = subprocess.run(command, cwd=world.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = pictures(world.root / "out")
    assert len(whole) == 60 and half.items() <= whole.items()
    assert results(world.root / "out")["timing"]["base"]["images"] == 60 - len(half)
