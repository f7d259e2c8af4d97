"""The plan that a model writes before it draws: words of its text head, a plan of its own for every sample.

The text before a plan is the template's instruction with the prompt in it. The plan ends with the tokenizer's end
token, which stays in the context, or at its longest length; then come the image start token and the image. One
sequence, so that one teacher-forced forward scores words and image (`JanusPolicy.score`). T2I-R1 (arXiv 2505.00703)
and the published STAGE code differ: they put the decoded words into a second prompt and score each by a forward of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stage.policy.decoder import CachedDecoder, compute_dtype, find_prefixes, text_logits
from stage.policy.draws import inverse_cdf
from stage.policy.janus import JanusPolicy
from stage.policy.padding import LeftPadding
from stage.policy.rollout_weights import VisitingWeights, rollout_weights
from stage.types import Plans, PromptTokens, map_tensors


def check_planner(policy: JanusPolicy) -> None:
    """Raise ValueError where the policy cannot write plans.

    It needs an instruction in its template, left padding, and an end token that its text head can draw. The head may
    be frozen: the gradient of a plan's tokens flows through it into the language model.
    """
    policy.template.render_instruction("any")
    if not isinstance(policy.template.padding, LeftPadding):
        raise ValueError(
            "sampler.reasoning=text needs left padding; template "
            f"{policy.template.name!r} has {type(policy.template.padding).__name__}. Choose another model/template."
        )
    vocabulary = policy.model.lm_head.out_features
    ends = end_tokens(policy)
    if not ends or not all(0 <= end < vocabulary for end in ends):
        raise ValueError(
            f"sampler.reasoning=text needs an end token among the {vocabulary} words of the text head; got "
            f"{ends or None}. Correct eos_token_id in generation_config.json, or set sampler.reasoning=null."
        )


def end_tokens(policy: JanusPolicy) -> tuple[int, ...]:
    """The tokens that end a plan: the generation config's, else the tokenizer's; empty where neither has one."""
    config: Any = policy.model.generation_config
    found = config.eos_token_id if config.eos_token_id is not None else policy.tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, Sequence) else (found,)


def plan_prompt(policy: JanusPolicy, texts: Sequence[str]) -> PromptTokens:
    """P prompts in the template's instruction to left-padded tokens `[P, T]`, which end where the plans begin.

    Raises ValueError for a template without an instruction, and what `JanusPolicy.encode` raises.
    """
    rendered = [policy.template.render_instruction(text) + policy.tokenizer.boi_token for text in texts]
    return map_tensors(policy.encode(rendered), lambda part: part[:, :-1])


def plan_texts(policy: JanusPolicy, plans: Plans) -> list[list[str]]:
    """The words of each plan, `[P][G]`, without special tokens, in one line each."""
    decode: Any = policy.tokenizer.decode
    return [
        [
            " ".join(decode(tokens[mask.bool()].tolist(), skip_special_tokens=True).split())
            for tokens, mask in zip(*group, strict=True)
        ]
        for group in zip(plans.tokens.cpu(), plans.mask.cpu(), strict=True)
    ]


@torch.no_grad()
def draw_plans(policy: JanusPolicy, prompt: PromptTokens, uniforms: Tensor, temperature: float) -> Plans:
    """A plan for each row of `uniforms` `[P, G, R]`, all in [0, 1), from softmax(text logits / temperature).

    A plan is a function of its prompt and its own uniforms. The prompt is run once for its G plans; sampling stops
    when all plans have ended.

    Args:
        prompt: `[P, T]`, made by `plan_prompt`.
        temperature: 0 takes the most likely word, with log-probability 0.

    Raises FloatingPointError if the text logits are not finite.
    """
    draws = uniforms.flatten(0, 1).to(policy.device, non_blocking=True)
    dtype = compute_dtype(policy)
    with torch.autocast(policy.device.type, enabled=False):
        tokens, seen, logps = _write(policy, prompt, draws, uniforms.shape[1], temperature, dtype)
    if not logps.isfinite().all():
        raise FloatingPointError(
            "planning needs finite text logits; they were not. The policy has diverged or its dtype is too narrow: go "
            "back to a checkpoint, lower the learning rate, or use bfloat16 for float16."
        )
    return Plans(*(part.view(uniforms.shape) for part in (tokens, seen, logps)))


def _write(
    policy: JanusPolicy,
    prompt: PromptTokens,
    draws: Tensor,
    group: int,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probabilities of plans for uniforms `[P * G, R]`, `group` of them a prompt."""
    tokens = torch.full(draws.shape, policy.pad_token_id, device=policy.device)
    seen, logps = torch.zeros_like(tokens), torch.zeros(draws.shape, device=policy.device)
    ends = torch.tensor(end_tokens(policy), device=policy.device)
    going = torch.ones(len(draws), dtype=torch.bool, device=policy.device)
    embed = policy.model.get_input_embeddings()
    prefixes = find_prefixes(
        prompt.ids, embed(prompt.ids), prompt.mask, policy.position_ids, group, draws.shape[1] - 1
    )
    weights = rollout_weights(policy, dtype)
    # Weights that are gathered whenever they are read want every process in step, and others have longer plans.
    stops = not isinstance(weights, VisitingWeights)
    decoder = CachedDecoder(policy.language_model, weights, prefixes)
    hidden = decoder.start()
    for step in range(draws.shape[1]):
        if step > 0:  # what stands behind the end of a plan is run too, and nobody looks at it
            hidden = decoder.step(embed(tokens[:, step - 1]).to(dtype))
        token, logp = inverse_cdf(text_logits(policy, hidden).float(), draws[:, step], temperature)
        tokens[:, step] = torch.where(going, token, policy.pad_token_id)
        logps[:, step] = logp.masked_fill(~going, 0.0)
        seen[:, step] = going
        going = going & ~torch.isin(token, ends)
        if stops and not going.any():
            break
    return tokens, seen, logps
