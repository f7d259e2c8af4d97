"""What must be known to repeat a measurement: program versions, commit and command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stage.types import Prompt

PACKAGES = (
    "stage-rl",
    "torch",
    "transformers",
    "tokenizers",
    "lightning",
    "hydra-core",
    "numpy",
    "scipy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of python and of the packages that move the numbers; `not installed` where there is none."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # stage itself, run from a checkout that is not installed
            found[package] = "not installed"
    return found


def command() -> str:
    """The command line as one would type it again, without the folder of the interpreter."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Of the texts and metadata in file order: two evaluations with the same one saw the same prompts."""
    lines = [json.dumps([prompt.text, dict(prompt.metadata)], sort_keys=True) for prompt in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
