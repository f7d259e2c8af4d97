"""Fixed-length guided sampling of image tokens with a static key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel

from stage.policy.draws import inverse_cdf
from stage.policy.janus import JanusPolicy
from stage.types import PromptTokens, Samples


@dataclass(frozen=True)
class Sampler:
    """Draws G images a prompt, token by token, from softmax(guided logits / temperature).

    guidance_scale: s in u + s (c - u) of conditional and unconditional logits; at 1 no unconditional row is run.
    temperature: divides the guided logits; 0 takes the most likely token, with log-probability 0.
    reasoning: `text` lets the model write a plan before each image (`stage.policy.drawing`), None does not. The rest
        is read with `text` alone: reasoning_weight of the plans' term in the loss, max_plan_tokens (R), and
        plan_temperature, which divides the logits of the text head and is 0 for the most likely word.

    Raises ValueError for a guidance scale below 1, a negative temperature, or settings of reasoning out of range.
    """

    guidance_scale: float
    temperature: float
    reasoning: str | None = None
    reasoning_weight: float | None = None
    max_plan_tokens: int | None = None
    plan_temperature: float | None = None

    def __post_init__(self) -> None:
        if not self.guidance_scale >= 1:
            raise ValueError(
                f"guidance_scale must be at least 1, where 1 is no guidance; got {self.guidance_scale}. "
                "Set 1.0 to sample from the conditional distribution."
            )
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature must not be negative; got {self.temperature}. "
                "Set 1.0 for the model's own distribution, or 0 for the most likely token."
            )
        if self.reasoning is not None:
            self._check_reasoning()

    def _check_reasoning(self) -> None:
        if self.reasoning != "text":
            raise ValueError(
                f"sampler.reasoning must be text or null; got {self.reasoning!r}. Name one of them."
            )
        for name, least in (("reasoning_weight", 0), ("max_plan_tokens", 1), ("plan_temperature", 0)):
            value = getattr(self, name)
            kind = int if name == "max_plan_tokens" else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < float("inf"):
                number = "a whole number" if kind is int else "a number"
                raise ValueError(
                    f"sampler.{name} must be {number} of at least {least} with reasoning; got {value!r}. Set it."
                )

    @torch.no_grad()
    def __call__(self, policy: JanusPolicy, prompt: PromptTokens, uniforms: Tensor) -> Samples:
        """One token for each number of `uniforms` `[P, G, L]`, all in [0, 1).

        A sample is a function of its prompt and its own row of `uniforms`; the rest of the batch does not enter.
        The prompt is run once for each of the P groups, never for each of the G samples.

        Raises ValueError if `uniforms` are of another number of prompts or image tokens, FloatingPointError if the
        model's logits are not finite.
        """
        prompts, group, length = uniforms.shape
        if (prompts, length) != (len(prompt.ids), policy.num_image_tokens):
            raise ValueError(
                f"uniforms must be [{len(prompt.ids)}, group, {policy.num_image_tokens}] for these prompts and this "
                f"model; got {list(uniforms.shape)}. Draw them with stage.policy.sampler.uniforms."
            )
        embeddings, mask = policy.prompt_rows(prompt, self.guidance_scale)
        decoder = CachedDecoder(policy.language_model, mask, policy.position_ids, group, length - 1)
        hidden = decoder.prefill(embeddings)
        sides = len(embeddings) // prompts
        table = policy.image_embeddings()
        draws = uniforms.to(policy.device).flatten(0, 1)
        tokens = torch.empty(draws.shape, dtype=torch.long, device=policy.device)
        logps = torch.empty(draws.shape, dtype=torch.float32, device=policy.device)
        for step in range(length):
            if step > 0:
                hidden = decoder.step(table[tokens[:, step - 1]].repeat(sides, 1))
            logits = policy.image_logits(hidden, self.guidance_scale).float()
            tokens[:, step], logps[:, step] = inverse_cdf(logits, draws[:, step], self.temperature)
        _check_finite(logps)
        return Samples(tokens.view(uniforms.shape), logps.view(uniforms.shape))


def _check_finite(logps: Tensor) -> None:
    # Once an image: a check at every token would make a GPU wait.
    bad = int((~logps.isfinite()).any(1).sum())
    if bad:
        raise FloatingPointError(
            f"sampling needs finite logits; they were not for {bad} of {len(logps)} images. The policy has diverged "
            "or its dtype is too narrow: go back to a checkpoint, lower the learning rate, or use bfloat16 for float16."
        )


class CachedDecoder:
    """A Llama of transformers run over preallocated keys and values, for R left-padded prompts of G samples each.

    It calls the projections and norms of the model's own modules, so it always sees their present weights. Keys
    and values are plain attributes: no checkpoint and no copy of a module holds them.
    """

    def __init__(
        self,
        model: LlamaModel,
        mask: Tensor,
        position_ids: Callable[[Tensor], Tensor],
        group: int,
        steps: int,
    ) -> None:
        """`mask` `[R, T]` is 1 on the real tokens of the prompts; up to `steps` tokens follow them, S = T + steps."""
        self.model, self.group, self.filled = model, group, 0
        mask = F.pad(mask, (0, steps), value=1)
        cos, sin = model.rotary_emb(model.embed_tokens.weight, position_ids(mask))
        # Rotation is x cos + swap(x) sin with the halves of x swapped, so the first half of sin carries the sign.
        first, second = sin.chunk(2, -1)
        self.rope = cos.unsqueeze(2), torch.cat([-first, second], -1).unsqueeze(2)  # two of [R, S, 1, D]
        self.blocked = ~mask.bool()[:, None, None]  # padding, [R, 1, 1, S]
        self.padded = bool(self.blocked.any())
        self.keys: list[Tensor] = []  # one [R, heads, T, D] a layer; after the prompt [R * G, heads, S, D]
        self.values: list[Tensor] = []
        self.bias: Tensor  # what hides padding from a step, [R * G, 1, 1, S]

    def prefill(self, embeddings: Tensor) -> Tensor:
        """Run the prompts, embeddings `[R, T, D]`; returns the last hidden state of every sample, `[R * G, D]`."""
        config: Any = self.model.config
        rows, length, _ = embeddings.shape
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = [embeddings.new_empty(shape) for _ in self.model.layers]
        self.values = [embeddings.new_empty(shape) for _ in self.model.layers]
        later = torch.ones(length, length, dtype=torch.bool, device=embeddings.device).triu(1)
        # Padding still attends to itself: a softmax over no key at all would be NaN.
        others = ~torch.eye(length, dtype=torch.bool, device=embeddings.device)
        hidden = self._run(embeddings, _bias((later | self.blocked[..., :length]) & others, embeddings))
        self._expand()
        return hidden[:, -1].repeat_interleave(self.group, 0)

    def step(self, embeddings: Tensor) -> Tensor:
        """Run the next token of every sample, embeddings `[R * G, D]`; returns hidden states `[R * G, D]`."""
        bias = self.bias[..., : self.filled + 1] if self.padded else None
        return self._run(embeddings.unsqueeze(1), bias)[:, 0]

    def _expand(self) -> None:
        """Copy each prompt to its G samples, with room for the tokens to come."""
        total = self.blocked.shape[-1]
        for cache in (self.keys, self.values):
            for layer, prompt in enumerate(cache):
                rows, heads, length, size = prompt.shape
                room = prompt.new_empty(rows, self.group, heads, total, size)
                room[:, :, :, :length] = prompt.unsqueeze(1)
                cache[layer] = room.flatten(0, 1)
        cos, sin = self.rope
        self.rope = cos.repeat_interleave(self.group, 0), sin.repeat_interleave(self.group, 0)
        self.bias = _bias(self.blocked.repeat_interleave(self.group, 0), self.keys[0])

    def _run(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """n new tokens a row, `[rows, n, D]` to `[rows, n, D]`, appended to the cache."""
        columns = slice(self.filled, self.filled + hidden.shape[1])
        cos, sin = (part[:, columns] for part in self.rope)
        layers: Iterable[Any] = self.model.layers
        for index, layer in enumerate(layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            heads = (*normed.shape[:2], -1, attention.head_dim)
            query = _rotate(attention.q_proj(normed).view(heads), cos, sin)
            self.keys[index][:, :, columns] = _rotate(
                attention.k_proj(normed).view(heads), cos, sin
            ).transpose(1, 2)
            self.values[index][:, :, columns] = attention.v_proj(normed).view(heads).transpose(1, 2)
            keys, values = (cache[index][:, :, : columns.stop] for cache in (self.keys, self.values))
            hidden = hidden + attention.o_proj(_attend(query, keys, values, bias, attention.scaling))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.filled = columns.stop
        return self.model.norm(hidden)


def _bias(blocked: Tensor, like: Tensor) -> Tensor:
    """What is added to attention scores: -inf where `blocked`, else 0, in the type of `like`."""
    return torch.zeros(blocked.shape, dtype=like.dtype, device=like.device).masked_fill_(blocked, -torch.inf)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[rows, n, heads, D]`; `sin` has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention: query `[rows, n, heads, D]` over keys and values `[rows, kv heads, S, D]`.

    Returns `[rows, n, heads * D]`. Query heads that share a key head become more query positions of that head, so
    keys are never repeated.
    """
    rows, length, heads, _ = query.shape
    repeats = heads // keys.shape[1]
    query = query.unflatten(2, (-1, repeats)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if bias is not None and length > 1:
        bias = bias.repeat(1, 1, repeats, 1)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    return out.unflatten(2, (repeats, length)).permute(0, 3, 1, 2, 4).reshape(rows, length, -1)


def uniforms(
    seed: int, update: int, prompt_ids: Sequence[int], group: int, length: int, domain: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[P, group, length]`, from a counter-based generator (Philox).

    Row (p, g) is a function of (seed, update, prompt_ids[p], g) alone, so a sample does not depend on the batch,
    its order, or the rank that draws it. A prompt that is twice in a batch gets the same numbers twice. Numbers of
    another `domain`, which what is drawn with them has for itself, are independent of these.

    Raises ValueError for a seed, update or prompt id outside [0, 2**64).
    """
    rows = [
        _uniform_row((seed, update, prompt, sample, *((domain,) if domain else ())), length)
        for prompt in prompt_ids
        for sample in range(group)
    ]
    return torch.from_numpy(np.stack(rows)).view(len(prompt_ids), group, length)


def _uniform_row(key: tuple[int, ...], length: int) -> np.ndarray:
    if not all(0 <= part < 2**64 for part in key):
        raise ValueError(
            f"seed, update, prompt id and sample must be in [0, 2**64); got {key}. Use a non-negative seed."
        )
    # Two 32-bit words a number: SeedSequence joins the words of its numbers, and (2**32, 1) must not be (0, 1, 1).
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).random(length)
