"""Whole distributions and varied settings on their way through a rollout and an update."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.group_draws import Stopwatch
from stage.policy.janus import JanusPolicy
from stage.policy.reference import frozen_reference
from stage.policy.sampler import Sampler
from stage.policy.variation import Variation
from stage.rollout import Collected, collect, comparison, score_tokens, scored_distribution
from stage.types import Metrics, TokenScores
from tests.tiny_training import (
    PROMPTS,
    Redness,
    objective,
    same,
    tiny_base,
    tiny_module,
    tiny_policy,
    weights,
)
from tests.tiny_training import tiny_trainer as trainer

VARIED = Sampler(2.0, 0.9, variation=Variation(0.2, 0.4, 0.5, 2.0, "sample"))
KINDS = ("ReverseKL", "ForwardKL", "JensenShannon")


def whole(kind: str, **changes: Any) -> Any:
    slot = {"_target_": f"stage.objective.distributions.{kind}"}
    return objective(divergence=slot, beta=0.1, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def policy(base: Path) -> JanusPolicy:
    return tiny_policy(base)


@pytest.fixture(scope="module")
def moved(policy: JanusPolicy) -> JanusPolicy:
    """A reference that is not the policy, in its last layer too."""
    torch.manual_seed(0)
    other: Any = frozen_reference(policy.requires_grad_(True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


def collected(policy: JanusPolicy, reference: Any, how: Any, sampler: Sampler, **changes: Any) -> Collected:
    arguments: dict[str, Any] = {
        "update": 2,
        "seed": 5,
        "group_size": 4,
        "differentiable": True,
        "beside": False,
        "watch": Stopwatch(torch.device("cpu")),
    }
    return collect(policy, reference, sampler, Redness(), how, PROMPTS[:3], **(arguments | changes))


def log_probabilities(policy: JanusPolicy, found: Collected, scale: Any, temperature: Any) -> Tensor:
    """`[P, G, L, V]` in float64 from the logits of all positions, guided and divided sample by sample."""
    rollout, rows = found.rollout, []
    for prompt in range(3):
        tokens = replace(
            rollout.prompt_tokens,
            **{n: t[prompt : prompt + 1] for n, t in vars(rollout.prompt_tokens).items() if t is not None},
        )
        for sample in range(4):
            s = scale if isinstance(scale, float) else scale[prompt, sample].item()
            heat = temperature if isinstance(temperature, float) else temperature[prompt, sample].item()
            hidden = policy._hidden_states(tokens, rollout.tokens[prompt, sample][None], 2.0)
            logits = policy.image_logits(hidden[:, -policy.num_image_tokens :], 1.0).double()
            guided = logits[1] + s * (logits[0] - logits[1])
            rows.append((guided / heat).log_softmax(-1))
    return torch.stack(rows).unflatten(0, (3, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", ["conditional", "guided"])
@torch.no_grad()
def test_the_divergence_is_that_of_all_logits(
    policy: JanusPolicy, moved: JanusPolicy, kind: str, distribution: str
) -> None:
    how = whole(kind, distribution=distribution)
    found = collected(policy, moved, how, VARIED)
    assert found.scores is not None and found.scores.divergence is not None
    rollout = found.rollout
    settings = (1.0, 1.0) if distribution == "conditional" else (rollout.guidance_scale, rollout.temperature)
    p, r = (log_probabilities(model, found, *settings) for model in (policy, moved))
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    m = ((p.exp() + r.exp()) / 2).log()
    expected = {"ReverseKL": kl(p, r), "ForwardKL": kl(r, p), "JensenShannon": (kl(p, m) + kl(r, m)) / 2}[
        kind
    ]
    assert expected.mean() > 1e-3
    torch.testing.assert_close(found.scores.divergence.double(), expected, atol=1e-4, rtol=0)


def test_cutting_changes_neither_divergence_nor_gradient(policy: JanusPolicy, moved: JanusPolicy) -> None:
    found = {}
    for limit in (None, 3):
        how = whole("ForwardKL", micro_batch=limit, distribution="guided")
        rollout = collected(policy, moved, how, VARIED).rollout
        other = comparison(how, moved, rollout.reference)
        parts = ([slice(0, 2), slice(2, 3)], [slice(0, 4)]) if limit else ([slice(0, 3)], [slice(0, 4)])
        own = scored_distribution(how, VARIED).of(rollout)
        scores = score_tokens(policy, rollout.prompt_tokens, rollout.tokens, parts, own, compare=other)
        assert scores.divergence is not None
        layer = policy.get_parameter("model.model.language_model.layers.0.mlp.up_proj.weight")
        found[limit] = scores.divergence, torch.autograd.grad(scores.divergence.mean(), layer)[0]
    for one, cut in zip(found[None], found[3], strict=True):
        torch.testing.assert_close(one, cut, atol=1e-5, rtol=1e-4)


def test_nothing_is_kept_where_nothing_asks(policy: JanusPolicy, moved: JanusPolicy) -> None:
    found = collected(policy, moved, objective(beta=0.1), VARIED)
    assert found.rollout.reference is not None and found.rollout.reference.features is None
    assert found.scores is not None and found.scores.divergence is None
    later = collected(policy, moved, whole("ForwardKL"), VARIED, differentiable=False)
    assert later.rollout.old.divergence is None  # only the update needs it


@pytest.mark.parametrize("kind", KINDS)
def test_training_pulls_the_policy_back_to_the_reference(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With advantages of 0 the divergence alone acts: it falls, also when cut into micro-batches."""
    module = tiny_module(
        base,
        objective=whole(kind, tied_groups="zero", micro_batch=3, updates_per_rollout=4),
        scorer=Constant(),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        gradient_clip=None,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    seen: list[float] = []
    learn = module._learn

    def watched(found: Collected) -> Metrics:
        metrics = learn(found)
        seen.append(metrics["policy/kl"])
        return metrics

    monkeypatch.setattr(module, "_learn", watched)
    trainer(tmp_path).fit(module)
    assert seen[0] > 1e-4 and seen[2] < 0.9 * seen[0]


class Constant(Redness):
    """All images are the same to it."""

    def __call__(self, images: Tensor, prompts: Any) -> Any:
        found = super().__call__(images, prompts)
        return replace(found, parts=torch.zeros_like(found.parts))


def test_varied_sampling_trains_and_is_reproducible(base: Path, tmp_path: Path) -> None:
    """Scored as drawn, the first ratio is 1; two runs are equal, and not those of a sampler without variation."""
    ends = []
    for sampler in (VARIED, VARIED, Sampler(2.0, 0.9)):
        module = tiny_module(base, sampler=sampler, objective=objective(distribution="guided"))
        trainer(tmp_path).fit(module)
        assert abs(module.latest["policy/ratio_mean"] - 1) < 1e-5
        assert module.latest["policy/sampling_gap"] < 1e-4
        ends.append(weights(module))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_plans_are_refused(base: Path) -> None:
    planning = Sampler(1.0, 1.0, "text", 1.0, 4, 1.0)
    with pytest.raises(
        ValueError, match="whole distributions are compared for image tokens alone, got ReverseKL"
    ):
        tiny_module(base, sampler=planning, objective=whole("ReverseKL"))


def test_a_last_layer_in_pieces_is_refused() -> None:
    class Pieces:
        """Its weight says where its parts lie, as torch's DTensors do."""

        def last_layer(self) -> tuple[Any, None]:
            weight: Any = torch.zeros(3, 2)
            weight.placements = ()
            return weight, None

    seen = TokenScores(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), features=torch.zeros(1, 2, 3, 2))
    with pytest.raises(ValueError, match="ForwardKL needs the reference's last layer in one piece"):
        comparison(whole("ForwardKL"), Pieces(), seen)
    assert comparison(objective(), Pieces(), seen) is None
