"""Decoding on a CPU: prompts in torch, then a few images at a time in compiled code, on all threads at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit, typeof
from torch import Tensor

from stage.policy import compiled_decode as compiled
from stage.policy.compiled_decode import Ends, Layers, Prompts, Rows
from stage.policy.decoder import Prefill, Prefixes, rope_table
from stage.policy.janus import JanusPolicy
from stage.policy.rollout_weights import Affine, LayerWeights, RolloutWeights

ROWS = 32  # that a thread decodes together: enough to read a matrix for, few enough for the core's own cache
LARGEST = 2**20  # numbers in a matrix up to which the compiled product is ahead of the library's

log = logging.getLogger(__name__)


def can_decode(policy: JanusPolicy, dtype: torch.dtype) -> bool:
    """Whether `decode` can run this policy, and is ahead of plain torch: a small float32 Llama on a CPU."""
    config: Any = policy.model.config
    text, head = config.text_config, policy.model.model.generation_head
    size = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    widths = text.hidden_size, text.head_dim, text.intermediate_size, head.proj_out.out_features
    return (
        policy.device.type == "cpu"
        and dtype == head.proj_out.weight.dtype == torch.float32
        and text.hidden_act == "silu"
        and config.vq_config.hidden_act == "gelu"
        and all(width % compiled.STEP == 0 for width in widths)
        and text.hidden_size * max(size, 2 * text.intermediate_size, policy.codebook_size) <= LARGEST
    )


def decode(
    policy: JanusPolicy, prefixes: Prefixes, uniforms: Tensor, guidance_scale: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities `[N, L]` for uniforms `[N, L]`; `can_decode` has to agree."""
    model: Any = policy.language_model
    weights = RolloutWeights(model, torch.float32)
    rope = rope_table(model, prefixes.positions.shape[1], torch.float32)
    prefill = Prefill(model, weights, prefixes)
    hidden = prefill.run(rope)
    numbers = model.norm.variance_epsilon, prefill.scale, guidance_scale, temperature
    settings = compiled.Settings(prefill.heads, *(np.float32(number) for number in numbers))
    fixed = (_layers(weights), _ends(policy, weights.norm, rope), settings, _prompts(prefill, hidden))

    tokens, logps = torch.empty(uniforms.shape, dtype=torch.long), torch.empty(uniforms.shape)
    changing = [part.numpy() for part in (uniforms.contiguous(), tokens, logps)]
    prompt_of_row = prefixes.of_row.view(-1, len(uniforms)).numpy()
    sides, workers = len(prompt_of_row), min(torch.get_num_threads(), len(uniforms))
    # As many parts for every thread, so that none waits at the end.
    size = -(-len(uniforms) // (workers * -(-len(uniforms) * sides // (ROWS * workers))))
    buffers = [_rows(policy, prefixes.positions.shape[1], size, sides) for _ in range(workers)]
    run = _compile(tuple(map(typeof, (*fixed, prompt_of_row[0], buffers[0], *changing))))
    parts = iter([slice(start, start + size) for start in range(0, len(uniforms), size)])

    def work(rows: Rows) -> None:
        for part in parts:  # shared: whoever is free takes the next
            of_row = prompt_of_row[:, part].flatten()
            used = compiled.Rows(*(buffer[: len(of_row)] for buffer in rows))
            run(*fixed, of_row, used, *(array[part] for array in changing))

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(work, buffers))  # raises what a thread raised
    return tokens, logps


@lru_cache(maxsize=1)
def _compile(signature: tuple[Any, ...]) -> Callable[..., None]:
    """The compiled function, which numba keeps in `__pycache__` beside its source, else in the user's cache folder.

    NUMBA_CACHE_DIR names another. Where nothing can be kept or what was kept is damaged, this process compiles anew.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        function = njit(cache=True, **options)(compiled.decode)
        function.compile(signature)
    except Exception as error:
        log.warning(
            "the compiled sampler is not kept for the next start, since its folder has no room or holds something "
            "else (%s: %s). Set NUMBA_CACHE_DIR to an empty folder.",
            type(error).__name__,
            error,
        )
        function = njit(**options)(compiled.decode)
        function.compile(signature)
    return function


def _layers(weights: RolloutWeights) -> Layers:
    def stacked(pick: Callable[[LayerWeights], Tensor]) -> np.ndarray:
        return _array(torch.stack([pick(layer) for layer in weights.layers]))

    def affine(pick: Callable[[LayerWeights], Affine]) -> tuple[np.ndarray, np.ndarray]:
        return stacked(lambda layer: pick(layer).weight.t()), stacked(lambda layer: _bias(pick(layer)))

    return compiled.Layers(
        stacked(lambda layer: layer.attention_norm),
        *affine(lambda layer: layer.qkv),
        *affine(lambda layer: layer.out),
        stacked(lambda layer: layer.mlp_norm),
        *affine(lambda layer: layer.gate_up),
        *affine(lambda layer: layer.down),
    )


def _ends(policy: JanusPolicy, norm: Tensor, rope: tuple[Tensor, Tensor]) -> Ends:
    head: Any = policy.model.model.generation_head
    affine = [part for layer in (head.proj_out, head.vision_head) for part in (layer.weight.t(), layer.bias)]
    return compiled.Ends(*map(_array, (policy.image_embeddings(), norm, *affine, *rope)))


def _prompts(prefill: Prefill, hidden: Tensor) -> Prompts:
    mask, positions = prefill.prefixes.mask, prefill.prefixes.positions
    order = mask.argsort(dim=1, descending=True, stable=True)
    first = positions[:, min(mask.shape[1], positions.shape[1] - 1)]  # not read where an image has one token
    parts = torch.stack(prefill.keys_values), order, mask.sum(1), first, hidden
    return compiled.Prompts(*map(_array, parts))


def _rows(policy: JanusPolicy, positions: int, images: int, sides: int) -> Rows:
    """Buffers for so many images, for prompts and images of so many positions."""
    config: Any = policy.language_model.config
    count, heads, kv_heads, size = (
        images * sides,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    room = -(-positions // compiled.LANES) * compiled.LANES
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    whole = [torch.zeros(count, dtype=torch.long) for _ in range(2)]
    shapes = (
        (layers, kv_heads, size, room),
        (layers, kv_heads, room, size),
        (width,),
        (width,),
        ((heads + 2 * kv_heads) * size,),
        (heads * size,),
        (2 * inner,),
        (inner,),
        (policy.model.model.generation_head.proj_out.out_features,),
        (policy.codebook_size,),
        (room,),
    )
    # Of torch, whose memory begins where a line of the cache does.
    keys, values, *rest = (torch.zeros(count, *shape) for shape in shapes)
    return compiled.Rows(*map(_array, (keys, values, *whole, *rest)))


def _bias(affine: Affine) -> Tensor:
    return affine.weight.new_zeros(len(affine.weight)) if affine.bias is None else affine.bias


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().contiguous().numpy()
    return found
