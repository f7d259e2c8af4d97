"""Programs that stand in for train.py and evaluate.py: they write what these write, and fail or hang when told to.

The real ones take half a minute each; what is tested with these is who is started when, and what is left behind. A
setting `behave=` says what happens: `die`, `hang` (deaf to signals), `slow` (an update takes long).
"""

from __future__ import annotations

from pathlib import Path

import torch

TRAIN = """
import os, shutil, signal, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
here = Path(__file__).parent
done = 0
if "resume" in given:
    folder = Path(given["resume"]).parent.parent
    done = int((folder / "at.txt").read_text())
    behave = (folder / "behave.txt").read_text()
else:
    folder, behave = Path(given["output"]), given.get("behave", "well")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behave.txt").write_text(behave)
    (folder / "config.yaml").write_text(f"seed: {given['seed']}\\nupdates: {given['updates']}\\noutput: {folder}\\n")
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "images").mkdir(exist_ok=True)
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(number))
if behave == "die" and not (here / "mended").exists():
    print("working on it")
    sys.exit("error: the reward servers are gone\\n(HYDRA_FULL_ERROR=1 shows where)")
if behave == "hang" and not (here / "mended").exists():
    while True:
        time.sleep(0.1)
print("update", done, "of", given["updates"], flush=True)
metrics = folder / "metrics.csv"
if not done:
    metrics.write_text("update,reward/mean\\n")
while done < int(given["updates"]) and not asked:
    time.sleep(0.6 if behave == "slow" and not (here / "mended").exists() else 0.01)
    done += 1
    with metrics.open("a") as file:
        file.write(f"{done},0.5\\n")
    (folder / "images" / f"update_{done:05d}.png").write_bytes(os.urandom(2000))
shutil.copyfile(here / f"checkpoint_{done}.ckpt", folder / "checkpoints" / "last.ckpt")
(folder / "at.txt").write_text(str(done))
sys.exit(143 if asked else 0)
"""
EVALUATE = """
import json, sys
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(given["checkpoint"]).parent.parent / "evaluation" / "last"
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps(given))
"""


def write_programs(folder: Path, updates: int) -> Path:
    """A folder with both programs, and checkpoints of 0 to `updates` updates for them to copy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "evaluate.py").write_text(EVALUATE)
    for update in range(updates + 1):
        write_checkpoint(folder / f"checkpoint_{update}.ckpt", update)
    return folder


def write_checkpoint(path: Path, update: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"policy.weight": torch.full((3,), float(update))}
    rest = {
        "config": {},
        "overrides": [],
        "base": {},
        "random": {},
        "optimizer_states": [torch.zeros(100000)],
    }
    torch.save({"state_dict": state, "update": update, **rest}, path)
