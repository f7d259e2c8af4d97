"""What Janus's tensors are called in the original `multi_modality` layout, and what in the layout of transformers.

The two layouts hold the same numbers under other names, with three differences in form:

1. The original fuses query, key and value of the vision tower into one matrix, `[3 D, D]`, in that order.
2. Its position embedding has a leading axis of one.
3. It stores tensors that no forward pass of Janus reads: the attention pool of the vision tower, which its
   `ignore_head` skips, a counter of the VQ training, and in old files the frequencies of the rotary embedding.
   transformers has no place for them.

Names of the original: deepseek-ai/Janus, janus/models/{modeling_vlm,siglip_vit,vq_model,projector}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_TOWER, _VISION = "vision_model.vision_tower", "model.vision_model"
_VQ, _VQMODEL = "gen_vision_model", "model.vqmodel"
# Original name and transformers' name. {i} and {j} are the same number in both, {rest} the same words; {even} is the
# place 2 (i + 1) of linear layer i + 1 in a sequence whose odd places are activations.
_PAIRS = (
    ("language_model.model.{rest}", "model.language_model.{rest}"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("gen_embed.weight", "model.generation_embeddings.weight"),
    ("gen_head.output_mlp_projector.{rest}", "model.generation_head.proj_out.{rest}"),
    ("gen_head.vision_head.{rest}", "model.generation_head.vision_head.{rest}"),
    *(
        pair
        for original, name in (("aligner", "model.aligner"), ("gen_aligner", "model.generation_aligner"))
        for pair in (
            (f"{original}.layers.0.{{rest}}", f"{name}.fc1.{{rest}}"),
            (f"{original}.layers.{{even}}.{{rest}}", f"{name}.hidden_layers.{{i}}.{{rest}}"),
        )
    ),
    (f"{_TOWER}.patch_embed.proj.{{rest}}", f"{_VISION}.embeddings.patch_embedding.{{rest}}"),
    (f"{_TOWER}.pos_embed", f"{_VISION}.embeddings.position_embedding.weight"),
    (f"{_TOWER}.norm.{{rest}}", f"{_VISION}.post_layernorm.{{rest}}"),
    *(
        (f"{_TOWER}.blocks.{{i}}.{original}.{{rest}}", f"{_VISION}.encoder.layers.{{i}}.{name}.{{rest}}")
        for original, name in (
            ("norm1", "layer_norm1"),
            ("attn.proj", "self_attn.projection_layer"),
            ("norm2", "layer_norm2"),
            ("mlp", "mlp"),
        )
    ),
    *(
        (f"{_VQ}.{half}.{original}.{{rest}}", f"{_VQMODEL}.{half}.{name}.{{rest}}")
        for half, blocks in (("encoder", "down"), ("decoder", "up"))
        for original, name in (
            ("conv_blocks.{i}.res.{j}", f"{blocks}.{{i}}.block.{{j}}"),
            ("conv_blocks.{i}.attn.{j}", f"{blocks}.{{i}}.attn.{{j}}"),
            (f"conv_blocks.{{i}}.{blocks}sample", f"{blocks}.{{i}}.{blocks}sample"),
            ("mid.0", "mid.block_1"),
            ("mid.1", "mid.attn_1"),
            ("mid.2", "mid.block_2"),
            *((part, part) for part in ("conv_in", "norm_out", "conv_out")),
        )
    ),
    (f"{_VQ}.quantize.embedding.weight", f"{_VQMODEL}.quantize.embedding.weight"),
    (f"{_VQ}.quant_conv.{{rest}}", f"{_VQMODEL}.quant_conv.{{rest}}"),
    (f"{_VQ}.post_quant_conv.{{rest}}", f"{_VQMODEL}.post_quant_conv.{{rest}}"),
)
_QKV = f"{_TOWER}.blocks.{{i}}.attn.qkv.{{rest}}"
_SPLIT = tuple(f"{_VISION}.encoder.layers.{{i}}.self_attn.{part}_proj.{{rest}}" for part in "qkv")
_POSITIONS = f"{_TOWER}.pos_embed"

_POOL = f"{_TOWER}.attn_pool"
_COUNTER = f"{_VQ}.quantize.codebook_used"
_COUNTED = 65536  # length of the counter, whatever the codebook (vq_model.py: VectorQuantizer)
_UNREAD = re.compile(rf"{re.escape(_POOL)}\..+|{re.escape(_COUNTER)}|.*\.rotary_emb\.inv_freq")


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression that matches what `template` stands for."""
    text = re.escape(template).replace(r"\{rest\}", r"(?P<rest>[\w.]+)")
    return re.compile(re.sub(r"\\{(i|j|even)\\}", r"(?P<\1>\\d+)", text))


_ORIGINAL = (*((_pattern(original), (name,)) for original, name in _PAIRS), (_pattern(_QKV), _SPLIT))
_NAMES = (
    *((_pattern(name), original, 0, 1) for original, name in _PAIRS),
    *((_pattern(name), _QKV, part, len(_SPLIT)) for part, name in enumerate(_SPLIT)),
)


def is_unread(original: str) -> bool:
    """Whether a name of the original layout is that of a tensor which no forward pass reads."""
    return _UNREAD.fullmatch(original) is not None


def to_transformers(original: str) -> tuple[str, ...]:
    """transformers' names for a tensor of the original layout: one, or those of its three parts in the order of rows.

    Empty for a tensor that no forward pass reads. Raises KeyError for a name that is not of the original layout.
    """
    if is_unread(original):
        return ()
    for pattern, names in _ORIGINAL:
        if found := pattern.fullmatch(original):
            values = found.groupdict()
            if "even" in values:
                place = int(values["even"])
                if place == 0 or place % 2:
                    continue
                values["i"] = str(place // 2 - 1)
            return tuple(name.format(**values) for name in names)
    raise KeyError(original)


def to_original(name: str) -> tuple[str, int, int]:
    """Where transformers' tensor lies in the original layout: (name, part, number of parts that its rows are cut in).

    Raises KeyError for a name that is not of transformers' Janus.
    """
    for pattern, original, part, parts in _NAMES:
        if found := pattern.fullmatch(name):
            values = found.groupdict()
            if "{even}" in original:
                values["even"] = str(2 * (int(values["i"]) + 1))
            return original.format(**values), part, parts
    raise KeyError(name)


def split(original: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the original layout as transformers' tensors, which are views of it; see `to_transformers`."""
    names = to_transformers(original)
    if original == _POSITIONS:
        tensor = tensor.squeeze(0)
    return dict(zip(names, tensor.chunk(len(names)), strict=True)) if names else {}


def join(original: str, tensors: list[Tensor]) -> Tensor:
    """transformers' tensors, in the order of `to_transformers`, as one of the original layout."""
    if original == _POSITIONS:
        return tensors[0].unsqueeze(0)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def split_shape(original: str, shape: Shape) -> dict[str, Shape]:
    """Shapes of what `split` gives; one that cannot be split is handed on as it is, and is then found to be wrong."""
    names = to_transformers(original)
    if original == _POSITIONS and shape[:1] == (1,):
        shape = shape[1:]
    if len(names) > 1 and shape and shape[0] % len(names) == 0:
        shape = (shape[0] // len(names), *shape[1:])
    return dict.fromkeys(names, shape)


def original_shapes(shapes: Shapes) -> dict[str, Shape]:
    """Names and shapes of the original layout for all tensors of transformers' Janus, the unread ones included."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        original, _, parts = to_original(name)
        found[original] = (1, *shape) if original == _POSITIONS else (shape[0] * parts, *shape[1:])
    return found | unread_shapes(shapes)


def unread_shapes(shapes: Shapes) -> dict[str, Shape]:
    """The tensors that the original layout has beyond those of transformers' Janus, whose `shapes` are given."""
    hidden, width = shapes[f"{_VISION}.encoder.layers.0.mlp.fc1.weight"]
    pool = {
        "latent": (1, 1, width),
        **_linear("q", width, width),
        **_linear("kv", 2 * width, width),
        **_linear("proj", width, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        **_linear("mlp.fc1", hidden, width),
        **_linear("mlp.fc2", width, hidden),
    }
    return {f"{_POOL}.{name}": shape for name, shape in pool.items()} | {_COUNTER: (_COUNTED,)}


def looks_original(names: Iterable[str]) -> bool:
    """Whether tensor names are those of the original layout."""
    return any(
        name.startswith(("language_model.model.", "gen_vision_model.", "gen_embed.")) for name in names
    )


def looks_converted(names: Iterable[str]) -> bool:
    """Whether tensor names are those of transformers' layout."""
    return any(name.startswith(("model.language_model.", "model.vqmodel.")) for name in names)


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
