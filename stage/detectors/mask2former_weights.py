"""Mask2Former with a Swin backbone in transformers, from the tensors of an mmdet 3.3 checkpoint.

Every tensor is accounted for: what is missing, left over or of another shape is listed in one error. All sizes are
read off the tensors. What they cannot tell is as in the official model: 4 points and 3 levels of deformable
attention, as many heads in the decoder as in the encoder, normalisation in 32 groups, patches of 4 pixels.

Three tensors differ by more than their name:
1. mmdet stacks query, key and value of a window attention and of the decoder's self-attention in one matrix.
2. Merging four neighbouring patches, mmdet lists the channels and, within each, the neighbours 00, 01, 10, 11 (row,
   column); transformers lists the neighbours 00, 10, 01, 11 and, within each, the channels. The columns of the
   reduction and the norm before it follow.
3. mmdet stores the index into the table of relative positions, transformers computes it; it is compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

ENCODER, DECODER = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
MODULE, HEAD = "model.transformer_module", "panoptic_head"
BLOCK, SWIN = "backbone.stages.#.blocks.#", f"{ENCODER}.swin.encoder.layers.#.blocks.#"
TABLE, INDEX = "attn.w_msa.relative_position_bias_table", "attn.w_msa.relative_position_index"
GROUPS, LEVELS, POINTS = 32, 3, 4
MERGED = (0, 2, 1, 3)  # which of mmdet's neighbours 00, 01, 10, 11 comes first, second, ... in transformers

# mmdet's name to transformers': # is a number, the same in both; * is weight or bias; {a,b} are parts of equal size.
NAMES: dict[str, str] = {
    "backbone.patch_embed.projection.*": f"{ENCODER}.swin.embeddings.patch_embeddings.projection.*",
    "backbone.patch_embed.norm.*": f"{ENCODER}.swin.embeddings.norm.*",
    f"{BLOCK}.norm1.*": f"{SWIN}.layernorm_before.*",
    f"{BLOCK}.{TABLE}": f"{SWIN}.attention.relative_position_bias.relative_position_bias_table",
    f"{BLOCK}.attn.w_msa.qkv.*": f"{SWIN}.attention.{{q,k,v}}_proj.*",
    f"{BLOCK}.attn.w_msa.proj.*": f"{SWIN}.attention.o_proj.*",
    f"{BLOCK}.norm2.*": f"{SWIN}.layernorm_after.*",
    f"{BLOCK}.ffn.layers.0.0.*": f"{SWIN}.mlp.fc1.*",
    f"{BLOCK}.ffn.layers.1.*": f"{SWIN}.mlp.fc2.*",
    "backbone.stages.#.downsample.norm.*": f"{ENCODER}.swin.encoder.layers.#.downsample.norm.*",
    "backbone.stages.#.downsample.reduction.weight": (
        f"{ENCODER}.swin.encoder.layers.#.downsample.reduction.weight"
    ),
    **{f"backbone.norm{i}.*": f"{ENCODER}.hidden_states_norms.stage{i + 1}.*" for i in range(4)},
    f"{HEAD}.pixel_decoder.input_convs.#.conv.*": f"{DECODER}.input_projections.#.0.*",
    f"{HEAD}.pixel_decoder.input_convs.#.gn.*": f"{DECODER}.input_projections.#.1.*",
    f"{HEAD}.pixel_decoder.encoder.layers.#.self_attn.sampling_offsets.*": (
        f"{DECODER}.encoder.layers.#.self_attn.sampling_offsets.*"
    ),
    f"{HEAD}.pixel_decoder.encoder.layers.#.self_attn.attention_weights.*": (
        f"{DECODER}.encoder.layers.#.self_attn.attention_weights.*"
    ),
    f"{HEAD}.pixel_decoder.encoder.layers.#.self_attn.value_proj.*": (
        f"{DECODER}.encoder.layers.#.self_attn.value_proj.*"
    ),
    f"{HEAD}.pixel_decoder.encoder.layers.#.self_attn.output_proj.*": (
        f"{DECODER}.encoder.layers.#.self_attn.output_proj.*"
    ),
    f"{HEAD}.pixel_decoder.encoder.layers.#.ffn.layers.0.0.*": f"{DECODER}.encoder.layers.#.fc1.*",
    f"{HEAD}.pixel_decoder.encoder.layers.#.ffn.layers.1.*": f"{DECODER}.encoder.layers.#.fc2.*",
    f"{HEAD}.pixel_decoder.encoder.layers.#.norms.0.*": f"{DECODER}.encoder.layers.#.self_attn_layer_norm.*",
    f"{HEAD}.pixel_decoder.encoder.layers.#.norms.1.*": f"{DECODER}.encoder.layers.#.final_layer_norm.*",
    f"{HEAD}.pixel_decoder.level_encoding.weight": f"{DECODER}.level_embed",
    f"{HEAD}.pixel_decoder.lateral_convs.0.conv.weight": f"{DECODER}.adapter_1.0.weight",
    f"{HEAD}.pixel_decoder.lateral_convs.0.gn.*": f"{DECODER}.adapter_1.1.*",
    f"{HEAD}.pixel_decoder.output_convs.0.conv.weight": f"{DECODER}.layer_1.0.weight",
    f"{HEAD}.pixel_decoder.output_convs.0.gn.*": f"{DECODER}.layer_1.1.*",
    f"{HEAD}.pixel_decoder.mask_feature.*": f"{DECODER}.mask_projection.*",
    f"{HEAD}.decoder_input_projs.#.*": f"{MODULE}.input_projections.#.*",
    f"{HEAD}.transformer_decoder.layers.#.self_attn.attn.in_proj_*": (
        f"{MODULE}.decoder.layers.#.self_attn.{{q,k,v}}_proj.*"
    ),
    f"{HEAD}.transformer_decoder.layers.#.self_attn.attn.out_proj.*": (
        f"{MODULE}.decoder.layers.#.self_attn.out_proj.*"
    ),
    f"{HEAD}.transformer_decoder.layers.#.cross_attn.attn.in_proj_*": (
        f"{MODULE}.decoder.layers.#.cross_attn.in_proj_*"
    ),
    f"{HEAD}.transformer_decoder.layers.#.cross_attn.attn.out_proj.*": (
        f"{MODULE}.decoder.layers.#.cross_attn.out_proj.*"
    ),
    f"{HEAD}.transformer_decoder.layers.#.ffn.layers.0.0.*": f"{MODULE}.decoder.layers.#.fc1.*",
    f"{HEAD}.transformer_decoder.layers.#.ffn.layers.1.*": f"{MODULE}.decoder.layers.#.fc2.*",
    f"{HEAD}.transformer_decoder.layers.#.norms.0.*": f"{MODULE}.decoder.layers.#.cross_attn_layer_norm.*",
    f"{HEAD}.transformer_decoder.layers.#.norms.1.*": f"{MODULE}.decoder.layers.#.self_attn_layer_norm.*",
    f"{HEAD}.transformer_decoder.layers.#.norms.2.*": f"{MODULE}.decoder.layers.#.final_layer_norm.*",
    f"{HEAD}.transformer_decoder.post_norm.*": f"{MODULE}.decoder.layernorm.*",
    f"{HEAD}.query_embed.weight": f"{MODULE}.queries_embedder.weight",
    f"{HEAD}.query_feat.weight": f"{MODULE}.queries_features.weight",
    f"{HEAD}.level_embed.weight": f"{MODULE}.level_embed.weight",
    f"{HEAD}.cls_embed.*": "class_predictor.*",
    **{
        f"{HEAD}.mask_embed.{2 * i}.*": f"{MODULE}.decoder.mask_predictor.mask_embedder.{i}.0.*"
        for i in range(3)
    },
}
# Of transformers alone: a norm whose output this model does not read, and a weight of the training loss.
UNREAD = (f"{ENCODER}.swin.layernorm.weight", f"{ENCODER}.swin.layernorm.bias", "criterion.empty_weight")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias)")
    return re.compile(re.sub(r"\\\{(.*?)\\\}", lambda found: f"(?:{found[1].replace(',', '|')})", text))


def _fill(template: str, parts: Iterable[str]) -> str:
    """`template` with its # and * replaced by `parts` in order."""
    rest = iter(parts)
    return re.sub(r"[#*]", lambda _: next(rest), template)


def _expand(name: str) -> list[str]:
    """`x.{q,k}_proj` is `x.q_proj`, `x.k_proj`; a name without braces is itself."""
    found = re.search(r"\{(.*?)\}", name)
    return [name.replace(found[0], part) for part in found[1].split(",")] if found else [name]


FORWARD = [(_pattern(source), target) for source, target in NAMES.items()]
BACKWARD = [(_pattern(target), source) for source, target in NAMES.items()]


def names_in_transformers(name: str) -> list[str]:
    """What the tensor `name` of mmdet 3.3 is called in transformers: one name, three, or none if unknown."""
    for pattern, target in FORWARD:
        if found := pattern.fullmatch(name):
            return _expand(_fill(target, found.groups()))
    return []


def name_in_mmdet(name: str) -> str:
    """What the tensor `name` of transformers is, or is part of, in mmdet 3.3; itself if there is none."""
    for pattern, source in BACKWARD:
        if found := pattern.fullmatch(name):
            return _fill(source, found.groups())
    return name


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of mmdet 3.3 by transformers' names and in its order, and the names it does not know."""
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name, tensor in state.items():
        targets = names_in_transformers(name)
        if name.endswith(INDEX):
            unexpected += [] if _is_position_index(tensor) else [f"{name} (not the usual index)"]
        elif not targets:
            unexpected.append(name)
        elif len(targets) > 1 and tensor.shape[0] % len(targets):
            unexpected.append(f"{name} {tuple(tensor.shape)} (not {len(targets)} equal parts)")
        else:
            whole = _merge_order(tensor) if ".downsample." in name else tensor
            found |= dict(zip(targets, whole.chunk(len(targets)), strict=True))
    return found, unexpected


def _merge_order(tensor: Tensor) -> Tensor:
    """The last axis of 4 C entries from (channel, neighbour) to (neighbour, channel), see departure 2."""
    if tensor.shape[-1] % 4:
        return tensor  # of a wrong shape, which `build` reports
    return tensor.unflatten(-1, (-1, 4))[..., list(MERGED)].transpose(-1, -2).flatten(-2)


def _is_position_index(index: Tensor) -> bool:
    """Whether `index` `[W * W, W * W]` numbers the offsets between two places of a window row by row."""
    side = math.isqrt(index.shape[0]) if index.ndim == 2 else 0
    if index.shape != (side * side, side * side):
        return False
    rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
    down = rows[:, None] - rows[None, :] + side - 1
    across = columns[:, None] - columns[None, :] + side - 1
    return torch.equal(down * (2 * side - 1) + across, index.long())


def read_config(state: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The sizes of the model that tensors of mmdet 3.3 are for.

    Raises:
        ValueError: a tensor that tells a size is missing, or the sizes are not those of such a model.
    """
    try:
        return _sizes(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"a checkpoint is of mmdet's Mask2Former with a Swin backbone, the sizes of this one cannot be read: "
            f"{error!r}; it has {len(state)} tensors, first {next(iter(state), 'none')}. Give "
            f"mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco of mmdet's model zoo"
        ) from error


def _sizes(state: Mapping[str, Tensor]) -> Mask2FormerConfig:
    stages = _count(state, "backbone.stages.")
    tables = [state[f"backbone.stages.{i}.blocks.0.{TABLE}"].shape for i in range(stages)]
    patches = state["backbone.patch_embed.projection.weight"].shape
    backbone: dict[str, Any] = {
        "embed_dim": patches[0],
        "num_channels": patches[1],
        "patch_size": patches[2],
        "depths": [_count(state, f"backbone.stages.{i}.blocks.") for i in range(stages)],
        "num_heads": [heads for _, heads in tables],
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        "mlp_ratio": state["backbone.stages.0.blocks.0.ffn.layers.0.0.weight"].shape[0] / patches[0],
        "qkv_bias": "backbone.stages.0.blocks.0.attn.w_msa.qkv.bias" in state,
        "out_features": [f"stage{i + 1}" for i in range(stages)],
    }
    pixel, decoder = f"{HEAD}.pixel_decoder", f"{HEAD}.transformer_decoder"
    first = f"{pixel}.encoder.layers.0"
    levels = state[f"{pixel}.level_encoding.weight"].shape[0]
    if levels != LEVELS or stages != 4:
        raise ValueError(f"transformers sees {LEVELS} levels of 4 stages, this model {levels} of {stages}")
    queries, hidden = state[f"{HEAD}.query_feat.weight"].shape
    sizes: dict[str, Any] = {
        "feature_size": _in_groups(state[f"{pixel}.level_encoding.weight"].shape[1]),
        "mask_feature_size": state[f"{pixel}.mask_feature.weight"].shape[0],
        "hidden_dim": hidden,
        "encoder_feedforward_dim": state[f"{first}.ffn.layers.0.0.weight"].shape[0],
        "dim_feedforward": state[f"{decoder}.layers.0.ffn.layers.0.0.weight"].shape[0],
        "encoder_layers": _count(state, f"{pixel}.encoder.layers."),
        "decoder_layers": _count(state, f"{decoder}.layers.") + 1,
        "num_attention_heads": _heads(state[f"{first}.self_attn.attention_weights.weight"].shape[0]),
        "enforce_input_projection": f"{HEAD}.decoder_input_projs.0.weight" in state,
        "num_queries": queries,
        "num_labels": state[f"{HEAD}.cls_embed.weight"].shape[0] - 1,
        "use_auxiliary_loss": True,  # without it transformers returns no class logits
    }
    return Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **sizes)


def _in_groups(channels: int) -> int:
    if channels % GROUPS:
        raise ValueError(f"the pixel decoder normalises in {GROUPS} groups and has {channels} channels")
    return channels


def _heads(rows: int) -> int:
    if rows % (LEVELS * POINTS):
        raise ValueError(f"attention_weights has {rows} rows for {LEVELS} levels of {POINTS} points a head")
    return rows // (LEVELS * POINTS)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest number that follows `prefix`."""
    numbers: Iterator[str] = (name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def build(state: Mapping[str, Tensor]) -> Mask2FormerForUniversalSegmentation:
    """The model in float32 and eval mode, filled with tensors of mmdet 3.3.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; all of them are listed.
    """
    model = Mask2FormerForUniversalSegmentation(read_config(state))
    tensors, unexpected = convert(state)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in UNREAD}
    missing = dict.fromkeys(name_in_mmdet(name) for name in own if name not in tensors)
    unexpected += dict.fromkeys(name_in_mmdet(name) for name in tensors if name not in own)
    shaped = dict.fromkeys(
        f"{name_in_mmdet(name)} (as {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)})"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    )
    faults = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
    if any(names for _, names in faults):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in faults if names)
        raise ValueError(
            f"every tensor of a checkpoint fits the model, names as in mmdet 3: {listed}. Give the whole "
            f"checkpoint of a Mask2Former with a Swin backbone"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    return model.eval().requires_grad_(False)
