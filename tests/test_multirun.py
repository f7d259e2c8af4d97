"""Sweeps: every job in its own process, none twice, none in the way of another, whichever launcher starts them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

from stage import launch, multirun
from stage.code_version import code_record
from stage.loggers import read_metrics
from tests.test_conf import CONF, composed
from tests.test_train import Program, program, tiny, world  # noqa: F401  fixtures
from tests.tiny_training import ROOT

# What a job is replaced with where training itself is not the point: it notes that it was called and exits as told.
SCRIPT = """
import json, os, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = words["output"].strip("'")
with open(os.path.join(folder, "calls"), "a") as file:
    file.write(json.dumps({"words": sys.argv[1:], "group": os.environ.get("WANDB_RUN_GROUP"), "pid": os.getpid(),
                           "full": os.environ.get("HYDRA_FULL_ERROR")}) + "\\n")
print("working on seed", words.get("seed"))
if words.get("seed") == "2" and float(words.get("optimizer.lr", 1)) > 0.6:
    sys.exit("error: two is not a number")
with open(os.path.join(folder, "metrics.csv"), "w") as file:
    rate = float(words.get("optimizer.lr", 1))
    file.write(f"update,validation/strict\\n0,0\\n1,{1 - abs(rate - 0.3)}\\n")
"""
PROGRAM = """
import sys
from pathlib import Path
import hydra
from stage import launch, multirun

@hydra.main(config_path={conf!r}, config_name="train", version_base="1.3")
def main(config):
    assert multirun.sweeping()
    return multirun.job(config, Path({script!r}))

launch.run(main)
"""
# They stand for SLURM: the first keeps the script and starts its array here, one after the other, behind our back; the
# second says how far it is.
SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
open({log!r}, "w").write(text)
count = int((re.search(r"--array=0-(\\d+)", text) or [0, 0])[1]) + 1
words = sys.executable + text.strip().splitlines()[-1].partition(sys.executable)[2]
lines = ["export SUBMITIT_EXECUTOR=slurm"]
for task in range(count):
    names = dict(JOB_ID=42 + task, ARRAY_JOB_ID=42, ARRAY_TASK_ID=task, NTASKS=1, JOB_NUM_NODES=1, NODEID=0, PROCID=0)
    names |= dict(LOCALID=0, JOB_NODELIST="here")
    words_of = " ".join(f"SLURM_{{key}}={{value}}" for key, value in names.items())
    lines.append(f"{{words_of}} {{words}}; touch {log}.{{task}}")
subprocess.Popen(["sh", "-c", "\\n".join(lines)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 42")
"""
SACCT = """#!{python}
import os
print("JobID|State|NodeList")
for task in range(3):
    print(f"42_{{task}}|" + ("COMPLETED" if os.path.exists(f"{log}.{{task}}") else "RUNNING") + "|here")
"""


@pytest.fixture
def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `-m ...` with conf/train.yaml and the script in place of training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    text = PROGRAM.format(conf=str(CONF), script=str(tmp_path / "script.py"))
    (tmp_path / "program.py").write_text(text)

    def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        names = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "program.py", "-m", *words]
        return subprocess.run(command, env=names, capture_output=True, text=True, timeout=120)

    yield start


def calls(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for file in sorted(folder.glob("*/calls")) for line in file.read_text().splitlines()
    ]


def task(folder: Path, *overrides: str) -> multirun.Task:
    config = composed("train", *overrides)
    config.callbacks.checkpoints.folder = str(folder / "checkpoints")
    return multirun.Task(folder, config, overrides, (), alone=True, sought=False, strategy="single")


def save(found: multirun.Task, update: int, **changes: Any) -> Path:
    """A checkpoint of a run that has done so many updates."""
    settings = {**found.settings(), **changes}
    record = {
        "state_dict": {},
        "update": update,
        "config": settings,
        "overrides": [],
        "base": {},
        "random": {},
    }
    file = found.folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(record, file)
    return file


def test_a_job_is_complete_when_its_checkpoint_has_its_settings_and_all_updates(tmp_path: Path) -> None:
    found = task(tmp_path / "run", "algorithm=grpo", "updates=7", "seed=3")
    assert multirun.remaining(found) == ""
    last = save(found, 6)
    assert multirun.remaining(found) == str(last)
    save(found, 7)
    assert multirun.remaining(found) is None
    assert multirun.remaining(task(tmp_path / "run", "updates=7", "seed=3", "algorithm=grpo")) is None


def test_a_folder_with_another_run_is_not_overwritten(tmp_path: Path) -> None:
    found = task(tmp_path / "run", "algorithm=grpo", "updates=7")
    save(found, 7, seed=5)
    with pytest.raises(
        ValueError, match=r"holds a run with other settings, seed 5 -> 0: two runs would have one name"
    ):
        multirun.remaining(found)


def test_one_folder_is_worked_on_by_one_process(tmp_path: Path) -> None:
    with (
        multirun.locked(tmp_path),
        pytest.raises(ValueError, match="another process is at work in"),
        multirun.locked(tmp_path),
    ):
        pass
    with multirun.locked(tmp_path):
        pass


def test_the_command_of_a_job_is_a_run_of_its_own(tmp_path: Path) -> None:
    found = task(tmp_path / "a=1,b='x'", "seed=3", "algorithm.beta=0.1")
    words = multirun.command(found, Path("train.py"), "last.ckpt")
    assert words[:4] == [sys.executable, "train.py", "seed=3", "algorithm.beta=0.1"] and "-m" not in words
    config = composed("train", *words[2:])
    assert config.output == str(found.folder) and config.resume == "last.ckpt"


def test_a_strategy_of_several_processes_needs_their_number(tmp_path: Path) -> None:
    found = task(tmp_path, "strategy=ddp", "trainer.devices=2")._replace(strategy="ddp")
    assert multirun.starter(found)[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    with pytest.raises(
        ValueError, match=r"strategy=ddp and trainer.devices=1; set trainer.devices to their number"
    ):
        multirun.starter(task(tmp_path, "strategy=ddp")._replace(strategy="ddp"))


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("error: of before\n")
    before = log.stat().st_size
    with log.open("a") as file:
        file.write("update 1\nerror: no such thing\n(HYDRA_FULL_ERROR=1 shows where)\n")
    assert multirun.last_words(log, before) == "error: no such thing"
    log.write_text("a\nb\n\nc\nd\n")
    assert multirun.last_words(log, 0) == "b | c | d"


def test_the_summary_names_the_dead_by_what_is_theirs() -> None:
    states = (
        ("algorithm=grpo seed=1", "done"),
        ("algorithm=grpo seed=2", "died"),
        ("algorithm=grpo seed=3", "there already"),
    )
    reasons = {"died": "exit status 1: x"}
    records = [{"job": name, "state": state, "reason": reasons.get(state, "")} for name, state in states]
    line, died = multirun.summary(records, Path("out"))
    assert line == "3 runs in out: 1 done, 1 there already, 1 died"
    assert died == "1 of 3 runs died: seed=2 (exit status 1: x)"
    assert multirun.summary(records[:1], Path("out"))[1] == ""
    older = [{**records[2], "reason": "made by another version of the code, 0123abcd"}]
    line, died = multirun.summary(older, Path("out"))
    assert line == "1 runs in out: 1 there already, 1 of them by another version of the code" and died == ""


def test_a_run_of_another_version_of_the_code_is_told(tmp_path: Path) -> None:
    assert multirun.other_code(tmp_path, ROOT / "train.py") == ""  # a run that does not say
    versions = [{"since": 0, "sha256": "0123abcd" * 8}, {"since": 3, **code_record(ROOT)}]
    (tmp_path / "code.json").write_text(json.dumps(versions))
    assert multirun.other_code(tmp_path, ROOT / "train.py") == ""
    (tmp_path / "code.json").write_text(json.dumps(versions[:1]))
    assert "another version of the code, 0123abcd; move" in multirun.other_code(tmp_path, ROOT / "train.py")


LAUNCHERS = [
    "basic",
    pytest.param("parallel", marks=pytest.mark.slow),
    pytest.param("submitit_local", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_dies_stops_none_of_its_siblings(sweep: Any, tmp_path: Path, launcher: str) -> None:
    if launcher != "basic":
        pytest.importorskip(
            {
                "parallel": "hydra_plugins.hydra_joblib_launcher",
                "submitit_local": "hydra_plugins.hydra_submitit_launcher",
            }[launcher],
            reason="the extra launchers is not installed",
        )
    process = sweep("seed=1,2,3", "hydra.sweep.dir=out", f"hydra/launcher={launcher}")
    assert process.returncode == 1, process.stdout + process.stderr
    assert "3 runs in out: 2 done, 1 died" in process.stdout, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "1 of 3 runs died: seed=2 (exit status 1: error: two is not a number)" in line
    assert line.endswith(f"program.py -m seed=1,2,3 hydra.sweep.dir=out hydra/launcher={launcher}")
    found = calls(tmp_path / "out")
    assert sorted(word for call in found for word in call["words"] if word.startswith("seed=")) == [
        "seed=1",
        "seed=2",
        "seed=3",
    ]
    assert len({call["pid"] for call in found}) == 3
    assert {call["group"] for call in found} == {"out"} and {call["full"] for call in found} == {None}
    assert "working on seed 2" in (tmp_path / "out" / "seed=2" / "job.log").read_text()


@pytest.mark.slow
def test_a_sweep_on_slurm_by_dry_run(sweep: Any, tmp_path: Path) -> None:
    """The script that SLURM would get, and what its tasks do, with programs in place of sbatch, srun and sacct."""
    pytest.importorskip("submitit", reason="the extra launchers is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    paths = {"python": sys.executable, "log": str(tmp_path / "sbatch.log")}
    for name, text in (
        ("sbatch", SBATCH.format(**paths)),
        ("sacct", SACCT.format(**paths)),
        ("srun", "#!/bin/sh\nexit 0\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    process = sweep(
        *("seed=1,2,3", "hydra.sweep.dir=out", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"),
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert "3 runs in out: 2 done, 1 died" in process.stdout, process.stderr
    given = dict(
        re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (tmp_path / "sbatch.log").read_text(), re.MULTILINE)
    )
    wanted = yaml.safe_load((CONF / "hydra" / "launcher" / "slurm.yaml").read_text())
    assert given["partition"] == "gpu" and given["array"] == "0-2%3"
    assert given["time"] == str(wanted["timeout_min"]) and given["gpus-per-node"] == "1"
    assert given["signal"] == f"USR2@{wanted['signal_delay_s']}" and given["mem"] == "64GB"
    assert given["cpus-per-task"] == "8" and given["ntasks-per-node"] == "1" and given["nodes"] == "1"
    assert len(calls(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_search_proposes_and_finds_again(sweep: Any, tmp_path: Path) -> None:
    """A parabola's top at 0.3; the same command proposes the same runs; a run that dies does not end it."""
    pytest.importorskip("optuna", reason="the extra launchers is not installed")
    words = (
        *("optimizer.lr=interval(0.0,1.0)", "hydra/sweeper=search", "hydra.sweeper.n_trials=8"),
        *("hydra.sweep.dir=out", "hydra.sweeper.sampler.n_startup_trials=4"),
    )
    process = sweep(*words)
    assert process.returncode == 0, process.stdout + process.stderr
    best = yaml.safe_load((tmp_path / "out" / "optimization_results.yaml").read_text())
    assert abs(best["best_params"]["optimizer.lr"] - 0.3) < 0.1 and best["best_value"] > 0.9
    rates = sorted(folder.name for folder in (tmp_path / "out").glob("optimizer.lr=*"))
    assert len(rates) == 8
    assert sweep(*words).returncode == 0
    assert sorted(folder.name for folder in (tmp_path / "out").glob("optimizer.lr=*")) == rates
    dying = sweep(*words[:2], "hydra.sweeper.n_trials=2", "hydra.sweep.dir=dead", "seed=2")
    assert dying.returncode == 1 and "1 of 2 runs died: optimizer.lr=0.7" in dying.stderr


@pytest.mark.parametrize(
    ("columns", "score"),
    [
        ("validation/strict,validation/reward", 0.2),
        ("validation/reward,reward/mean", 0.2),
        ("reward/mean,x", None),
    ],
)
def test_what_a_search_seeks_is_what_the_best_checkpoint_is_chosen_by(
    tmp_path: Path, columns: str, score: float | None
) -> None:
    (tmp_path / "metrics.csv").write_text(f"update,{columns}\n0,0.1,0.5\n1,0.2,0.6\n2,,\n")
    found = multirun.last_score(task(tmp_path))
    assert (None if math.isnan(found) else found) == score


def test_a_signal_reaches_the_job_first(tmp_path: Path) -> None:
    """SIGTERM to the sweep stops the job, which saves, and then the sweep."""
    child = tmp_path / "child.py"
    child.write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n    open('saved', 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\nopen('ready', 'w').close()\ntime.sleep(60)\n"
    )
    parent = (
        "import sys\nfrom pathlib import Path\nfrom stage import multirun\n"
        "task = multirun.Task(Path('.').absolute(), None, (), (), True, False, 'single')\n"
        f"multirun._run([sys.executable, {str(child)!r}], task, Path('job.log'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_launchers_and_sweeper_have_all_arguments_of_their_classes() -> None:
    """One file is one class with all its arguments; a key that the plugin does not know is refused at the start."""
    pytest.importorskip("submitit", reason="the extra launchers is not installed")
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
    from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    for name, known in (
        ("launcher/parallel", JobLibLauncherConf),
        ("launcher/slurm", SlurmQueueConf),
        ("sweeper/search", OptunaSweeperConf),
    ):
        found = yaml.safe_load((CONF / "hydra" / f"{name}.yaml").read_text())
        assert set(found) == set(known.__dataclass_fields__) - {"defaults"}, name
        assert found["_target_"] == known._target_


@pytest.mark.slow
def test_the_same_command_goes_on_with_what_was_stopped(program: Program, tmp_path: Path) -> None:  # noqa: F811
    """A sweep that is ended in its first job: run again it resumes that one, and a third time it runs nothing."""
    words = (
        "-m",
        "updates=6",
        "algorithm=grpo",
        "seed=1,2",
        "hydra.sweep.dir=sweep",
        "callbacks.progress.every=1",
    )
    process = program.start(*words)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("update 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM, rest
    (folder,) = [path.parent for path in (tmp_path / "sweep").glob("*/metrics.csv")]
    assert 3 <= int(read_metrics(folder / "metrics.csv")[-1]["update"]) < 6
    process = program.start(*words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"goes on in {folder.relative_to(tmp_path)}" in output, output
    assert output.splitlines()[-1] == "2 runs in sweep: 2 done"
    for run in (tmp_path / "sweep").glob("*/metrics.csv"):
        assert [row["update"] for row in read_metrics(run)] == [str(update) for update in range(7)]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "sweep").glob("*/metrics.csv")}
    process = program.start(*words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and output.splitlines()[-1] == "2 runs in sweep: 2 there already"
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_processes_of_a_strategy_do_not_multiply_the_sweep(program: Program, tmp_path: Path) -> None:  # noqa: F811
    """Two jobs of two gloo processes each are two runs, and no process of a run starts the sweep again."""
    process = program.start(
        *(
            "-m",
            "updates=1",
            "algorithm=grpo",
            "seed=1,2",
            "hydra.sweep.dir=sweep",
            "callbacks.validation=null",
        ),
        *("callbacks.images=null", "callbacks.checkpoints.monitor=reward/mean", "strategy=ddp"),
        *("trainer.devices=2", "trainer.accelerator=cpu"),
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == "2 runs in sweep: 2 done"
    folders = sorted((tmp_path / "sweep").glob("*/metrics.csv"))
    assert [[row["update"] for row in read_metrics(file)] for file in folders] == [["1"], ["1"]]
    assert output.count("Launching 2 jobs") == 1
    assert output.count("on 2 processes with a cpu each; writes to") == 2


def test_a_run_does_not_write_over_another(tmp_path: Path) -> None:
    found = task(tmp_path / "run")
    save(found, 3)
    config: DictConfig = found.config
    config.output = str(found.folder)
    with pytest.raises(ValueError, match="holds a run already: two runs would have one name"):
        launch.check_folder(config)
    config.resume = "anything"
    launch.check_folder(config)
