"""Fixed-length guided sampling of image tokens with a static key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage.policy.decoder import CachedDecoder, Prefixes, compute_dtype, find_prefixes, image_logits
from stage.policy.draws import inverse_cdf
from stage.policy.janus import JanusPolicy
from stage.policy.rollout_weights import VisitingWeights, rollout_weights
from stage.policy.variation import Variation
from stage.types import PromptTokens, Samples


@dataclass(frozen=True)
class Setting:
    """Guidance scale and temperature of a call: one number for all images, or a tensor `[N]`, one an image."""

    guidance_scale: float | Tensor
    temperature: float | Tensor

    @property
    def varies(self) -> bool:
        """Whether images have settings of their own."""
        return isinstance(self.guidance_scale, Tensor) or isinstance(self.temperature, Tensor)


Decode = Callable[[JanusPolicy, Prefixes, Tensor, torch.dtype, Setting], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sampler:
    """Draws G images a prompt, token by token, from softmax(guided logits / temperature).

    guidance_scale: s in u + s (c - u) of conditional and unconditional logits; at 1 no unconditional row is run.
    temperature: divides the guided logits; 0 takes the most likely token, with log-probability 0.
    reasoning: `text` lets the model write a plan before each image (`stage.policy.drawing`), None does not. The rest
        is read with `text` alone: reasoning_weight of the plans' term in the loss, max_plan_tokens (R), and
        plan_temperature, which divides the logits of the text head and is 0 for the most likely word.
    variation: how far guidance and temperature of training samples stray from these; None keeps them.

    Raises ValueError for a guidance scale below 1, a negative temperature, one of 0 that is to vary, or settings of
    reasoning out of range.
    """

    guidance_scale: float
    temperature: float
    reasoning: str | None = None
    reasoning_weight: float | None = None
    max_plan_tokens: int | None = None
    plan_temperature: float | None = None
    variation: Variation | None = None
    _graphs: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

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
        if self.variation is not None and self.temperature == 0:
            raise ValueError(
                "a temperature that varies must be above 0; got sampler.temperature=0, the most likely token. "
                "Raise it, or leave sampler/variation out."
            )
        if self.reasoning is not None:
            self._check_reasoning()

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are run in training."""
        return self.guidance_scale != 1 or (self.variation is not None and self.variation.guidance_spread > 0)

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
    def __call__(
        self,
        policy: JanusPolicy,
        prompt: PromptTokens,
        uniforms: Tensor,
        guidance_scale: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Samples:
        """One token for each number of `uniforms` `[P, G, L]`, all in [0, 1).

        `guidance_scale` and `temperature` `[P, G]`, at least 1 and above 0, stand in for the sampler's own.

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
        dtype = compute_dtype(policy)
        with torch.autocast(policy.device.type, enabled=False):
            setting = Setting(
                self.guidance_scale if guidance_scale is None else _row_each(guidance_scale, policy.device),
                self.temperature if temperature is None else _row_each(temperature, policy.device),
            )
            prefixes = self._prefixes(policy, prompt, group, length, setting)
            draws = uniforms.to(policy.device, non_blocking=True).flatten(0, 1)
            tokens, logps = self._decoder(policy, dtype, setting)(policy, prefixes, draws, dtype, setting)
        _check_finite(logps)
        return Samples(tokens.view(uniforms.shape), logps.view(uniforms.shape))

    def release(self) -> None:
        """Give back the memory that is held on CUDA between rollouts; the next one takes it again."""
        self._graphs.clear()

    def __deepcopy__(self, memo: Any) -> Sampler:
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphs": []}

    def _prefixes(
        self,
        policy: JanusPolicy,
        prompt: PromptTokens,
        group: int,
        length: int,
        setting: Setting | None = None,
    ) -> Prefixes:
        scale = self.guidance_scale if setting is None else setting.guidance_scale
        embeddings, mask = policy.prompt_rows(prompt, scale)
        ids = torch.cat([prompt.ids, prompt.unconditional_ids])[: len(embeddings)]
        return find_prefixes(ids, embeddings, mask, policy.position_ids, group, length - 1)

    def _decoder(self, policy: JanusPolicy, dtype: torch.dtype, setting: Setting) -> Decode:
        """The fastest way to decode that these weights and this device allow."""
        if _has_graphs(policy):
            # Weights that are gathered whenever they are read have no address for a graph.
            visiting = isinstance(policy.rollout_weights, VisitingWeights)
            return self._decode if visiting else self._decode_graphed
        return self._decode_compiled if _has_compiled(policy, dtype, setting) else self._decode

    def _decode(
        self, policy: JanusPolicy, prefixes: Prefixes, draws: Tensor, dtype: torch.dtype, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities `[N, L]` for uniforms `[N, L]`, on any device."""
        model = policy.language_model
        decoder = CachedDecoder(model, rollout_weights(policy, dtype), prefixes)
        hidden = decoder.start()
        sides = len(hidden) // len(draws)
        table = policy.image_embeddings().to(dtype)
        tokens = torch.empty(draws.shape, dtype=torch.long, device=draws.device)
        logps = torch.empty(draws.shape, dtype=torch.float32, device=draws.device)
        for step in range(draws.shape[1]):
            if step > 0:
                hidden = decoder.step(table[tokens[:, step - 1]].repeat(sides, 1))
            logits = image_logits(policy, hidden, setting.guidance_scale).float()
            tokens[:, step], logps[:, step] = inverse_cdf(logits, draws[:, step], setting.temperature)
        return tokens, logps

    def _decode_graphed(
        self, policy: JanusPolicy, prefixes: Prefixes, draws: Tensor, dtype: torch.dtype, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        """The same in one CUDA graph a token, which is kept for the next rollout."""
        from stage.policy.graphed import GraphedDecoders  # Triton comes with torch for CUDA alone

        if not self._graphs:
            self._graphs.append(GraphedDecoders())
        decoders: GraphedDecoders = self._graphs[0]
        return decoders.run(policy, prefixes, draws, setting.guidance_scale, setting.temperature, dtype)

    def _decode_compiled(
        self, policy: JanusPolicy, prefixes: Prefixes, draws: Tensor, dtype: torch.dtype, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        """The same in compiled code, a few images at a time on every thread."""
        from stage.policy.cpu_decode import decode  # numba takes its time to import, and may be missing

        return decode(policy, prefixes, draws, float(setting.guidance_scale), float(setting.temperature))


def _row_each(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, torch.float32, non_blocking=True).flatten()


def _has_graphs(policy: JanusPolicy) -> bool:
    return policy.device.type == "cuda" and torch.version.cuda is not None and find_spec("triton") is not None


def _has_compiled(policy: JanusPolicy, dtype: torch.dtype, setting: Setting) -> bool:
    # Settings that vary from row to row, and weights that a sharded policy brings along, are left to torch.
    if policy.device.type != "cpu" or setting.varies or policy.rollout_weights is not None:
        return False
    if find_spec("numba") is None:
        return False
    from stage.policy.cpu_decode import can_decode

    return can_decode(policy, dtype)


def _check_finite(logps: Tensor) -> None:
    # Once an image: a check at every token would make a GPU wait.
    bad = int((~logps.isfinite()).any(1).sum())
    if bad:
        raise FloatingPointError(
            f"sampling needs finite logits; they were not for {bad} of {len(logps)} images. The policy has diverged "
            "or its dtype is too narrow: go back to a checkpoint, lower the learning rate, or use bfloat16 for float16."
        )


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
