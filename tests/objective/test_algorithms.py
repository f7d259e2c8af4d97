"""The YAML files of `conf/algorithm`: what they build, what can be changed, what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from stage.objective.objective import Objective
from stage.objective.surrogate import ClippedRatio, Surrogate
from stage.types import TokenScores
from tests.objective.example import ALGORITHMS, build, drifted, evaluate, rollout, scores

FILES = sorted(path.stem for path in ALGORITHMS.glob("*.yaml"))


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(ALGORITHMS.parent), version_base="1.3"):
        return compose(config_name=None, overrides=list(overrides))


def test_the_three_algorithms_are_there() -> None:
    assert {"grpo", "stage", "stage_released"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_states_every_argument_of_every_target(name: str) -> None:
    def visit(node: DictConfig) -> None:
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        assert set(node) - {"_target_"} == set(parameters)
        assert all(value.default is inspect.Parameter.empty for value in parameters.values())
        for child in node.values():
            if OmegaConf.is_dict(child):
                visit(child)

    visit(composed(f"+algorithm={name}").algorithm)


def test_values_of_the_paper() -> None:
    grpo, stage, released = (build(name) for name in ("grpo", "stage", "stage_released"))
    assert (stage.reweight_advantage, stage.reweight_kl, stage.entropy_coefficient) == (True, True, 0.4)
    assert (stage.beta, stage.clip_low, stage.clip_high, stage.tied_groups) == (0.01, 0.2, 0.2, "raw")
    assert (grpo.reweight_advantage, grpo.reweight_kl, grpo.entropy_coefficient) == (False, False, 0.0)
    assert (grpo.beta, grpo.clip_low, grpo.clip_high) == (0.01, 0.2, 0.2)
    assert (released.beta, released.clip_low, released.tied_groups) == (0.03, None, "normalise")
    for objective in (grpo, stage, released):
        assert (objective.updates_per_rollout, objective.micro_batch) == (1, None)
        assert objective.distribution == "conditional"


@pytest.mark.parametrize("name", FILES)
def test_switches_are_changed_on_the_command_line(name: str) -> None:
    changes = ["algorithm.reweight_kl=false", "algorithm.beta=0.5", "algorithm.micro_batch=3"]
    objective = instantiate(composed(f"+algorithm={name}", *changes).algorithm)
    assert (objective.reweight_kl, objective.beta, objective.micro_batch) == (False, 0.5, 3)


class Doubled:
    """Somebody's own ratio: twice the log-probability, whatever the rollout was."""

    def __init__(self, *, factor: float) -> None:
        self.factor = factor

    def __call__(
        self,
        *,
        scores: TokenScores,
        old_logps: Tensor,
        advantages: Tensor,
        clip_low: float | None,
        clip_high: float | None,
    ) -> Surrogate:
        values = self.factor * scores.logps * advantages[..., None]
        return Surrogate(
            values=values, ratio=torch.ones_like(values), clipped=torch.zeros_like(values).bool()
        )


def absolute(*, scores: TokenScores, reference: TokenScores) -> Tensor:
    """Somebody's own divergence, a plain function."""
    return (scores.logps - reference.logps).abs()


def test_slots_come_from_any_package() -> None:
    config = composed("+algorithm=grpo").algorithm
    config.ratio = {"_target_": f"{__name__}.Doubled", "factor": 2.0}
    config.divergence = {"_target_": f"{__name__}.absolute", "_partial_": True}
    config.beta = 1.0
    record = rollout(scores([[1.0, 0.0]]), length=1)
    logps = drifted(record)
    _, gradient = evaluate(instantiate(config), record, logps)
    assert record.reference is not None
    credit, _ = build("grpo").credit(record)
    # (-2 A + sign(lp - lr)) / (G L)
    expected = (-2.0 * credit.advantages[..., None] + (logps - record.reference.logps).sign()) / 2
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-15, rtol=0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stage", {"token_weights": None}, "slot token_weights is needed when reweight"),
    ("stage", {"divergence": None}, "slot divergence is needed when beta is 0.01"),
    ("stage", {"advantage": None}, "slot advantage is needed always"),
    (
        "stage",
        {"ratio": {"_target_": "stage.objective.divergence.K3"}},
        "slot ratio is called with the keywords",
    ),
    (
        "stage",
        {"divergence": {"_target_": "stage.objective.similarity.StageWeights"}},
        "slot divergence is called",
    ),
    (
        "stage",
        {"aggregation": {"_target_": "stage.objective.surrogate.ClippedRatio"}},
        "slot aggregation is called",
    ),
    (
        "stage",
        {"ratio": {"_target_": "stage.objective.surrogate.OnPolicyRatio"}},
        "on-policy ratio is never clipped",
    ),
    ("stage", {"clip_low": None}, "clipped ratio needs"),
    ("stage", {"tied_groups": "ignore"}, "tied_groups must be one of raw, zero, normalise"),
    ("stage", {"distribution": "sampled"}, "distribution must be one of conditional, guided"),
    ("stage", {"micro_batch": 0}, "micro_batch must be a whole number"),
    ("stage", {"updates_per_rollout": 0}, "updates_per_rollout must be a whole number"),
    ("stage", {"updates_per_rollout": None}, "updates_per_rollout must be a whole number"),
    ("stage", {"beta": -0.1}, "beta must be a number of at least 0"),
    ("stage", {"entropy_coefficient": "some"}, "entropy_coefficient must be a number"),
    ("stage", {"reweight_kl": "false"}, "reweight_kl must be true or false"),
    ("stage_released", {"updates_per_rollout": 2}, "on-policy ratio allows one update"),
    ("stage_released", {"clip_high": 0.2}, "on-policy ratio is never clipped"),
    ("stage_released", {"tied_groups": "raw"}, "released advantage needs tied_groups: normalise"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_does_not_fit_raises_at_construction(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        build(name, **changes)
    assert isinstance(caught.value.__cause__, ValueError)  # Hydra wraps what a constructor raises


def test_a_class_in_place_of_an_instance_raises() -> None:
    slots = {key: getattr(build("grpo"), key) for key in inspect.signature(Objective).parameters}
    Objective(**slots)
    with pytest.raises(ValueError, match="an instance, not its class"):
        Objective(**{**slots, "ratio": ClippedRatio})


def test_a_slot_that_is_not_needed_may_be_empty() -> None:
    objective = build("grpo", token_weights=None, divergence=None, beta=0.0)
    record = rollout(scores([[0.0, 1.0]]), reference=False)
    evaluate(objective, record, drifted(record))
