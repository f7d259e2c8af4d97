"""The path without gradient: which samples are drawn, what they are scored with, and what a bad scorer does."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.group_draws import Stopwatch, draw
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.rollout import Collected, Distribution, collect, micro_batches, score_tokens, scored_distribution
from stage.types import Scores
from tests.tiny_training import PROMPTS, Redness, objective, tiny_base, tiny_policy

PLAIN = Sampler(guidance_scale=1.0, temperature=1.0)
GUIDED = Sampler(guidance_scale=3.0, temperature=0.7)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return tiny_policy(tiny_base(tmp_path_factory.mktemp("janus")))


def rollout(policy: JanusPolicy, sampler: Sampler = PLAIN, **changes: Any) -> Collected:
    arguments: dict[str, Any] = {
        "reference": None,
        "sampler": sampler,
        "scorer": Redness(),
        "objective": objective(beta=0.0),
        "prompts": PROMPTS[:3],
        "update": 2,
        "seed": 5,
        "group_size": 4,
        "differentiable": False,
        "beside": False,
        "watch": Stopwatch(torch.device("cpu")),
    }
    return collect(policy, **(arguments | changes))


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5, 8, 11, 100])
@pytest.mark.parametrize(("num_prompts", "group_size"), [(1, 2), (3, 4), (5, 3)])
def test_micro_batches_cover_every_sample_once(num_prompts: int, group_size: int, limit: int | None) -> None:
    count = torch.zeros(num_prompts, group_size)
    rows, columns = micro_batches(num_prompts, group_size, limit)
    for prompts in rows:
        for samples in columns:
            count[prompts, samples] += 1
            assert limit is None or count[prompts, samples].numel() <= limit
    assert (count == 1).all()


def test_groups_stay_together_while_they_fit() -> None:
    """9 samples hold two groups of 4; 3 samples hold a part of one."""
    assert micro_batches(5, 4, 9) == ([slice(0, 2), slice(2, 4), slice(4, 5)], [slice(0, 4)])
    assert micro_batches(2, 4, 3) == ([slice(0, 1), slice(1, 2)], [slice(0, 3), slice(3, 4)])


def test_a_limit_below_one_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="micro_batch must be at least 1"):
        micro_batches(2, 4, 0)


def test_a_sample_depends_on_seed_update_prompt_and_index_alone(policy: JanusPolicy) -> None:
    """Fewer prompts, another order, a larger group: the same tokens wherever prompt and index are the same."""
    _, together = draw(policy, PLAIN, PROMPTS[:3], 4, seed=5, update=2)
    _, alone = draw(policy, PLAIN, PROMPTS[2:3], 6, seed=5, update=2)
    _, turned = draw(policy, PLAIN, PROMPTS[2::-1], 4, seed=5, update=2)
    assert torch.equal(together.tokens[2], alone.tokens[0, :4])
    assert torch.equal(together.tokens, turned.tokens.flip(0))
    for seed, update in ((6, 2), (5, 3)):
        _, other = draw(policy, PLAIN, PROMPTS[:3], 4, seed=seed, update=update)
        assert not torch.equal(together.tokens, other.tokens)
    assert not torch.equal(together.tokens[0, 0], together.tokens[0, 1])


def test_a_rollout_has_the_shapes_of_the_legend(policy: JanusPolicy) -> None:
    found = rollout(policy).rollout
    length, side = policy.num_image_tokens, policy.image_size
    assert found.tokens.shape == found.old.logps.shape == found.old.entropy.shape == (3, 4, length)
    assert found.images.shape == (3, 4, side, side, 3) and found.images.dtype == torch.uint8
    assert found.codes.shape[:3] == (3, 4, length)
    assert found.scores.parts.shape == (3, 4, 2)
    assert found.update == 2 and found.prompts == PROMPTS[:3] and found.reference is None
    assert not any(tensor.requires_grad for tensor in (found.old.logps, found.codes, found.scores.parts))


def test_plain_sampling_is_scored_with_what_was_sampled(policy: JanusPolicy) -> None:
    """Cache and training path are two programs for one distribution; so the gap is rounding."""
    found = rollout(policy).rollout
    assert torch.allclose(found.old.logps, found.sampled_logps, atol=1e-4)


def test_guided_scores_are_of_the_distribution_that_was_sampled(policy: JanusPolicy) -> None:
    guided = rollout(policy, GUIDED, objective=objective(beta=0.0, distribution="guided")).rollout
    conditional = rollout(policy, GUIDED, objective=objective(beta=0.0, distribution="conditional")).rollout
    assert torch.equal(guided.tokens, conditional.tokens)
    assert torch.allclose(guided.old.logps, guided.sampled_logps, atol=1e-4)
    alone = policy.score(conditional.prompt_tokens, conditional.tokens, guidance_scale=1.0, temperature=1.0)
    assert torch.equal(conditional.old.logps, alone.logps)
    assert (conditional.old.logps - conditional.sampled_logps).abs().max() > 0.1


def test_the_reference_is_scored_with_the_same_distribution(policy: JanusPolicy) -> None:
    found = rollout(policy, GUIDED, reference=policy, objective=objective(distribution="guided")).rollout
    assert found.reference is not None
    assert torch.equal(found.reference.logps, found.old.logps)
    assert torch.equal(found.reference.entropy, found.old.entropy)


def test_one_forward_serves_rollout_and_update(policy: JanusPolicy) -> None:
    """The values with the graph are those without, bit for bit, and the rollout keeps none of the graph."""
    plain, live = rollout(policy), rollout(policy, differentiable=True)
    assert plain.scores is None and live.scores is not None
    assert live.scores.logps.requires_grad and not live.rollout.old.logps.requires_grad
    assert torch.equal(live.scores.logps, plain.rollout.old.logps)
    assert torch.equal(live.rollout.old.entropy, plain.rollout.old.entropy)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_scores_do_not_depend_on_micro_batches(policy: JanusPolicy, limit: int) -> None:
    prompt_tokens, samples = draw(policy, PLAIN, PROMPTS[:3], 4, seed=5, update=2)
    one = Distribution(1.0, 1.0)
    whole = score_tokens(policy, prompt_tokens, samples.tokens, micro_batches(3, 4, None), one)
    cut = score_tokens(policy, prompt_tokens, samples.tokens, micro_batches(3, 4, limit), one)
    assert torch.allclose(whole.logps, cut.logps, atol=1e-5)
    assert torch.allclose(whole.entropy, cut.entropy, atol=1e-5)


def test_times_of_all_parts_are_returned(policy: JanusPolicy) -> None:
    watch = Stopwatch(torch.device("cpu"))
    rollout(policy, watch=watch)
    assert set(watch.seconds) == {"sample", "decode", "reward", "reference", "replay"}
    assert watch.seconds["sample"] > 0


def test_an_unknown_distribution_is_named() -> None:
    class Unknown:
        distribution = "both"

    with pytest.raises(ValueError, match="conditional or guided; got 'both'"):
        scored_distribution(Unknown(), PLAIN)


class Broken:
    """A scorer that is right but for one part of one sample, or for the shape of all."""

    def __init__(self, value: float, squeeze: bool = False) -> None:
        self.value, self.squeeze = value, squeeze

    def __call__(self, images: torch.Tensor, prompts: Any) -> Scores:
        scores = Redness()(images, prompts)
        scores.parts[1, 2, 0] = self.value
        return Scores(scores.parts[0] if self.squeeze else scores.parts, scores.names, scores.weights, ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_names_its_prompt(policy: JanusPolicy, value: float) -> None:
    with pytest.raises(ValueError, match=f"sample 2 of '{PROMPTS[1].text}' got {value}"):
        rollout(policy, scorer=Broken(value))


def test_a_reward_of_another_shape_is_an_error(policy: JanusPolicy) -> None:
    with pytest.raises(ValueError, match=r"parts \[3, 4, R\].*got \[4, 2\]"):
        rollout(policy, scorer=Broken(0.0, squeeze=True))


def test_a_scorer_that_fails_stops_the_rollout(policy: JanusPolicy) -> None:
    def fail(images: torch.Tensor, prompts: Any) -> Scores:
        raise ConnectionError("the reward server is gone")

    with pytest.raises(ConnectionError, match="gone"):
        rollout(policy, scorer=fail)


class Waiting(Redness):
    """Redness that takes its time, as a server far away does, and notes in which thread and under what modes."""

    seconds = 0.4

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, bool]] = []

    def __call__(self, images: Tensor, prompts: Any) -> Scores:
        own = threading.current_thread() is threading.main_thread()
        self.seen.append((own, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        time.sleep(self.seconds)
        return super().__call__(images, prompts)


class SlowReference:
    """A policy that takes as long as `Waiting` to score."""

    def __init__(self, policy: JanusPolicy) -> None:
        self.policy = policy

    def score(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(Waiting.seconds)
        return self.policy.score(*args, **kwargs)


def test_a_reward_beside_the_reference_saves_its_time_and_changes_nothing(policy: JanusPolicy) -> None:
    """Two waits of 0.4 s: one after the other 0.8 s, side by side 0.4 s, and parts that add up to what was waited."""
    found, watches, walls, scorer = [], [], [], Waiting()
    for beside in (False, True):
        watches.append(Stopwatch(torch.device("cpu")))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            found.append(
                rollout(
                    policy, reference=SlowReference(policy), scorer=scorer, beside=beside, watch=watches[-1]
                )
            )
        walls.append(time.perf_counter() - started)
    after, side = found[0].rollout, found[1].rollout
    assert torch.equal(after.scores.parts, side.scores.parts) and after.scores.reasons == side.scores.reasons
    assert after.reference is not None and side.reference is not None
    assert torch.equal(after.reference.logps, side.reference.logps)
    assert torch.equal(after.reference.entropy, side.reference.entropy)
    assert scorer.seen == [(True, False, False), (False, False, False)]
    assert walls[0] - walls[1] > 0.5 * Waiting.seconds
    one, two = (watch.seconds for watch in watches)
    assert one["reward"] >= Waiting.seconds and one["reference"] >= Waiting.seconds
    assert two["reward"] < 0.5 * Waiting.seconds <= two["reward_beside"]
    assert sum(seconds for name, seconds in two.items() if name != "reward_beside") <= walls[1]


def test_scorers_run_in_their_own_type_in_any_thread(policy: JanusPolicy) -> None:
    """Under the autocast of a mixed-precision run a scorer multiplies in its own dtype, beside or not."""

    class Product(Redness):
        def __call__(self, images: Tensor, prompts: Any) -> Scores:
            found = super().__call__(images, prompts)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            return found

    for beside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            rollout(policy, reference=policy, scorer=Product(), beside=beside)


def test_what_a_scorer_raises_beside_the_reference_is_raised(policy: JanusPolicy) -> None:
    class Dead(Redness):
        def __call__(self, images: Tensor, prompts: Any) -> Scores:
            raise ConnectionError("no server answers")

    with pytest.raises(ConnectionError, match="no server answers"):
        rollout(policy, reference=policy, scorer=Dead(), beside=True)

    class Broken:
        def score(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the reference is broken")

    with pytest.raises(RuntimeError, match="the reference is broken"):
        rollout(policy, reference=Broken(), beside=True)
