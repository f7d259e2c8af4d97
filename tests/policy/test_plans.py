"""Plans are drawn from the text head, scored by the forward that scores the image, and depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.policy import drawing
from stage.policy.drawing import Noise
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.padding import ReleasedPadding
from stage.policy.plans import check_planner, draw_plans, end_tokens, plan_prompt, plan_texts
from stage.policy.rollout_weights import VisitingWeights
from stage.policy.sampler import Sampler, uniforms
from stage.policy.template import Template
from stage.types import Plans, Samples, map_tensors
from tests.policy.conftest import PLAIN, PROMPTS
from tests.policy.reference import row_logits, tolerance
from tests.policy.tiny_model import BOI, BOS, EOS, PAD, build_tiny_janus

ASKING = Template("asking", "<|User|> ", " <|Assistant|> :", "a photo of {prompt} and")
GROUP, LONGEST = 3, 9
ENDS = (EOS, 9, 12, 17, 20, 23)


@pytest.fixture(scope="module")
def policy(random_checkpoint: Path) -> JanusPolicy:
    return load(random_checkpoint)


def load(path: Path) -> JanusPolicy:
    """Several end tokens, so that plans of a random model have many lengths."""
    policy = load_policy(str(path), ASKING, "float32", (), False)
    policy.model.generation_config.eos_token_id = list(ENDS)
    return policy


def noise(group: int = GROUP, longest: int = LONGEST) -> Tensor:
    return uniforms(3, 0, range(len(PROMPTS)), group, longest, domain=drawing.PLANS)


def sampler(scale: float = 1.0, **changes: Any) -> Sampler:
    return replace(Sampler(scale, 1.0, "text", 1.0, LONGEST, 1.3), **changes)


def drawn(policy: JanusPolicy, how: Sampler, order: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Any, Samples]:
    prompt = drawing.tokenize(policy, how, [PROMPTS[p] for p in order])
    return prompt, drawing.draw(policy, how, prompt, drawing.noise(policy, how, 5, 2, order, GROUP))


def row(policy: JanusPolicy, text: str) -> list[int]:
    """Tokens of one prompt up to the plan, written out."""
    words = f"<|User|> a photo of {text} and <|Assistant|> :"
    return [BOS, *policy.tokenizer(words, add_special_tokens=False)["input_ids"]]


def text_logits(policy: JanusPolicy, ids: list[int]) -> Tensor:
    """Float64 `[n, W]`: the text head after each token of one row, without padding or cache."""
    hidden = policy.model.model.language_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return (hidden @ policy.model.lm_head.weight.T).double()


def own(plans: Plans, p: int, g: int) -> list[int]:
    """The plan's own tokens."""
    return plans.tokens[p, g][plans.mask[p, g].bool()].tolist()


def test_the_prompt_ends_where_the_plan_begins(policy: JanusPolicy) -> None:
    prompt = plan_prompt(policy, PROMPTS)
    for p, text in enumerate(PROMPTS):
        ids = row(policy, text)
        padding = prompt.ids.shape[1] - len(ids)
        assert prompt.ids[p].tolist() == [PAD] * padding + ids
        assert prompt.mask[p].tolist() == [0] * padding + [1] * len(ids)
        assert prompt.unconditional_ids[p].tolist() == [PAD] * padding + [BOS] + [PAD] * (len(ids) - 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_plans_are_those_of_a_plain_loop(policy: JanusPolicy, temperature: float) -> None:
    """One row at a time, uncached: the first word whose cumulative probability exceeds the uniform number."""
    plans = draw_plans(policy, plan_prompt(policy, PROMPTS), noise(), temperature)
    lengths = set()
    with torch.no_grad():
        for p, text in enumerate(PROMPTS):
            for g in range(GROUP):
                ids, wanted = row(policy, text), list[int]()
                for step in range(LONGEST):
                    probabilities = (text_logits(policy, ids + wanted)[-1] / temperature).softmax(-1)
                    below = probabilities.cumsum(0) <= noise()[p, g, step]
                    wanted.append(int(below.sum()))
                    logp = float(probabilities[wanted[-1]].log())
                    assert plans.logps[p, g, step].item() == pytest.approx(logp, abs=2e-5)
                    if wanted[-1] in ENDS:
                        break
                lengths.add(len(wanted))
                assert own(plans, p, g) == wanted
                assert plans.tokens[p, g, len(wanted) :].tolist() == [PAD] * (LONGEST - len(wanted))
                assert plans.mask[p, g].tolist() == [1] * len(wanted) + [0] * (LONGEST - len(wanted))
                assert (plans.logps[p, g, len(wanted) :] == 0).all()
    assert plans.tokens.dtype == plans.mask.dtype == torch.int64
    assert len(lengths) > 2 and LONGEST in lengths  # ended early, and cut off at the longest length


def test_greedy_plans_are_those_of_generate(policy: JanusPolicy) -> None:
    prompt = plan_prompt(policy, PROMPTS)
    plans = draw_plans(policy, prompt, noise(1, 20), 0.0)
    model: Any = policy.model
    wanted = model.generate(
        prompt.ids,
        attention_mask=prompt.mask,
        generation_mode="text",
        do_sample=False,
        max_new_tokens=20,
    )[:, prompt.ids.shape[1] :]
    for p in range(len(PROMPTS)):
        ids = own(plans, p, 0)
        assert ids == wanted[p, : len(ids)].tolist()
        assert (plans.logps[p] == 0).all()
    assert len(set(map(str, plans.tokens.tolist()))) > 1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_forward_scores_words_and_image(policy: JanusPolicy, scale: float) -> None:
    """Against rows of their own: prompt, plan with its end, image start, image; free rows of bos and padding."""
    prompt, samples = drawn(policy, sampler(scale))
    assert samples.plans is not None
    with torch.no_grad():
        got = policy.score(
            prompt,
            samples.tokens,
            guidance_scale=scale,
            temperature=0.8,
            plans=samples.plans,
            plan_temperature=1.3,
        )
        assert got.plan is not None
        for p, text in enumerate(PROMPTS):
            for g in range(GROUP):
                start, plan = row(policy, text), own(samples.plans, p, g)
                words = (text_logits(policy, start + plan)[len(start) - 1 : -1] / 1.3).log_softmax(-1)
                chosen = words.gather(1, torch.tensor(plan)[:, None])[:, 0]
                entropy = -(words.exp() * words).sum(-1)
                torch.testing.assert_close(got.plan.logps[p, g, : len(plan)].double(), chosen, **tolerance(1))
                torch.testing.assert_close(
                    got.plan.entropy[p, g, : len(plan)].double(), entropy, **tolerance(1)
                )
                assert (got.plan.logps[p, g, len(plan) :] == 0).all()
                image = samples.tokens[p, g]
                ids = torch.tensor([*start, *plan, BOI])
                logits = row_logits(policy, ids, image[:-1])
                if scale != 1:
                    free = torch.tensor([BOS, *[PAD] * (len(ids) - 2), BOI])
                    unconditional = row_logits(policy, free, image[:-1])
                    logits = unconditional + scale * (logits - unconditional)
                logps = (logits / 0.8).log_softmax(-1).gather(1, image[:, None])[:, 0]
                torch.testing.assert_close(got.logps[p, g].double(), logps, **tolerance(scale, 0.8))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_log_probabilities_are_those_of_score(policy: JanusPolicy, scale: float) -> None:
    prompt, samples = drawn(policy, sampler(scale))
    assert samples.plans is not None
    with torch.no_grad():
        replayed = policy.score(
            prompt,
            samples.tokens,
            guidance_scale=scale,
            temperature=1.0,
            plans=samples.plans,
            plan_temperature=1.3,
        )
    assert replayed.plan is not None
    torch.testing.assert_close(samples.logps, replayed.logps, **tolerance(scale))
    torch.testing.assert_close(samples.plans.logps, replayed.plan.logps, **tolerance(1.0))
    assert samples.plans.logps.std() > 0.1


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_sample_does_not_depend_on_its_batch(policy: JanusPolicy, scale: float) -> None:
    """Plans, images and scores of a prompt alone, and of two in another order."""
    how = sampler(scale)
    prompt, whole = drawn(policy, how)
    settings: dict[str, Any] = {"guidance_scale": scale, "temperature": 1.0, "plan_temperature": 1.0}
    assert whole.plans is not None
    with torch.no_grad():
        scores = policy.score(prompt, whole.tokens, plans=whole.plans, **settings)
        for order in ((0,), (3, 1)):
            asked, part = drawn(policy, how, order)
            assert part.plans is not None and scores.plan is not None
            rows = list(order)
            assert torch.equal(part.plans.tokens, whole.plans.tokens[rows])
            assert torch.equal(part.tokens, whole.tokens[rows])
            torch.testing.assert_close(part.plans.logps, whole.plans.logps[rows], **tolerance(1.0))
            torch.testing.assert_close(part.logps, whole.logps[rows], **tolerance(scale))
            alone = policy.score(asked, part.tokens, plans=part.plans, **settings)
            assert alone.plan is not None
            torch.testing.assert_close(alone.plan.logps, scores.plan.logps[rows], **tolerance(1.0))
            torch.testing.assert_close(alone.logps, scores.logps[rows], **tolerance(scale))


def test_the_image_depends_on_its_plan_and_the_free_rows_do_not(policy: JanusPolicy) -> None:
    prompt, samples = drawn(policy, sampler(2.0))
    assert samples.plans is not None
    rows = policy.with_plans(prompt, samples.plans)
    other = replace(samples.plans, tokens=samples.plans.tokens.roll(1, 1) * samples.plans.mask)
    moved = policy.with_plans(prompt, other)
    assert torch.equal(rows.unconditional_ids, moved.unconditional_ids)
    kept = rows.unconditional_ids[rows.unconditional_ids != PAD]
    assert kept.tolist() == [BOS, BOI] * (len(PROMPTS) * GROUP)
    with torch.no_grad():
        before, after = (
            policy.score(
                prompt,
                samples.tokens,
                guidance_scale=1.0,
                temperature=1.0,
                plans=plans,
                plan_temperature=1.0,
            )
            for plans in (samples.plans, other)
        )
    assert (before.logps - after.logps).abs().max() > 1e-2


def test_gradient_is_that_of_a_plain_loop(random_checkpoint: Path) -> None:
    """Weighted log-probabilities of words and image tokens, a row at a time, with softmaxes in float64."""
    policy = load(random_checkpoint)
    prompt, samples = drawn(policy, sampler())
    assert samples.plans is not None
    torch.manual_seed(0)
    image_weights, word_weights = torch.randn(samples.tokens.shape), torch.randn(samples.plans.tokens.shape)
    scores = policy(
        prompt,
        samples.tokens,
        guidance_scale=1.0,
        temperature=1.0,
        plans=samples.plans,
        plan_temperature=0.7,
    )
    ((scores.logps * image_weights).sum() + (scores.plan.logps * word_weights).sum()).backward()
    got = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for p, text in enumerate(PROMPTS):
        for g in range(GROUP):
            start, plan = row(policy, text), own(samples.plans, p, g)
            words = (text_logits(policy, start + plan)[len(start) - 1 : -1] / 0.7).log_softmax(-1)
            chosen = words.gather(1, torch.tensor(plan)[:, None])[:, 0]
            image = samples.tokens[p, g]
            logps = row_logits(policy, torch.tensor([*start, *plan, BOI]), image[:-1]).log_softmax(-1)
            total = (chosen * word_weights[p, g, : len(plan)]).sum()
            (total + (logps.gather(1, image[:, None])[:, 0] * image_weights[p, g]).sum()).backward()
    wanted = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and any("q_proj" in name for name in got)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_a_frozen_text_head_passes_the_gradient_on(tmp_path: Path) -> None:
    path = build_tiny_janus(tmp_path, tied=False)
    policy = load_policy(str(path), ASKING, "float32", ("lm_head",), False)
    prompt, samples = drawn(policy, sampler())
    scores = policy.score(
        prompt,
        samples.tokens,
        guidance_scale=1.0,
        temperature=1.0,
        plans=samples.plans,
        plan_temperature=1.0,
    )
    assert scores.plan is not None
    scores.plan.logps.sum().backward()
    assert policy.model.lm_head.weight.grad is None
    layers: Any = policy.language_model.layers
    assert layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_noise_of_plans_and_images_is_independent(policy: JanusPolicy) -> None:
    how = sampler()
    found = drawing.noise(policy, how, 5, 2, [7, 8], 2)
    assert found.plan is not None and found.plan.shape == (2, 2, LONGEST)
    assert torch.equal(found.image, uniforms(5, 2, [7, 8], 2, policy.num_image_tokens))
    assert not (found.plan == found.image[..., :LONGEST]).any()
    alone = drawing.noise(policy, how, 5, 2, [8], 1)
    assert alone.plan is not None and torch.equal(alone.plan[0, 0], found.plan[1, 0])


def test_without_reasoning_nothing_is_planned(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of reasoning may stand in the sampler: what is drawn is bit for bit what the sampler draws alone."""

    def never(*_: Any) -> None:
        raise AssertionError("a plan was drawn")

    monkeypatch.setattr(drawing, "draw_plans", never)
    how = sampler(2.0, reasoning=None)
    prompt, samples = drawn(policy, how)
    noise = uniforms(5, 2, range(4), GROUP, policy.num_image_tokens)
    alone = Sampler(2.0, 1.0)(policy, policy.tokenize(PROMPTS), noise)
    assert samples.plans is None and torch.equal(prompt.ids, policy.tokenize(PROMPTS).ids)
    assert torch.equal(samples.tokens, alone.tokens) and torch.equal(samples.logps, alone.logps)


def test_plans_as_words(policy: JanusPolicy) -> None:
    words = policy.tokenizer.get_vocab()
    plans = Plans(
        tokens=torch.tensor([[[words["two"], words["red"], EOS], [words["green"], PAD, PAD]]]),
        mask=torch.tensor([[[1, 1, 1], [1, 0, 0]]]),
        logps=torch.zeros(1, 2, 3),
    )
    assert plan_texts(policy, plans) == [["two red", "green"]]


def test_several_end_tokens(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    """Each of them ends a plan and stays in it; the tokenizer's is the one where the model names none."""
    plans = draw_plans(policy, plan_prompt(policy, PROMPTS), noise(16), 2.0)
    ended = plans.mask.sum(-1) < LONGEST
    last = plans.tokens.gather(-1, plans.mask.sum(-1, keepdim=True) - 1)[..., 0]
    assert set(last[ended].tolist()) == set(ENDS)
    policy.model.generation_config.eos_token_id = None
    assert end_tokens(policy) == (EOS,)


def test_sampling_stops_when_every_plan_has_ended(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word is an end here, so nothing comes after the first."""
    monkeypatch.setattr("stage.policy.plans.end_tokens", lambda _: tuple(range(40)))
    runs = count_words(policy, monkeypatch)
    plans = draw_plans(policy, plan_prompt(policy, PROMPTS), noise(), 1.0)
    assert len(runs) == 1 and (plans.mask.sum(-1) == 1).all()


def test_weights_that_are_gathered_when_read_are_read_to_the_longest_length(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have a longer plan, and waits for this one at each of its words. The plans are the same."""
    prompt, numbers = plan_prompt(policy, PROMPTS[:1]), noise(4)[:1]
    ends = tuple(draw_plans(policy, prompt, numbers, 1.0).tokens[0, :, 1].tolist())
    monkeypatch.setattr("stage.policy.plans.end_tokens", lambda _: ends)
    expected = draw_plans(policy, prompt, numbers, 1.0)
    monkeypatch.setattr(policy, "rollout_weights", VisitingWeights(policy.language_model, torch.float32))
    runs = count_words(policy, monkeypatch)
    found = draw_plans(policy, prompt, numbers, 1.0)
    assert len(runs) == LONGEST and int(expected.mask.sum(-1).max()) < LONGEST
    assert found.tokens.equal(expected.tokens) and found.mask.equal(expected.mask)
    torch.testing.assert_close(found.logps, expected.logps)


def count_words(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every word that is drawn."""
    runs, plain = list[int](), policy.text_logits

    def counted(hidden: Tensor) -> Tensor:
        runs.append(1)
        return plain(hidden)

    monkeypatch.setattr(policy, "text_logits", counted)
    return runs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda policy: setattr(policy, "template", PLAIN), "needs the template's instruction"),
        (
            lambda policy: setattr(policy, "template", replace(ASKING, padding=ReleasedPadding())),
            "needs left padding; template 'asking' has ReleasedPadding",
        ),
        (
            lambda policy: setattr(policy.model.generation_config, "eos_token_id", 10_000),
            r"needs an end token among the \d+ words of the text head; got \(10000,\)",
        ),
    ],
)
def test_a_policy_that_cannot_plan(
    random_checkpoint: Path, change: Callable[[JanusPolicy], None], words: str
) -> None:
    policy = load(random_checkpoint)
    check_planner(policy)
    change(policy)
    with pytest.raises(ValueError, match=words):
        drawing.tokenize(policy, sampler(), PROMPTS)
    drawing.check(policy, Sampler(1.0, 1.0))  # without reasoning nothing is asked


def test_a_tokenizer_without_end_token(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    policy.model.generation_config.eos_token_id = None
    policy.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="got None"):
        check_planner(policy)


def test_a_diverged_policy_raises(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    with torch.no_grad():
        policy.language_model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="text logits"):
        draw_plans(policy, plan_prompt(policy, PROMPTS), noise(), 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reasoning": "image"}, "sampler.reasoning must be text or null"),
        ({"reasoning_weight": -1.0}, "reasoning_weight must be a number of at least 0"),
        ({"reasoning_weight": float("nan")}, "reasoning_weight must be a number of at least 0"),
        ({"max_plan_tokens": 0}, "max_plan_tokens must be a whole number of at least 1"),
        ({"max_plan_tokens": 2.5}, "max_plan_tokens must be a whole number"),
        ({"plan_temperature": None}, "plan_temperature must be a number of at least 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampler(**changes)


def test_no_record_is_shared_between_samples(policy: JanusPolicy) -> None:
    """What `draw` returns has the shapes of the legend, whatever the sampler was handed."""
    _, samples = drawn(policy, sampler())
    length = policy.num_image_tokens
    assert samples.tokens.shape == samples.logps.shape == (4, GROUP, length)
    assert samples.plans is not None
    shapes = []
    map_tensors(samples.plans, lambda part: shapes.append(tuple(part.shape)))
    assert shapes == [(4, GROUP, LONGEST)] * 3
    assert Noise(torch.zeros(1, 1, 1)).plan is None
