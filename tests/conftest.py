"""What all tests share: threads, seeds, no network, and the folder of outside material where there is one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Set before any test imports a library that reads them. Nothing here may reach a network or open a window.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in plain Python

# One thread makes sums repeat exactly and lets two runs share a small machine.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _same_seed_every_test() -> None:
    """No test depends on which tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Outside material (prompt lists, golden files): `$STAGE_SHARED`, or `shared/` beside the repository."""
    folder = Path(os.environ.get("STAGE_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no outside material at {folder}: set STAGE_SHARED to the folder that has it")
    return folder
