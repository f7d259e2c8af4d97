"""Which groups a rollout keeps when those of equal rewards are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.data import PromptStream
from stage.group_draws import Stopwatch, check_draws
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.rollout import Collected, collect
from stage.types import Prompt, Scores
from tests.tiny_training import objective, tiny_base, tiny_policy

PLAIN = Sampler(guidance_scale=1.0, temperature=1.0)
PROMPTS = tuple(
    Prompt(id=100 + index, text=f"a {word} square") for index, word in enumerate(["red", "blue", "green"])
)
SPARES = tuple(
    Prompt(id=200 + index, text=f"a {word} circle") for index, word in enumerate(["red", "blue", "green"])
)


class Wide:
    """The same reward for all images of prompts 100 and 102; elsewhere that of the sample's number."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.asked.append([prompt.id for prompt in prompts])
        numbers = torch.arange(images.shape[1]).float()
        parts = torch.stack([numbers * (prompt.id not in (100, 102)) for prompt in prompts])
        return Scores(parts[..., None], ("r",), (1.0,), (("",) * images.shape[1],) * len(prompts))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return tiny_policy(tiny_base(tmp_path_factory.mktemp("janus")))


def rollout(
    policy: JanusPolicy, rounds: int, scorer: Wide, prompts: tuple[Prompt, ...] = PROMPTS
) -> Collected:
    changes: dict[str, Any] = {"beta": 0.0, "resampling_rounds": rounds}
    return collect(
        policy,
        None,
        PLAIN,
        scorer,
        objective(**changes),
        prompts,
        update=2,
        seed=5,
        group_size=2,
        differentiable=False,
        beside=False,
        watch=Stopwatch(torch.device("cpu")),
        spare=lambda number: SPARES[:number],
    )


def test_rounds_end_when_all_groups_inform(policy: JanusPolicy) -> None:
    scorer = Wide()
    found = rollout(policy, 5, scorer)
    # one spare prompt in round 1; in round 2 it stands in the batch already, so the other one alone is drawn
    assert scorer.asked == [[100, 101, 102], [200], [201]]
    assert [prompt.id for prompt in found.rollout.prompts] == [101, 200, 201] and found.groups_drawn == 5
    direct = rollout(policy, 0, Wide(), (PROMPTS[1], *SPARES[:2])).rollout
    for name in ("tokens", "codes", "images"):
        assert getattr(found.rollout, name).equal(getattr(direct, name))
    torch.testing.assert_close(found.rollout.sampled_logps, direct.sampled_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.rollout.old.logps, direct.old.logps)
    assert found.rollout.prompt_tokens.ids.equal(direct.prompt_tokens.ids)


def test_without_rounds_nothing_is_replaced(policy: JanusPolicy) -> None:
    scorer = Wide()
    found = rollout(policy, 0, scorer)
    assert scorer.asked == [[100, 101, 102]] and found.groups_drawn == 3
    assert found.rollout.prompts == PROMPTS


def test_rounds_are_limited(policy: JanusPolicy) -> None:
    found = rollout(policy, 1, Wide())
    assert [prompt.id for prompt in found.rollout.prompts] == [101, 200, 100]


def test_plans_are_not_replaced() -> None:
    sampler = Sampler(1.0, 1.0, "text", 1.0, 4, 1.0)
    check_draws(objective(), sampler)
    with pytest.raises(ValueError, match="are not replaced with reasoning"):
        check_draws(objective(resampling_rounds=2), sampler)


def test_spare_prompts_are_a_function_of_the_update_and_their_number() -> None:
    prompts = [Prompt(id=index, text=str(index)) for index in range(12)]
    stream, again = PromptStream(prompts, 4, seed=3), PromptStream(prompts, 4, seed=3)
    found = [stream.spare(update, number) for update in range(3) for number in (1, 2)]
    assert found == [again.spare(update, number) for update in range(3) for number in (1, 2)]
    found += [stream.batch(update) for update in range(3)]
    assert len({tuple(prompt.id for prompt in batch) for batch in found}) == 9
    assert all(len({prompt.id for prompt in batch}) == 4 for batch in found)
    with pytest.raises(ValueError, match="counted from 1"):
        stream.spare(0, 0)


def test_decoder_features_see_the_surroundings(policy: JanusPolicy) -> None:
    """The decoder's own first layers, an image at a time; another token elsewhere moves a feature, and no code."""
    tokens = torch.randint(0, policy.codebook_size, (1, 2, policy.num_image_tokens))
    found = policy.decoder_features(tokens)
    vq = policy.model.model.vqmodel
    for sample in range(2):
        latent = vq.post_quant_conv(vq.quantize.get_codebook_entry(tokens[0, sample][None]))
        expected = vq.decoder.mid(vq.decoder.conv_in(latent))[0].permute(1, 2, 0).flatten(0, 1)
        torch.testing.assert_close(found[0, sample], expected, atol=1e-5, rtol=1e-5)
    other = tokens.clone()
    other[..., -1] = (other[..., -1] + 1) % policy.codebook_size
    assert policy.codes(other)[..., 0, :].equal(policy.codes(tokens)[..., 0, :])
    assert not torch.allclose(policy.decoder_features(other)[..., 0, :], found[..., 0, :])
