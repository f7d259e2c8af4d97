"""Variants of STAGE's token weights."""

from __future__ import annotations

import pytest
import torch

from stage.objective.similarity import StageWeights
from stage.objective.token_weights import AcrossPrompts, ScaledWeights
from tests.objective import loop
from tests.objective.example import build

KEPT = torch.tensor([True, True])


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return advantages, torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)


def test_the_numbers_of_the_paper_give_the_weights_of_the_paper() -> None:
    advantages, codes = example()
    paper = StageWeights()(advantages=advantages, kept=KEPT, codes=codes)
    found = ScaledWeights(kl_base=0.5, kl_slope=0.5, features="codes")(
        advantages=advantages, kept=KEPT, codes=codes
    )
    assert all(getattr(found, name).equal(value) for name, value in vars(paper).items())


@pytest.mark.parametrize(("base", "slope"), [(1.0, 0.0), (0.0, 1.0), (1.0, -0.5)])
def test_other_numbers_change_the_weight_of_the_kl_alone(base: float, slope: float) -> None:
    advantages, codes = example()
    paper = StageWeights()(advantages=advantages, kept=KEPT, codes=codes)
    found = ScaledWeights(kl_base=base, kl_slope=slope, features="codes")(
        advantages=advantages, kept=KEPT, codes=codes
    )
    assert found.advantage.equal(paper.advantage)
    expected = [base + slope * loop.clip(s + 1, 0, 1) for s in paper.similarity.flatten().tolist()]
    assert found.kl.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_opponents_across_prompts_equal_a_loop() -> None:
    advantages, codes = example()
    found = AcrossPrompts()(advantages=advantages, kept=KEPT, codes=codes)
    everyone, vectors = advantages.flatten().tolist(), codes.flatten(0, 1).tolist()
    expected = loop.similarity(everyone, vectors, self_at_zero=False)
    assert found.similarity.flatten(0, 1).tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    apart = StageWeights()(advantages=advantages, kept=KEPT, codes=codes)
    assert not torch.allclose(found.similarity, apart.similarity)
    one = AcrossPrompts()(advantages=advantages[:1], kept=KEPT[:1], codes=codes[:1])
    torch.testing.assert_close(one.similarity, apart.similarity[:1], atol=1e-12, rtol=0)


def test_an_objective_says_which_vectors_it_compares() -> None:
    slot = {
        "_target_": "stage.objective.token_weights.ScaledWeights",
        "kl_base": 0.5,
        "kl_slope": 0.5,
        "features": "decoder_features",
    }
    off = {"reweight_advantage": False, "reweight_kl": False}
    assert build("stage").features == "codes"
    assert build("stage", token_weights=slot).features == "decoder_features"
    assert build("stage", token_weights=slot, **off).features == "codes"
    for changes, message in (
        ({"features": "pixels"}, "features must be codes or decoder_features"),
        ({"kl_slope": -0.6}, "weights of the KL are at least 0"),
    ):
        with pytest.raises(Exception, match=message):
            build("stage", token_weights={**slot, **changes})
