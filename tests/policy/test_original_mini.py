"""A small Janus in the original layout gives what the original implementation gave."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stage.policy.checkpoint import load_model
from stage.policy.convert import convert
from stage.policy.forms import MULTI_MODALITY, TRANSFORMERS
from stage.policy.janus import JanusPolicy
from stage.policy.layout import open_folder
from stage.policy.sampler import Sampler
from stage.types import PromptTokens
from tests.policy.conftest import PLAIN


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "janus_mini_multi_modality"


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module", params=[MULTI_MODALITY, TRANSFORMERS])
def policy(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> JanusPolicy:
    """The model as it came, and converted; it has no tokenizer, so its two special tokens are stated."""
    folder = golden
    if request.param == TRANSFORMERS:
        folder = tmp_path_factory.mktemp("converted") / "mini"
        convert(golden, folder, TRANSFORMERS)
    model = load_model(open_folder(folder), torch.float32)
    pad = json.loads((golden / "meta.json").read_text())["pad_id"]
    return JanusPolicy(model, SimpleNamespace(bos_token_id=1, pad_token_id=pad), PLAIN)


def prompts(policy: JanusPolicy, expected: dict[str, Tensor]) -> PromptTokens:
    """The note of meta.json: unconditional rows keep the first and last token, and nothing is masked."""
    ids = expected["prompt_ids"]
    unconditional = ids.clone()
    unconditional[:, 1:-1] = policy.pad_token_id
    return PromptTokens(ids, unconditional, torch.ones_like(ids))


def test_greedy_guided_tokens(policy: JanusPolicy, expected: dict[str, Tensor]) -> None:
    uniforms = torch.zeros(3, 1, policy.num_image_tokens, dtype=torch.float64)
    drawn = Sampler(guidance_scale=5.0, temperature=0.0)(policy, prompts(policy, expected), uniforms)
    assert torch.equal(drawn.tokens[:, 0], expected["greedy_tokens"])


def test_conditional_logits(policy: JanusPolicy, expected: dict[str, Tensor]) -> None:
    prompt, tokens = prompts(policy, expected), expected["greedy_tokens"]
    text, _ = policy.prompt_rows(prompt, 1.0)
    image = policy.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    hidden = policy.language_model(inputs_embeds=torch.cat([text, image], 1)).last_hidden_state
    logits = policy.image_logits(hidden[:, text.shape[1] - 1 :], 1.0)
    torch.testing.assert_close(logits, expected["conditional_logits"], rtol=0, atol=1e-4)
    scores = policy.score(prompt, tokens[:, None], guidance_scale=1.0, temperature=1.0)
    wanted = expected["conditional_logits"].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(scores.logps[:, 0], wanted, rtol=0, atol=1e-4)


def test_pixels_and_image_features(policy: JanusPolicy, expected: dict[str, Tensor]) -> None:
    with torch.no_grad():
        pixels = policy.model.decode_image_tokens(expected["greedy_tokens"]).permute(0, 3, 1, 2)
        found: Any = policy.model.model.get_image_features(expected["pixel_values"])
    torch.testing.assert_close(pixels, expected["decoded"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pooler_output, expected["image_features"], rtol=0, atol=1e-4)


def test_head_and_embedding_are_two(policy: JanusPolicy, golden: Path) -> None:
    stored = load_file(golden / "model.safetensors")
    model: Any = policy.model
    embedding, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    assert torch.equal(embedding, stored["language_model.model.embed_tokens.weight"].float())
    assert torch.equal(head, stored["language_model.lm_head.weight"].float())
    assert not torch.equal(embedding, head)
