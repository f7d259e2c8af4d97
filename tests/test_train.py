"""`python train.py` as a user meets it: runs, resumes, stops, and refuses what makes no sense.

What needs no process of its own runs inside the test's, since every start costs seconds.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stage.loggers import read_metrics
from tests.tiny_training import ROOT, tiny_base, tiny_world

TRAIN = str(ROOT / "train.py")


@dataclass(frozen=True)
class Program:
    """train.py on a random small Janus, five prompts and a reward for red, with the arguments that say so."""

    arguments: tuple[str, ...]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *overrides: str) -> str:
        """Run in this process and return its output. SystemExit is what it is at the command line."""
        self.monkeypatch.setattr(sys, "argv", [TRAIN, *self.arguments, *overrides])
        try:
            runpy.run_path(TRAIN, run_name="__main__")
        finally:
            output = self.capsys.readouterr()
        return output.out + output.err

    def refuses(self, *overrides: str) -> str:
        """The one line of a mistake."""
        with pytest.raises(SystemExit) as caught:
            self(*overrides)
        first, *rest = str(caught.value.code).splitlines()
        assert first.startswith("error: ") and rest == ["(HYDRA_FULL_ERROR=1 shows where)"]
        return first

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """Run in a process of its own. Flags come before overrides."""
        flags = [item for item in overrides if item.startswith("-")]
        overrides = tuple(item for item in overrides if item not in flags)
        return subprocess.Popen(
            [sys.executable, TRAIN, *flags, *self.arguments, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Base weights, a prompt file, and a configuration for the reward, as a user's own package brings it."""
    folder = tmp_path_factory.mktemp("world")
    return folder, tiny_world(folder)


@pytest.fixture(scope="session")
def world(tiny: tuple[Path, list[str]]) -> Path:
    """Where they are."""
    return tiny[0]


@pytest.fixture
def program(
    tiny: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Program:
    monkeypatch.chdir(tmp_path)
    small = ["callbacks.validation.every=2", "callbacks.images.every=2", "callbacks.images.count=2"]
    return Program((*tiny[1], *small), monkeypatch, capsys)


def without_times(folder: Path) -> list[dict[str, str]]:
    rows = read_metrics(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_what_it_promises(program: Program, tmp_path: Path) -> None:
    output = program("updates=3", "output=run", "seed=4", "algorithm=grpo")
    first, *_, last = output.splitlines()
    assert first.startswith("3 updates of 8 images, algorithm grpo, model tiny (")
    assert first.endswith("reward redness, on cpu; writes to run") or "on cuda" in first
    assert last.startswith("3 updates done") and last.endswith("evaluate run/checkpoints/last.ckpt")
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.csv")
    assert [row["update"] for row in rows] == ["0", "1", "2", "3"]
    assert {"validation/reward", "validation/strict", "validation/strict/counting"} < set(rows[2])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["seed"] == 4 and config["updates"] == 3 and config["output"] == str(run)
    reward = json.loads((run / "reward.json").read_text())
    assert reward == {"class": "tests.tiny_training.Redness", "weights": {}}
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    pictures = sorted((run / "images").iterdir())
    assert [file.name for file in pictures] == [f"update_0000{n}.png" for n in (0, 2, 3)]
    assert np.asarray(Image.open(pictures[0])).shape[2] == 3


def test_nothing_but_the_program_speaks(program: Program, recwarn: pytest.WarningsRecorder) -> None:
    """No advertisement, no progress bar of a library, no warning: four lines."""
    output = program("updates=1")
    kinds = ["1 update of", "memory on", "update 1/1", "1 update done"]
    assert [line for line in output.splitlines() if not any(line.startswith(kind) for kind in kinds)] == []
    ours = [str(item.message) for item in recwarn.list if "LeafSpec" not in str(item.message)]
    assert [text for text in ours if "eval mode" not in text] == []


def test_what_a_run_takes_is_said(program: Program) -> None:
    """Memory before the first update, hours after it, and a kernel that is not there before anything."""
    lines = program("updates=2", "output=said").splitlines()
    assert [line.split(" ")[0:2] for line in lines[:3]] == [
        ["2", "updates"],
        ["memory", "on"],
        ["1", "update"],
    ]
    assert "weights" in lines[1] and lines[2].endswith(", validation not counted")
    assert "model.attention must be" in program.refuses("model.attention=flash")
    assert "reference_on_cpu must be true or false" in program.refuses("reference_on_cpu=maybe")


def test_a_resumed_run_ends_like_an_uninterrupted_one(program: Program, tmp_path: Path) -> None:
    """`resume=PATH` alone knows algorithm, seed and all; the second run is cut at an update that is not saved."""
    settings = ("seed=4", "algorithm.updates_per_rollout=2", "scheduler=linear", "scheduler.total_iters=5")
    program("updates=5", "output=whole", *settings)
    program("updates=3", "output=cut", *settings)
    output = program("resume=cut/checkpoints/last.ckpt", "updates=5")
    assert output.splitlines()[0] == "changed since the checkpoint: updates 3 -> 5"
    whole, cut = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows, expected = without_times(tmp_path / "cut"), without_times(tmp_path / "whole")
    # The shorter run validated its last update, which the longer one had no reason to.
    rows[3] = {name: value for name, value in rows[3].items() if not name.startswith("validation/")}
    assert rows == expected
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(saved["overrides"]) >= {*settings, "updates=5"} and not any(
        "resume" in o for o in saved["overrides"]
    )
    assert not (tmp_path / "outputs").exists()


def test_a_run_can_go_on_in_another_folder(program: Program, tmp_path: Path) -> None:
    """It brings its metrics along, and the folder it comes from stays as it was."""
    program("updates=1", "output=first")
    before = (tmp_path / "first" / "metrics.csv").read_bytes()
    program("resume=first/checkpoints/last.ckpt", "updates=2", "output=second")
    assert [row["update"] for row in read_metrics(tmp_path / "second" / "metrics.csv")] == ["0", "1", "2"]
    assert (tmp_path / "first" / "metrics.csv").read_bytes() == before


def test_a_run_that_is_done_says_so(program: Program) -> None:
    program("updates=1", "output=run")
    message = program.refuses("resume=run/checkpoints/last.ckpt")
    assert "has done 1 of 1 updates: nothing is left to do. Set updates above 1" in message
    message = program.refuses("resume=run/checkpoints/last.ckpt", "updates=2", "optimizer.lr=1.0")
    assert "optimizer.lr is changed, 0.0001 -> 1.0" in message


def test_a_damaged_checkpoint_is_one_line(program: Program, tmp_path: Path) -> None:
    program("updates=1", "output=run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"not a checkpoint", whole[:500] + b"x" * 500 + whole[1000:]):
        path.write_bytes(bad)
        assert "is damaged or not a checkpoint" in program.refuses(f"resume={path}", "updates=2")
    torch.save({"state_dict": {}}, path)
    assert "lacks update, config, overrides, base, random" in program.refuses(f"resume={path}", "updates=2")


def test_a_checkpoint_of_another_base_is_one_line(program: Program, world: Path, tmp_path: Path) -> None:
    """The folder still has its name, but the weights in it are others."""
    tiny_base(tmp_path / "janus")
    moved = f"model.path={tmp_path / 'janus'}"
    program("updates=1", "output=run", moved)
    weights = tmp_path / "janus" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = program.refuses("resume=run/checkpoints/last.ckpt", "updates=2", moved)
    assert "needs the base it was trained from" in message and "sha256" in message


MISTAKES = {
    "unknown key": (["uppdates=3"], "Could not override 'uppdates'"),
    "unknown key of a group": (["algorithm.betta=1"], "Key 'betta' is not in struct"),
    "a new key that nothing reads": (["+uppdates=3"], "nothing reads uppdates"),
    "a new key of a class": (["+optimizer.speed=1"], "unexpected keyword argument 'speed'"),
    "a setting of the class before": (
        ["algorithm.advantage._target_=stage.objective.entropy.EntropyReward"],
        "leave it out with '~algorithm.advantage.epsilon'",
    ),
    "unknown option": (
        ["algorithm=ppo"],
        "Could not find 'algorithm/ppo' Available options in 'algorithm': cispo",
    ),
    "unknown experiment": (["experiment=none"], "Could not find 'experiment/none'"),
    "grammar": (["seed=[1"], "no viable alternative at input '[1'"),
    "a group of one": (["group_size=1"], "group_size must be a whole number of at least 2; got 1"),
    "no updates": (["updates=0"], "updates must be a whole number of at least 1; got 0"),
    "a word for a number": (
        ["optimizer.lr=fast", "model.freeze=[nothing]"],
        "'float' and 'str'; words among them: optimizer.lr='fast'",
    ),
    "a word for a number of a part": (
        ["sampler.temperature=warm"],
        "'str' and 'int'; given were sampler.temperature=warm",
    ),
    "a word for a number of the schedule": (
        ["scheduler.factor=half"],
        "words among them: scheduler.factor='half'",
    ),
    "a negative rate": (["optimizer.lr=-1"], "Invalid learning rate: -1"),
    "a bad switch": (["algorithm.tied_groups=maybe"], "tied_groups must be one of"),
    "a bad distribution": (["algorithm.distribution=both"], "distribution"),
    "a bad interval": (["callbacks.images.every=0"], "every must be at least 1"),
    "a missing model, before a reward is read": (
        ["model.path=nowhere", "reward._target_=my_package.Reward"],
        "a model must be a local folder or a hub repository owner/name; nowhere does not exist",
    ),
    "a missing prompt file": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "a missing checkpoint": (["resume=nowhere.ckpt"], "nowhere.ckpt is not one"),
    "no accelerator": (["trainer.accelerator=quantum"], "accelerator"),
    "an accelerator without float64": (["trainer.accelerator=mps"], "float64, which MPS does not have"),
    "a reward that knows nothing": (
        ["reward._target_=tests.tiny_training.Ignorant"],
        "must know the answers of the bundled pictures before it judges others: red is not red",
    ),
    "a switch that is none": (["self_check=maybe"], "self_check must be true or false; got 'maybe'"),
    "a missing class": (["reward._target_=my_package.Reward"], "my_package"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(program: Program, mistake: str) -> None:
    overrides, message = MISTAKES[mistake]
    found = program.refuses("updates=2", *overrides)
    assert message in found, found
    assert len(found) < 1200


def test_a_bad_line_of_a_prompt_file_is_named(program: Program, world: Path, tmp_path: Path) -> None:
    lines = (world / "prompts.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"count": 1', '"count": "many"')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    message = program.refuses(f"data.train={tmp_path / 'prompts.jsonl'}", "updates=2")
    assert "prompts.jsonl:3: " in message and "count" in message


@pytest.mark.parametrize("folder", ["taken/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_one_line(program: Program, tmp_path: Path, folder: str) -> None:
    """`taken` is a file; /proc takes no folder, not even from root."""
    (tmp_path / "taken").write_text("a file")
    assert program.refuses(f"output={folder}", "updates=2").endswith(folder)


HELP = """
import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path(PROGRAM, run_name="__main__")
finally:
    print("HEAVY", [name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""


def test_help_is_for_a_reader_and_quick(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELP.replace("PROGRAM", repr(TRAIN))]
    started, environment = time.monotonic(), {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    seconds = time.monotonic() - started
    assert found.returncode == 0, found.stderr
    for text in (
        "algorithm: ",
        "grpo, ",
        "experiment: ",
        "python train.py resume=",
        "Output goes to outputs/",
    ):
        assert text in found.stdout
    assert found.stdout.rstrip().endswith("HEAVY []")
    assert seconds < 30  # about 1 on a free machine; without torch it cannot become much more
    assert list(tmp_path.iterdir()) == []


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines of its output up to the first that starts with `text`."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(text):
            return lines
    raise AssertionError("\n".join(lines))


LONG: Sequence[str] = ("updates=6", "seed=4", "callbacks.progress.every=1", "callbacks.checkpoints.every=2")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_end(
    program: Program, tmp_path: Path, number: signal.Signals
) -> None:
    """Real processes. Ctrl-C and SIGTERM save and say how to go on; after a SIGKILL the last save serves."""
    program(*LONG, "output=whole")
    process = program.start(*LONG, "output=cut")
    read_until(process, "update 3/6")
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    last = "cut/checkpoints/last.ckpt"
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"{number.name}: stopping after this update" in output
        line = output.rstrip().splitlines()[-1]
        assert line.startswith("stopped after update ") and line.endswith(f"resume={last}")
        assert "go on with: python train.py --config-dir " in line
        assert "Traceback" not in output
    again = program.start(f"resume={last}")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    whole, cut = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


@pytest.mark.slow
def test_a_reward_that_dies_leaves_a_run_to_resume(program: Program, tmp_path: Path) -> None:
    """It dies in update 4, two updates after the last save would have been due."""
    rare = (
        "updates=5",
        "seed=4",
        "callbacks.checkpoints.every=50",
        "reward._target_=tests.tiny_training.Dying",
    )
    quiet = ("callbacks.validation=null", "callbacks.images=null")
    process = program.start(*rare, *quiet, "+reward.at=4", "output=cut")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in output
    error, said = output.rstrip().splitlines()[-3:-1]
    assert said.startswith("failed in update 4; update 3 of 5 is saved, go on with: python train.py ")
    assert said.endswith("resume=cut/checkpoints/last.ckpt") and error == "error: the reward servers are gone"
    program(*rare, *quiet, "+reward.at=0", "output=whole")
    program("resume=cut/checkpoints/last.ckpt", "+reward.at=0")
    whole, cut = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


def test_a_check_that_is_not_wanted_asks_nothing(program: Program) -> None:
    output = program("updates=1", "reward._target_=tests.tiny_training.Ignorant", "self_check=false")
    assert output.splitlines()[-1].startswith("1 update done")


@pytest.mark.slow
def test_a_sweep_gives_every_job_its_folder(program: Program, tmp_path: Path) -> None:
    process = program.start("-m", "updates=1", "algorithm=grpo,stage", "seed=1,2", "hydra.sweep.dir=sweep")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/metrics.csv"))
    assert len(folders) == 4
    found = {}
    for folder in folders:
        assert folder.name.startswith("algorithm=")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        found[config["algorithm"]["reweight_kl"], config["seed"]] = without_times(folder)[1]["reward/mean"]
    # The same prompts and noise for both algorithms, others for another seed.
    assert found[True, 1] == found[False, 1] != found[True, 2]


@pytest.mark.slow
def test_wandb_offline_from_the_command_line(program: Program, tmp_path: Path) -> None:
    process = program.start("updates=2", "output=run", "logger=wandb", "logger.mode=offline")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert len(list(folder.glob("files/media/images/images/grid*.png"))) == 2
    assert [row["update"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == ["0", "1", "2"]
