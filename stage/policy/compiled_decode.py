"""All tokens of a few images in one function that numba compiles: the CPU's counterpart of a CUDA graph a token.

It holds no lock of the interpreter, so each thread decodes images of its own and none waits for another. A row's sums
are taken in one order whatever stands beside it: its image does not depend on the batch or on the number of threads,
to the last bit. Arrays are contiguous float32 unless they say otherwise; N images, R rows of which the first N are the
conditional ones, D hidden, A = heads x size of the attention, I inner, E of the image head, V codes. What is summed
over (D, A, I, E and the size of a head) must be a multiple of STEP. Constants have their type: a Python number would
turn what it meets into float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

STEP = 8  # terms that are added at once to a sum, which stays in a register meanwhile
LANES = 16  # keys are read in multiples of it: no loop over them has a remainder

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
ROOT_HALF = np.float32(math.sqrt(0.5))
LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts, of which the first has so few bits that its products with exponents are exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
ROUND = np.float32(1.5 * 2**23)  # what is added to it is rounded, and stands in its last bits
EXP_LEAST, EXP_MOST = np.float32(-87), np.float32(88)
SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(8))

_compiled = njit(nogil=True, error_model="numpy", fastmath={"contract"})
# Where a sum may be taken in any order, several terms are added at once.
_reordered = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


class Layers(NamedTuple):
    """Of all layers: norms `[layers, D]`, matrices `[layers, in, out]` and biases `[layers, out]`."""

    attention_norm: Any
    qkv: Any
    qkv_bias: Any
    out: Any
    out_bias: Any
    mlp_norm: Any
    gate_up: Any
    gate_up_bias: Any
    down: Any
    down_bias: Any


class Ends(NamedTuple):
    """What stands around the layers. `cos` and `sin` `[positions, size]`, as `stage.policy.decoder.rope_table`."""

    table: Any  # [V, D], embeddings of image tokens
    norm: Any  # [D]
    inner: Any  # [D, E], first layer of the head
    inner_bias: Any
    outer: Any  # [E, V], and its last
    outer_bias: Any
    cos: Any
    sin: Any


class Prompts(NamedTuple):
    """U prompts of T tokens, padding included, that samples share."""

    keys_values: Any  # [layers, U, T, 2, kv heads, size], rotated keys before values
    order: Any  # int64 [U, T], real tokens before padding
    lengths: Any  # int64 [U], of real tokens
    first: Any  # int64 [U], position of the first image token
    hidden: Any  # [U, D], normed, of the last token


class Settings(NamedTuple):
    """Numbers of the model and of the sampler."""

    heads: int
    eps: np.float32  # of the norms
    scale: np.float32  # of queries times keys
    guidance: np.float32
    temperature: np.float32


class Rows(NamedTuple):
    """R rows in the middle of their images, and room for what is computed on the way. All finite, if only zero."""

    keys: Any  # [R, layers, kv heads, size, room], rotated
    values: Any  # [R, layers, kv heads, room, size]
    filled: Any  # int64 [R], prompt tokens in the room
    first: Any  # int64 [R], position of the first image token
    hidden: Any  # [R, D]
    normed: Any  # [R, D]
    qkv: Any  # [R, (heads + 2 kv heads) size]
    attended: Any  # [R, A]
    gate_up: Any  # [R, 2 I]
    inner: Any  # [R, I]
    features: Any  # [R, E]
    logits: Any  # [N, V]
    scores: Any  # [R, room]


def decode(
    layers: Layers,
    ends: Ends,
    settings: Settings,
    prompts: Prompts,
    prompt_of_row: Any,
    rows: Rows,
    uniforms: Any,
    tokens: Any,
    logps: Any,
) -> None:
    """Draw int64 `tokens` and `logps` `[N, L]` for float64 `uniforms` `[N, L]`, in rows that begin with their prompts.

    To be compiled by whoever calls it, with a place for the result.
    """
    _begin(prompts, prompt_of_row, rows)
    images, length = tokens.shape
    for step in range(length):
        if step > 0:
            _embed(ends.table, tokens, step - 1, rows.hidden)
            _run_layers(layers, ends, settings, rows, step - 1)
        _head(ends, settings, rows, images)
        for image in range(images):
            tokens[image, step], logps[image, step] = draw(
                rows.logits[image], uniforms[image, step], settings.temperature
            )


@_compiled
def _begin(prompts, prompt_of_row, rows):
    """Keys, values and hidden states of each row's prompt, without padding."""
    layers, kv_heads, size = rows.keys.shape[1:4]
    for row in range(len(prompt_of_row)):
        prompt = prompt_of_row[row]
        rows.filled[row], rows.first[row] = prompts.lengths[prompt], prompts.first[prompt]
        for j in range(prompts.hidden.shape[1]):
            rows.normed[row, j] = prompts.hidden[prompt, j]
        for layer in range(layers):
            for at in range(prompts.lengths[prompt]):
                found = prompts.keys_values[layer, prompt, prompts.order[prompt, at]]
                for kv_head in range(kv_heads):
                    for i in range(size):
                        rows.keys[row, layer, kv_head, i, at] = found[0, kv_head, i]
                        rows.values[row, layer, kv_head, at, i] = found[1, kv_head, i]


@_compiled
def _embed(table, tokens, step, hidden):
    """Embeddings of the tokens of one step; unconditional rows read those of their images."""
    rows, width = hidden.shape
    for row in range(rows):
        token = tokens[row % len(tokens), step]
        for j in range(width):
            hidden[row, j] = table[token, j]


@_compiled
def _run_layers(layers, ends, settings, rows, step):
    """Last normed hidden states of image token number `step`, whose embedding is in `hidden`."""
    for layer in range(len(layers.qkv)):
        rms_norm(rows.hidden, layers.attention_norm[layer], settings.eps, rows.normed)
        linear(rows.normed, layers.qkv[layer], layers.qkv_bias[layer], rows.qkv)
        _attend(ends, settings, rows, layer, step)
        linear(rows.attended, layers.out[layer], layers.out_bias[layer], rows.normed)
        _add(rows.hidden, rows.normed)
        rms_norm(rows.hidden, layers.mlp_norm[layer], settings.eps, rows.normed)
        linear(rows.normed, layers.gate_up[layer], layers.gate_up_bias[layer], rows.gate_up)
        _gate(rows.gate_up, rows.inner)
        linear(rows.inner, layers.down[layer], layers.down_bias[layer], rows.normed)
        _add(rows.hidden, rows.normed)
    rms_norm(rows.hidden, ends.norm, settings.eps, rows.normed)


@_compiled
def linear(x, matrix, bias, out):
    """`x` `[R, in]` times `matrix` `[in, out]`, plus `bias`."""
    rows, terms = x.shape
    width = len(bias)
    for row in range(rows):
        for j in range(width):
            out[row, j] = bias[j]
    for k in range(0, terms, STEP):
        for row in range(rows):
            for j in range(width):
                total = out[row, j]
                for i in range(STEP):
                    total += x[row, k + i] * matrix[k + i, j]
                out[row, j] = total


@_reordered
def rms_norm(x, weight, eps, out):
    """`out` is `x` `[R, D]` over the root of its mean square, times `weight`."""
    rows, width = x.shape
    for row in range(rows):
        total = ZERO
        for j in range(width):
            total += x[row, j] * x[row, j]
        factor = ONE / np.float32(math.sqrt(total / np.float32(width) + eps))
        for j in range(width):
            out[row, j] = x[row, j] * factor * weight[j]


@_compiled
def _attend(ends, settings, rows, layer, step):
    """Keep keys and values of the token in `qkv`, and attend to all that are kept."""
    kv_heads, size = rows.keys.shape[2:4]
    repeats = settings.heads // kv_heads
    for row in range(len(rows.qkv)):
        at, position = rows.filled[row] + step, rows.first[row] + step
        cos, sin = ends.cos[position], ends.sin[position]
        for kv_head in range(kv_heads):
            keys, values = rows.keys[row, layer, kv_head], rows.values[row, layer, kv_head]
            start = (settings.heads + kv_head) * size
            key, value = rows.qkv[row, start:], rows.qkv[row, start + kv_heads * size :]
            _rotate(key, cos, sin)
            for i in range(size):
                keys[i, at], values[at, i] = key[i], value[i]
            for head in range(kv_head * repeats, (kv_head + 1) * repeats):
                query = rows.qkv[row, head * size :]
                _rotate(query, cos, sin)
                out = rows.attended[row, head * size :]
                _attend_once(query, keys, values, at + 1, settings.scale, rows.scores[row], out)


@_compiled
def _attend_once(query, keys, values, count, scale, scores, out):
    """`out` of one query over the first `count` keys `[size, room]` and values `[room, size]`."""
    size = len(keys)
    lanes, steps = (count + LANES - 1) // LANES * LANES, (count + STEP - 1) // STEP * STEP
    for j in range(lanes):
        scores[j] = ZERO
    for k in range(0, size, STEP):
        for j in range(lanes):
            total = scores[j]
            for i in range(STEP):
                total += query[k + i] * keys[k + i, j]
            scores[j] = total
    _softmax(scores, count, scale)
    for j in range(count, steps):
        scores[j] = ZERO
    for j in range(size):
        out[j] = ZERO
    for k in range(0, steps, STEP):
        for j in range(size):
            total = out[j]
            for i in range(STEP):
                total += scores[k + i] * values[k + i, j]
            out[j] = total


@_compiled
def _rotate(x, cos, sin):
    """Rotary embedding of `x` by one position, in place; the first half of `sin` is negated."""
    half = len(cos) // 2
    for j in range(half):
        first, second = x[j], x[half + j]
        x[j] = first * cos[j] + second * sin[j]
        x[half + j] = second * cos[half + j] + first * sin[half + j]


@_reordered
def _softmax(scores, count, scale):
    """Softmax of the first `count` scores times `scale`, in place."""
    most, total = scores[0], ZERO
    for j in range(1, count):
        most = max(most, scores[j])
    for j in range(count):
        scores[j] = exp((scores[j] - most) * scale)
        total += scores[j]
    for j in range(count):
        scores[j] /= total


@_compiled
def _add(x, added):
    rows, width = x.shape
    for row in range(rows):
        for j in range(width):
            x[row, j] += added[row, j]


@_compiled
def _gate(gate_up, out):
    """silu(first half) times second half."""
    rows, width = out.shape
    for row in range(rows):
        for j in range(width):
            gate = gate_up[row, j]
            out[row, j] = gate / (ONE + exp(-gate)) * gate_up[row, width + j]


@_compiled
def _head(ends, settings, rows, images):
    """Logits of the hidden states in `normed`; see `JanusPolicy.head_features` for the guidance."""
    features = rows.features
    linear(rows.normed, ends.inner, ends.inner_bias, features)
    count, width = features.shape
    for row in range(count):
        for j in range(width):
            x = features[row, j]
            features[row, j] = HALF * x * (ONE + np.float32(math.erf(x * ROOT_HALF)))
    if count > images:
        for image in range(images):
            for j in range(width):
                difference = features[image, j] - features[images + image, j]
                features[image, j] += (settings.guidance - ONE) * difference
    linear(features[:images], ends.outer, ends.outer_bias, rows.logits)


@_compiled
def draw(logits, uniform, temperature):
    """What `stage.policy.draws.inverse_cdf` draws from one row of logits, which it overwrites."""
    best, spoilt = 0, ZERO
    for j in range(len(logits)):
        spoilt += logits[j] - logits[j]  # zero, or NaN where a logit is not finite
        if logits[j] > logits[best]:
            best = j
    if temperature == ZERO:
        return best, spoilt
    most, total = logits[best], spoilt
    for j in range(len(logits)):
        logits[j] = (logits[j] - most) / temperature
        total += exp(logits[j])
    total = np.float32(math.log(total))
    mass = 0.0  # in float64, as there
    for j in range(len(logits)):
        logits[j] -= total
        mass += exp(logits[j])
    target, mass = uniform * mass, 0.0
    for j in range(len(logits)):
        mass += exp(logits[j])
        if mass > target:
            return j, logits[j]
    return len(logits) - 1, logits[len(logits) - 1] + spoilt


def _reading_as(kind: Any, given: Any) -> Any:
    """A function that reads the bits of a number of one type as one of another."""

    @intrinsic
    def read(typing: Any, number: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(kind))

        return kind(given), build

    return read


_bits = _reading_as(types.int32, types.float32)
_float = _reading_as(types.float32, types.int32)


@_compiled
def exp(x):
    """e to the x within two units of the last place, and NaN for NaN: one that loops can be vectorised over.

    x is n ln 2 + rest; the series of e to the rest is cut where it is below rounding, and n is put into the exponent.
    """
    if x < EXP_LEAST:
        x = EXP_LEAST
    if x > EXP_MOST:
        x = EXP_MOST
    shifted = x * LOG2_E + ROUND
    whole = shifted - ROUND
    rest = x - whole * LN2_HIGH - whole * LN2_LOW
    series = SERIES[7]
    for n in (6, 5, 4, 3, 2, 1, 0):
        series = series * rest + SERIES[n]
    return series * _float((_bits(shifted) << np.int32(23)) + np.int32(127 << 23))
