"""The policy: transformers' Janus as a distribution over image tokens given a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration, JanusImageProcessor, JanusProcessor, LlamaModel

from stage.objective.distributions import Comparison, linear_divergence
from stage.objective.logprobs import linear_token_scores
from stage.paths import model_folder
from stage.policy import pictures
from stage.policy.attention import check_attention, set_attention
from stage.policy.checkpoint import read_checkpoint, resolve_dtype
from stage.policy.lora import Lora, NoAdapter
from stage.policy.plan_layout import append_plans, before_plans
from stage.policy.template import Template
from stage.types import Plans, PromptTokens, TokenScores, map_tensors


def load_policy(
    path: str,
    template: Template,
    dtype: str,
    freeze: Sequence[str],
    gradient_checkpointing: bool,
    adapter: Lora | NoAdapter | None = None,
    attention: str = "sdpa",
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> JanusPolicy:
    """A policy from a checkpoint, ready to train: what conf/model/*.yaml instantiates.

    Args:
        path: folder in the layout of transformers or of the original, `package://stage/...` for one inside the
            package, or a hub repository `owner/name`; see `stage.paths.model_folder`.
        template: words put around every prompt.
        dtype: type of weights and activations, `float32`, `bfloat16` or `float16`.
        freeze: modules that are not trained, named as in the checkpoint (`vision_model`, `generation_head`,
            `language_model.embed_tokens`, `lm_head`).
        gradient_checkpointing: recompute each layer of the language model in the backward pass.
        adapter: attaches what is trained in place of the weights (`stage.policy.lora`); None is no adapter.
        attention: kernel of the language model: `sdpa`, `eager`, or `flash_attention_2` and up where installed.
        revision, subfolder: of a hub repository.
        tokenizer: another folder or repository, for a checkpoint without tokenizer and processor files.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`, `check_attention` and `JanusPolicy.freeze`.
    """
    check_attention(attention, resolve_dtype(dtype))
    if adapter is not None:
        adapter.check(model_folder(path, revision, subfolder))
    checkpoint = read_checkpoint(
        path, resolve_dtype(dtype), revision=revision, subfolder=subfolder, tokenizer=tokenizer
    )
    policy = JanusPolicy(checkpoint.model, checkpoint.tokenizer, template, checkpoint.image_processor)
    set_attention(policy.language_model, attention)
    policy.freeze(freeze)
    if adapter is not None:
        adapter(policy)
    if gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy


class JanusPolicy(nn.Module):
    """Tokenizes prompts, scores image tokens with gradient, and decodes them to images.

    Attributes:
        rollout_weights: what a sampler reads in place of the parameters (`stage.policy.gathered`), None for these.
        grid: image tokens a side; num_image_tokens: L = grid², codebook_size: V, image_size: pixels a side.
    """

    rollout_weights: Any = None

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        tokenizer: Any,
        template: Template,
        image_processor: Any | None = None,
    ) -> None:
        """`image_processor` None stands for the one of Janus-Pro: pixels in [-1, 1], mean and std 0.5.

        Raises ValueError where the model's own numbers contradict each other, or for attention dropout: the
        sampler has none, so sampled and replayed log-probabilities would differ.
        """
        super().__init__()
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.gradient_checkpointing = False
        config: Any = model.config
        vq, vision, text = config.vq_config, config.vision_config, config.text_config
        self.grid: int = model.model.vqmodel.quantize.quant_state_dims[0]
        self.num_image_tokens: int = self.grid**2
        self.codebook_size: int = vq.num_embeddings
        self.image_size: int = self.grid * 2 ** (len(vq.channel_multiplier) - 1)
        self.image_processor = image_processor or JanusImageProcessor(
            size={"height": self.image_size, "width": self.image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self.bos_token_id: int = self._special_token("bos_token_id")
        self.pad_token_id: int = self._special_token("pad_token_id")
        if vision.num_image_tokens != self.num_image_tokens:
            raise ValueError(
                f"num_image_tokens must be the square of the VQ grid; got "
                f"{vision.num_image_tokens} and {self.grid} x {self.grid}. Correct config.json."
            )
        if text.attention_dropout != 0:
            raise ValueError(
                f"the language model must have no attention dropout; got {text.attention_dropout}. "
                "Set text_config.attention_dropout to 0 in config.json."
            )

    def _special_token(self, name: str) -> int:
        # The generation config comes first: it is what transformers' generate builds unconditional rows with.
        found = getattr(self.model.generation_config, name), getattr(self.tokenizer, name)
        given = [token for token in found if token is not None]
        if not given:
            raise ValueError(
                f"unconditional rows need {name}; neither the generation config nor the tokenizer has one. "
                "Add it to generation_config.json."
            )
        return given[0]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def language_model(self) -> LlamaModel:
        """The Llama without its text head, which image tokens do not need."""
        return self.model.model.language_model

    def freeze(self, names: Sequence[str]) -> None:
        """Stop the gradient of whole modules, named as in the checkpoint with the leading `model.` optional.

        A tied `lm_head` is the text embedding and trains or freezes under that name alone.

        Raises ValueError for a name that is no module of the model.
        """
        modules = dict(self.model.named_modules())
        parameters = dict(self.model.named_parameters())  # lists a shared tensor once, under its first name
        for name in names:
            full = name if name in modules else f"model.{name}"
            if full not in modules or not name:
                children = ", ".join(child for child, _ in self.model.model.named_children())
                raise ValueError(
                    f"freeze must name modules of the model; got {name!r}. The largest are: {children}, lm_head."
                )
            for key, parameter in parameters.items():
                if key.startswith(f"{full}."):
                    parameter.requires_grad_(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the language model, which transformers does only in training mode."""
        model: Any = self.language_model
        # transformers 5.23 has the second name and warns at the first, 5.17 knows only the first.
        names = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        enable = getattr(model, names[1], None) or getattr(model, names[0])
        enable({"use_reentrant": False})
        model.train()
        self.gradient_checkpointing = True

    def tokenize(self, texts: Sequence[str]) -> PromptTokens:
        """P prompts to tokens `[P, T]` on the model's device, ending in the image start token, padded by the template.

        Raises what `encode` raises.
        """
        rendered = [self.template.render(text, self.tokenizer.boi_token) for text in texts]
        return self.template.padding.arrange(self.encode(rendered), self.pad_token_id)

    def encode(self, rendered: Sequence[str]) -> PromptTokens:
        """P texts that end in the image start token to left-padded tokens `[P, T]`.

        Unconditional rows keep bos and the image start token and hold padding elsewhere, under the same mask as
        the conditional row (transformers: JanusForConditionalGeneration.generate).

        Raises ValueError if the tokenizer does not keep the image start token whole and last.
        """
        batch = self.tokenizer(list(rendered), padding=True, padding_side="left", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        start = self.tokenizer.boi_token_id
        if not bool((ids[:, -1] == start).all()):
            raise ValueError(
                f"prompt tokens must end in the image start token {start}; got {ids[:, -1].tolist()}. "
                "Use a tokenizer that adds nothing after the text."
            )
        unconditional = ids.masked_fill((ids != self.bos_token_id) & (ids != start), self.pad_token_id)
        return PromptTokens(*(part.to(self.device, non_blocking=True) for part in (ids, unconditional, mask)))

    def position_ids(self, mask: Tensor) -> Tensor:
        """Positions `[R, S]` of rows with a mask `[R, S]`, as the template's padding counts them."""
        return self.template.padding.positions(mask)

    def prompt_rows(self, prompt: PromptTokens, guidance_scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[R, T, D]` and mask `[R, T]` of the prompt rows.

        R is P at guidance 1; above, or with a tensor, 2P with the conditional rows first. Below 1 it raises ValueError.
        """
        varied = isinstance(guidance_scale, Tensor)
        if not varied and not guidance_scale >= 1:
            raise ValueError(
                f"guidance_scale must be at least 1, where 1 is no guidance; got {guidance_scale}. "
                "Set 1.0 for the conditional distribution."
            )
        if not varied and guidance_scale == 1:
            ids, mask = prompt.ids, prompt.mask
        else:
            free = prompt.mask if prompt.unconditional_mask is None else prompt.unconditional_mask
            ids, mask = torch.cat([prompt.ids, prompt.unconditional_ids]), torch.cat([prompt.mask, free])
        return self.model.get_input_embeddings()(ids), mask

    def head_features(self, hidden: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Input of the last image head layer, guided: `[R, ..., D]` to `[R, ..., D]`, or `[R/2, ..., D]` above 1.

        A tensor is a scale a row. Guidance is u + s (c - u) of conditional and unconditional logits. The last layer is
        affine, and the weights s and 1 - s add to one, so guiding its input gives the same logits for half the work.
        """
        head = self.model.model.generation_head
        features = head.activation_fn(head.proj_out(hidden))
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
            return features
        conditional, unconditional = features.float().chunk(2)
        if isinstance(guidance_scale, Tensor):
            guidance_scale = guidance_scale.float().view(-1, *(1 for _ in features.shape[1:]))
        return torch.lerp(unconditional, conditional, guidance_scale).to(features.dtype)

    @torch.no_grad()
    def image_embeddings(self) -> Tensor:
        """What the language model reads for each of the V image tokens: `[V, D]`."""
        return self.model.prepare_embeddings_for_image_generation(
            torch.arange(self.codebook_size, device=self.device)
        )

    def image_logits(self, hidden: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Guided logits `[R, ..., V]` of hidden states `[R, ..., D]`; above guidance 1 `[R/2, ..., V]`."""
        return self.model.model.generation_head.vision_head(self.head_features(hidden, guidance_scale))

    def score(
        self,
        prompt: PromptTokens,
        tokens: Tensor,
        *,
        guidance_scale: float | Tensor,
        temperature: float | Tensor,
        plans: Plans | None = None,
        plan_temperature: float | None = None,
        compare: Comparison | None = None,
        keep_features: bool = False,
    ) -> TokenScores:
        """Teacher-forced scores of `tokens` `[P, G, L]`: logps and entropy `[P, G, L]`, both with gradient.

        Both are of softmax(logits / temperature), where logits are conditional at `guidance_scale` 1 (no
        unconditional row is computed) and guided above; either may be `[P, G]`, one a sample. `compare` adds the
        divergence of the whole distributions, `keep_features` what another policy is compared with. With `plans` of
        the same samples, `prompt` ends where they begin, and their tokens are scored by the same forward: logits of
        the text head / `plan_temperature`, never guided.

        Raises ValueError for a guidance scale below 1, a temperature that is not positive, or tokens of another
        number of prompts or image tokens.
        """
        if not isinstance(temperature, Tensor) and not temperature > 0:
            raise ValueError(
                f"temperature must be positive to score tokens; got {temperature}. Set 1.0 for the model's own."
            )
        prompts, group, length = self._check_tokens(tokens)
        if len(prompt.ids) != prompts:
            raise ValueError(
                f"tokens must be images of these {len(prompt.ids)} prompts; got {list(tokens.shape)}. "
                "Slice prompts and tokens alike."
            )
        if plans is not None:
            prompt = self.with_plans(prompt, plans)
        guidance_scale = guidance_scale.flatten() if isinstance(guidance_scale, Tensor) else guidance_scale
        temperature = temperature.reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
        hidden = self._hidden_states(prompt, tokens.flatten(0, 1), guidance_scale)
        layer = self.last_layer()
        features = self.head_features(hidden[:, -length:], guidance_scale)
        scores = linear_token_scores(features, *layer, tokens.flatten(0, 1), temperature)
        if compare is not None:
            scores = replace(scores, divergence=linear_divergence(features, *layer, compare, temperature))
        if keep_features:
            scores = replace(scores, features=features.detach())
        if plans is not None:
            scores = replace(scores, plan=self._score_plans(hidden, prompt, plans, plan_temperature))
        return map_tensors(scores, lambda part: part.unflatten(0, (prompts, group)))

    forward = score

    def last_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` (or None) of the layer that makes logits of `head_features`."""
        layer = self.model.model.generation_head.vision_head
        return layer.weight, layer.bias

    def with_plans(self, prompt: PromptTokens, plans: Plans) -> PromptTokens:
        """Rows `[P * G, T']` of prompt, plan and image start token: what stands before each image."""
        return append_plans(prompt, plans, self.tokenizer.boi_token_id, self.pad_token_id)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the text vocabulary `[..., W]` of hidden states `[..., D]`."""
        return self.model.lm_head(hidden)

    def _hidden_states(self, prompt: PromptTokens, tokens: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Last hidden states `[R, T + L - 1, D]` of prompts followed by images `[N, L]` without their last token.

        N is a multiple of the P prompts, the images of a prompt beside each other. R is N, or 2N above guidance 1,
        conditional rows first.
        """
        text, mask = self.prompt_rows(prompt, guidance_scale)
        image = self.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
        group, sides = len(tokens) // len(prompt.ids), len(text) // len(prompt.ids)
        inputs = torch.cat([text.repeat_interleave(group, 0), image.repeat(sides, 1, 1)], dim=1)
        mask = F.pad(mask.repeat_interleave(group, 0), (0, tokens.shape[1] - 1), value=1)
        return self.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=self.position_ids(mask), use_cache=False
        ).last_hidden_state

    def _score_plans(
        self, hidden: Tensor, rows: PromptTokens, plans: Plans, temperature: float | None
    ) -> TokenScores:
        """Scores `[P * G, R]` of plans from the hidden states of `rows`, the conditional ones first."""
        assert temperature is not None
        mask, tokens = plans.mask.flatten(0, 1).bool(), plans.tokens.flatten(0, 1)
        row, column = before_plans(mask, rows.ids.shape[1])
        head = self.model.lm_head
        found = linear_token_scores(hidden[row, column], head.weight, head.bias, tokens[mask], temperature)
        return map_tensors(found, lambda part: part.new_zeros(mask.shape).masked_scatter(mask, part))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `[P, G, L]` to uint8 images `[P, G, H, W, 3]`, with the arithmetic of the processor's postprocess."""
        prompts, group, _ = self._check_tokens(tokens)
        flat, vq = tokens.flatten(0, 1), self.model.model.vqmodel
        images = pictures.decoded(vq, self.image_processor, flat, self.image_size)
        return images.unflatten(0, (prompts, group))

    def codes(self, tokens: Tensor) -> Tensor:
        """Unit codebook vectors `[P, G, L, C]` of tokens `[P, G, L]`, float32, as the VQ decoder sees them."""
        codebook = self.model.model.vqmodel.quantize.embedding.weight.detach()
        return F.normalize(codebook.float(), dim=-1)[tokens]

    @torch.no_grad()
    def decoder_features(self, tokens: Tensor) -> Tensor:
        """Features `[P, G, L, D]` of tokens `[P, G, L]`, float32: what the VQ decoder holds before it first upsamples.

        A codebook vector is the same wherever its token stands; a feature has seen the tokens around it.
        """
        prompts, group, _ = self._check_tokens(tokens)
        return pictures.features(self.model.model.vqmodel, tokens.flatten(0, 1)).unflatten(
            0, (prompts, group)
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, configs, tokenizer and processor in the transformers layout that `load_policy` reads."""
        self.model.save_pretrained(folder)
        JanusProcessor(
            self.image_processor, self.tokenizer, num_image_tokens=self.num_image_tokens
        ).save_pretrained(folder)

    def _check_tokens(self, tokens: Tensor) -> tuple[int, int, int]:
        if tokens.ndim != 3 or tokens.shape[2] != self.num_image_tokens:
            raise ValueError(
                f"tokens must be [prompts, group, {self.num_image_tokens}]; got {list(tokens.shape)}. "
                "Pass whole images, with the group as an axis of its own."
            )
        return tokens.shape[0], tokens.shape[1], tokens.shape[2]
