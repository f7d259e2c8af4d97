"""Settings that vary from sample to sample: which they are, that they are drawn with, and that they are scored with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.policy import drawing
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler, uniforms
from stage.policy.variation import Variation
from tests.policy.conftest import PROMPTS

RELEASED = Variation(temperature_spread=0.2, guidance_spread=0.4, low=0.5, high=2.0, per="sample")
IDS = (11, 12, 13)
VARIED = Sampler(3.0, 0.9, variation=RELEASED)


def settings(
    sampler: Sampler, policy: JanusPolicy, ids: tuple[int, ...] = IDS, group: int = 4
) -> tuple[Tensor, Tensor]:
    found = drawing.noise(policy, sampler, 7, 3, ids, group, vary=True)
    assert found.guidance_scale is not None and found.temperature is not None
    return found.guidance_scale, found.temperature


def test_by_hand_from_its_numbers() -> None:
    numbers = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.9999, 0.0001], [0.0, 0.999999]]], dtype=torch.float64)
    scale, temperature = RELEASED(numbers, 5.0, 0.8)
    normal = NormalDist().inv_cdf
    guided = [5.0, 5 * (1 + 0.4 * normal(0.9)), 10.0, 2.5]
    heat = [0.8, 0.8 * (1 + 0.2 * normal(0.1)), 0.4, 0.8 * (1 + 0.2 * normal(0.999999))]
    heat[2], heat[3] = max(0.4, 0.8 * (1 + 0.2 * normal(0.0001))), min(1.6, heat[3])
    assert scale is not None and temperature is not None
    torch.testing.assert_close(scale[0].tolist(), guided, atol=1e-5, rtol=0)
    torch.testing.assert_close(temperature[0].tolist(), heat, atol=1e-6, rtol=0)


def test_guidance_never_falls_below_1_and_a_spread_of_0_leaves_the_number() -> None:
    numbers = torch.rand(50, 8, 2, dtype=torch.float64)
    scale, temperature = RELEASED(numbers, 1.2, 1.0)
    assert scale is not None and scale.min() == 1.0 and scale.max() > 1.2
    assert temperature is not None and temperature.min() >= 0.5
    assert replace(RELEASED, guidance_spread=0.0)(numbers, 5.0, 1.0)[0] is None
    assert replace(RELEASED, temperature_spread=0.0)(numbers, 5.0, 1.0)[1] is None


def test_the_spread_is_what_it_says() -> None:
    numbers = uniforms(0, 0, range(4000), 1, 2, domain=drawing.SETTINGS)
    narrow = replace(RELEASED, low=1e-9, high=1e9)
    scale, temperature = narrow(numbers, 100.0, 1.0)
    assert scale is not None and temperature is not None
    for found, mean, spread in ((scale, 100.0, 40.0), (temperature, 1.0, 0.2)):
        error = spread / math.sqrt(4000)
        assert (
            abs(found.double().mean() - mean) < 4 * error and abs(found.double().std() - spread) < 4 * error
        )


def test_settings_belong_to_seed_update_prompt_and_sample(policy: JanusPolicy) -> None:
    scale, temperature = settings(VARIED, policy)
    alone = settings(VARIED, policy, ids=(12,), group=2)
    assert alone[0].equal(scale[1:2, :2]) and alone[1].equal(temperature[1:2, :2])
    assert len(temperature.flatten().unique()) == 12  # of the scales, some lie on a bound
    other = drawing.noise(policy, VARIED, 7, 4, IDS, 4, vary=True)
    assert other.guidance_scale is not None and not other.guidance_scale.equal(scale)
    plain = drawing.noise(policy, VARIED, 7, 3, IDS, 4)
    assert plain.guidance_scale is None and plain.temperature is None  # validation and evaluation
    assert plain.image.equal(drawing.noise(policy, Sampler(3.0, 0.9), 7, 3, IDS, 4).image)


def test_per_group_the_samples_of_a_prompt_have_one_setting(policy: JanusPolicy) -> None:
    scale, temperature = settings(replace(VARIED, variation=replace(RELEASED, per="group")), policy)
    for found in (scale, temperature):
        assert (found == found[:, :1]).all() and len(found.unique()) == len(IDS)


def test_each_sample_is_what_a_sampler_of_its_own_settings_draws(policy: JanusPolicy) -> None:
    prompt = policy.tokenize(PROMPTS[:3])
    found = drawing.noise(policy, VARIED, 7, 3, IDS, 2, vary=True)
    got = drawing.draw(policy, VARIED, prompt, found)
    assert got.guidance_scale is found.guidance_scale and got.temperature is found.temperature
    assert found.guidance_scale is not None and found.temperature is not None
    for row in range(3):
        for sample in range(2):
            own = Sampler(found.guidance_scale[row, sample].item(), found.temperature[row, sample].item())
            alone = own(policy, prompt, found.image[:, sample : sample + 1])
            assert alone.tokens[row, 0].equal(got.tokens[row, sample])
            torch.testing.assert_close(alone.logps[row, 0], got.logps[row, sample], atol=1e-4, rtol=0)


def test_a_replay_under_each_samples_settings_gives_what_was_sampled(policy: JanusPolicy) -> None:
    prompt = policy.tokenize(PROMPTS[:3])
    got = drawing.draw(policy, VARIED, prompt, drawing.noise(policy, VARIED, 7, 3, IDS, 2, vary=True))
    assert got.guidance_scale is not None and got.temperature is not None
    found = policy.score(prompt, got.tokens, guidance_scale=got.guidance_scale, temperature=got.temperature)
    torch.testing.assert_close(found.logps, got.logps, atol=1e-4, rtol=0)
    wrong = policy.score(prompt, got.tokens, guidance_scale=3.0, temperature=0.9)
    assert (wrong.logps - got.logps).abs().mean() > 0.01
    one = policy.score(
        prompt,
        got.tokens[:, 1:],
        guidance_scale=got.guidance_scale[:, 1:],
        temperature=got.temperature[:, 1:],
    )
    torch.testing.assert_close(one.entropy, found.entropy[:, 1:], atol=1e-4, rtol=0)


def test_the_temperature_of_each_sample_reaches_the_gradient(policy: JanusPolicy) -> None:
    """Twice the temperature halves the logits: the same as half the last layer."""
    prompt, tokens = (
        policy.tokenize(PROMPTS[:1]),
        torch.zeros(1, 1, policy.num_image_tokens, dtype=torch.long),
    )
    layer = policy.model.model.generation_head.vision_head

    def gradient(temperature: Any) -> Tensor:
        found = policy.score(prompt, tokens, guidance_scale=1.0, temperature=temperature)
        (grad,) = torch.autograd.grad(found.logps.sum() + found.entropy.sum(), layer.weight)
        return grad

    torch.testing.assert_close(gradient(torch.full((1, 1), 0.7)), gradient(0.7), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: replace(RELEASED, temperature_spread=-0.1), "spreads of at least 0"),
        (lambda: replace(RELEASED, temperature_spread=0.0, guidance_spread=0.0), "one of them above"),
        (lambda: replace(RELEASED, low=1.5), "0 < low <= 1 <= high"),
        (lambda: replace(RELEASED, per="prompt"), "must be sample or group"),
        (lambda: Sampler(3.0, 0.0, variation=RELEASED), "must be above 0; got sampler.temperature=0"),
    ],
)
def test_unfit_settings_raise(make: Callable[[], object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make()
