"""Checkpoints that the policy's tests run on: a random model built here, and the one that ships with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage.paths import PACKAGE, resolve
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.template import Template
from tests.policy.tiny_model import build_tiny_janus

SHIPPED = f"{PACKAGE}stage/shapes/assets/tiny_janus"
PLAIN = Template("plain", "", "")
# Four prompts of different lengths, so that a batch of them is padded.
PROMPTS = (
    "a red circle",
    "a photo of two green square and three blue circle left of a yellow triangle",
    "three blue square",
    "a photo of a yellow triangle right of a red circle",
)


def load(path: str | Path, freeze: tuple[str, ...] = ()) -> JanusPolicy:
    return load_policy(str(path), PLAIN, "float32", freeze, False)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="session", params=["random", "shipped"])
def checkpoint(request: pytest.FixtureRequest, random_checkpoint: Path) -> Path:
    """The folder of a small Janus."""
    if request.param == "random":
        return random_checkpoint
    try:
        return resolve(SHIPPED)
    except FileNotFoundError:
        pytest.skip(f"{SHIPPED} is not there")


@pytest.fixture(scope="session")
def shared_policy(checkpoint: Path) -> JanusPolicy:
    """One policy for all tests that only read it."""
    return load(checkpoint)


@pytest.fixture
def policy(random_checkpoint: Path) -> JanusPolicy:
    """A random policy of its own for a test that changes it."""
    return load(random_checkpoint)
