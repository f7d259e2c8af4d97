"""Left padding makes an image independent of its batch; the release's padding does what the published code does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.padding import LeftPadding, ReleasedPadding
from stage.policy.sampler import Sampler, uniforms
from stage.types import PromptTokens
from tests.policy.conftest import PLAIN, PROMPTS
from tests.policy.reference import prompt_ids, tolerance
from tests.policy.tiny_model import BOI, BOS, PAD

RELEASED = replace(PLAIN, padding=ReleasedPadding())
NEIGHBOUR = 1e-5  # how far log-probabilities may move with the batch, nats
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def released(random_checkpoint: Path) -> JanusPolicy:
    return load_policy(str(random_checkpoint), RELEASED, "float32", (), False)


@pytest.fixture(scope="module")
def left(random_checkpoint: Path) -> JanusPolicy:
    return load_policy(str(random_checkpoint), PLAIN, "float32", (), False)


def test_two_rows_by_hand() -> None:
    """bos 1, words 7 8 9, image start 4, padding 0; a prompt of three words beside one of one."""
    prompt = PromptTokens(
        ids=torch.tensor([[1, 7, 8, 9, 4], [0, 0, 1, 7, 4]]),
        unconditional_ids=torch.tensor([[1, 0, 0, 0, 4], [0, 0, 1, 0, 4]]),
        mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    )
    got = ReleasedPadding().arrange(prompt, 0)
    assert got.ids.tolist() == [[1, 7, 8, 9, 4], [1, 7, 0, 0, 4]]
    assert got.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
    assert got.unconditional_ids.tolist() == [[1, 0, 0, 0, 4]] * 2
    assert got.unconditional_mask is not None and got.unconditional_mask.tolist() == [[1] * 5] * 2
    assert ReleasedPadding().positions(got.mask).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert LeftPadding().arrange(prompt, 0) is prompt
    assert LeftPadding().positions(prompt.mask).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def published_logits(policy: JanusPolicy, row: int, tokens: Tensor, scale: float) -> Tensor:
    """Float64 `[n + 1, V]` as krennic999/STAGE computes them for a row of the batch: transformers' own mask and
    positions for right-padded prompts and one image start token behind them."""
    words = [prompt_ids(policy, text)[:-1].tolist() for text in PROMPTS]
    width = max(map(len, words))
    padding = width - len(words[row])
    ids = torch.tensor([*words[row], *[PAD] * padding, BOI])
    seen = torch.tensor([*[1] * len(words[row]), *[0] * padding, 1, *[1] * len(tokens)])
    free = torch.tensor([BOS, *[PAD] * (width - 1), BOI])
    found = []
    for row_ids, mask in ((ids, seen), (free, torch.ones_like(seen))):
        text = policy.model.get_input_embeddings()(row_ids)
        image = policy.model.prepare_embeddings_for_image_generation(tokens)
        hidden = policy.language_model(
            inputs_embeds=torch.cat([text, image])[None], attention_mask=mask[None], use_cache=False
        ).last_hidden_state[0]
        found.append(policy.model.model.generation_head(hidden[width:]).double())
    conditional, unconditional = found
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scores_are_those_of_the_published_padding(released: JanusPolicy, scale: float) -> None:
    prompt = released.tokenize(PROMPTS)
    samples = Sampler(scale, 1.0)(released, prompt, uniforms(1, 0, range(4), 2, released.num_image_tokens))
    with torch.no_grad():
        got = released.score(prompt, samples.tokens, guidance_scale=scale, temperature=1.0)
        for p in range(len(PROMPTS)):
            for g in range(2):
                image = samples.tokens[p, g]
                logps = published_logits(released, p, image[:-1], scale).log_softmax(-1)
                chosen = logps.gather(1, image[:, None])[:, 0]
                torch.testing.assert_close(got.logps[p, g].double(), chosen, **tolerance(scale))
    # The sampler's cache sees the same mask and the same positions.
    torch.testing.assert_close(samples.logps, got.logps, **tolerance(scale))


def test_greedy_tokens_are_those_of_the_published_padding(released: JanusPolicy) -> None:
    scale, prompt = 3.0, released.tokenize(PROMPTS)
    noise = uniforms(1, 0, range(4), 1, released.num_image_tokens)
    tokens = Sampler(scale, 0.0)(released, prompt, noise).tokens
    with torch.no_grad():
        for p in range(len(PROMPTS)):
            logits = published_logits(released, p, tokens[p, 0, :-1], scale)
            best = logits.topk(2, -1).values
            clear = best[:, 0] - best[:, 1] > NEAR_TIE
            assert clear.float().mean() > 0.9
            assert torch.equal(tokens[p, 0][clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_alone_or_longest_both_paddings_agree(released: JanusPolicy, left: JanusPolicy, scale: float) -> None:
    """One prompt a process, as the release trains: what holds there holds for left padding, bit for bit."""
    torch.manual_seed(0)
    tokens = torch.randint(left.codebook_size, (1, 2, left.num_image_tokens))
    longest = max(range(len(PROMPTS)), key=lambda p: len(prompt_ids(left, PROMPTS[p])))
    with torch.no_grad():
        for text in PROMPTS:
            one, two = (
                policy.score(policy.tokenize([text]), tokens, guidance_scale=scale, temperature=1.0).logps
                for policy in (left, released)
            )
            assert torch.equal(one, two)
        many = tokens.expand(len(PROMPTS), -1, -1)
        one, two = (
            policy.score(policy.tokenize(PROMPTS), many, guidance_scale=scale, temperature=1.0).logps
            for policy in (left, released)
        )
    torch.testing.assert_close(one[longest], two[longest], atol=2 * NEIGHBOUR * (2 * scale - 1), rtol=1e-6)
    assert (one - two).abs().amax(dim=(1, 2)).sort().values[1:].min() > 1e-2  # the shorter prompts differ


def test_logits_do_not_depend_on_neighbours_with_left_padding(left: JanusPolicy) -> None:
    """Within 1e-5, with and without an unconditional row. With the release's padding they do, by far."""
    tokens = Sampler(1.0, 1.0)(
        left, left.tokenize(PROMPTS), uniforms(1, 0, range(4), 1, left.num_image_tokens)
    ).tokens

    def moved(policy: JanusPolicy, scale: float) -> float:
        """The largest difference of a prompt's log-probabilities between the batch and the prompt alone."""
        with torch.no_grad():
            whole = policy.score(policy.tokenize(PROMPTS), tokens, guidance_scale=scale, temperature=1.0)
            alone = [
                policy.score(
                    policy.tokenize([text]), tokens[p : p + 1], guidance_scale=scale, temperature=1.0
                )
                for p, text in enumerate(PROMPTS)
            ]
        return float((whole.logps - torch.cat([part.logps for part in alone])).abs().max())

    # Guidance weighs the two rows by s and s - 1, and their rounding with them.
    assert moved(left, 1.0) <= NEIGHBOUR and moved(left, 3.0) <= 5 * NEIGHBOUR
    left.template = RELEASED
    try:
        assert moved(left, 1.0) > 0.1 and moved(left, 3.0) > 0.1
    finally:
        left.template = PLAIN


def test_greedy_tokens_do_not_depend_on_neighbours_with_left_padding(left: JanusPolicy) -> None:
    noise = uniforms(1, 0, range(4), 1, left.num_image_tokens)
    for scale in (1.0, 5.0):
        whole = Sampler(scale, 0.0)(left, left.tokenize(PROMPTS), noise).tokens
        for p, text in enumerate(PROMPTS):
            assert torch.equal(
                Sampler(scale, 0.0)(left, left.tokenize([text]), noise[:1]).tokens[0], whole[p]
            )


def test_the_named_template_has_it(root: Path) -> None:
    folder = root / "conf" / "model" / "template"
    templates = {path.stem: instantiate(OmegaConf.load(path)) for path in folder.glob("*.yaml")}
    assert {name for name, found in templates.items() if found.padding == ReleasedPadding()} == {
        "release_padded"
    }
    assert all(name == found.name for name, found in templates.items())
    one, other = templates["release"], templates["release_padded"]
    assert (one.prefix, one.suffix) == (other.prefix, other.suffix)
