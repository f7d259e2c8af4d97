"""Errors in the words of who typed the command line."""

from __future__ import annotations

import pytest
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from stage import mistakes
from tests.test_launch import composed


def test_an_error_of_the_user_is_explained_in_its_own_words() -> None:
    assert mistakes.explain(ValueError("too few")) == "too few"
    assert mistakes.explain(FileNotFoundError(2, "No such file or directory", "a.jsonl")) == (
        "No such file or directory: a.jsonl"
    )
    assert mistakes.explain(RuntimeError("a bug")) is None
    assert mistakes.explain(KeyError("a bug")) is None


def test_an_error_of_hydra_is_one_line() -> None:
    error = HydraException("Could not override 'x'.\nTo append use +x=1\nConfig search path:\n\tfile:///a")
    error.__cause__ = ConfigAttributeError("Key 'x' is not in struct\n    full_key: x\n    object_type=dict")
    assert mistakes.explain(error) == "Could not override 'x'. To append use +x=1 (Key 'x' is not in struct)"


def test_an_error_in_a_class_speaks_without_hydra() -> None:
    """ValueError in its own words, a wrong argument with the place in the configuration, a bug as a bug."""
    node = {
        "x": {"_target_": "tests.test_launch.fails"},
        "y": {"_target_": "tests.test_launch.fails", "rate": 1},
    }
    node["z"] = {"_target_": "tests.test_launch.breaks"}
    config = OmegaConf.create(node)
    found = {}
    for name in config:
        with pytest.raises(InstantiationException) as caught:
            instantiate(config[name])
        found[name] = mistakes.explain(caught.value)
    assert found["x"] == "lr must be positive; got -1"
    assert found["y"] is not None and "rate" in found["y"] and found["y"].startswith("y: ")
    assert found["z"] is None


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("updtes=3", "did you mean updates?"),
        ("algorithm.betta=1", "did you mean beta?"),
        ("trainer.devises=2", "did you mean devices?"),
        ("something=3", "(Key 'something' is not in struct)"),
    ],
)
def test_an_unknown_setting_names_the_one_that_looks_like_it(override: str, answer: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed(override)
    text = mistakes.explain(caught.value)
    assert text is not None and text.endswith(answer), text
