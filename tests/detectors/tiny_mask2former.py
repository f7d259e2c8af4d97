"""A small random Mask2Former in transformers and, written out by hand, its tensors as mmdet 2 and 3 name them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

# transformers' words for mmdet 3's, replaced one after the other in names that begin as the first column says.
SWIN = (
    ("swin.embeddings.patch_embeddings", "backbone.patch_embed"),
    ("swin.embeddings.norm", "backbone.patch_embed.norm"),
    ("swin.encoder.layers", "backbone.stages"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.relative_position_bias", "attn.w_msa"),
    ("attention.o_proj", "attn.w_msa.proj"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
    *((f"hidden_states_norms.stage{i + 1}", f"backbone.norm{i}") for i in range(4)),
)
PIXEL = (
    *((f"input_projections.{i}.0", f"input_convs.{i}.conv") for i in range(3)),
    *((f"input_projections.{i}.1", f"input_convs.{i}.gn") for i in range(3)),
    ("self_attn_layer_norm", "norms.0"),
    ("final_layer_norm", "norms.1"),
    ("fc1", "ffn.layers.0.0"),
    ("fc2", "ffn.layers.1"),
    ("level_embed", "level_encoding.weight"),
    ("mask_projection", "mask_feature"),
    ("adapter_1.0", "lateral_convs.0.conv"),
    ("adapter_1.1", "lateral_convs.0.gn"),
    ("layer_1.0", "output_convs.0.conv"),
    ("layer_1.1", "output_convs.0.gn"),
)
DECODER = (
    ("decoder.layers", "transformer_decoder.layers"),
    ("decoder.layernorm", "transformer_decoder.post_norm"),
    ("input_projections", "decoder_input_projs"),
    ("queries_embedder", "query_embed"),
    ("queries_features", "query_feat"),
    ("cross_attn_layer_norm", "norms.0"),
    ("self_attn_layer_norm", "norms.1"),
    ("final_layer_norm", "norms.2"),
    ("cross_attn.", "cross_attn.attn."),
    ("self_attn.", "self_attn.attn."),
    ("fc1", "ffn.layers.0.0"),
    ("fc2", "ffn.layers.1"),
    *((f"decoder.mask_predictor.mask_embedder.{i}.0", f"mask_embed.{2 * i}") for i in range(3)),
)
PLACES = (
    ("model.pixel_level_module.encoder.", "", SWIN),
    ("model.pixel_level_module.decoder.", "panoptic_head.pixel_decoder.", PIXEL),
    ("model.transformer_module.", "panoptic_head.", DECODER),
    ("class_predictor.", "panoptic_head.cls_embed.", ()),
)
SKIPPED = ("swin.layernorm", "criterion")


def tiny_model(
    width: int = 16,
    depths: tuple[int, ...] = (1, 2, 1, 1),
    window: int = 4,
    hidden: int = 32,
    qkv_bias: bool = True,
    labels: int = 80,
    decoder_layers: int = 2,
    window_heads: tuple[int, ...] = (1, 2, 2, 4),
    heads: int = 4,
    encoder_layers: int = 2,
    queries: int = 6,
) -> Mask2FormerForUniversalSegmentation:
    """A random model; every tensor is drawn, so that none keeps the value it would have by default."""
    backbone: dict[str, Any] = {
        "embed_dim": width,
        "depths": list(depths),
        "num_heads": list(window_heads),
        "window_size": window,
        "mlp_ratio": 2.0,
        "qkv_bias": qkv_bias,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    sizes: dict[str, Any] = {
        "feature_size": 32,
        "mask_feature_size": 16,
        "hidden_dim": hidden,
        "encoder_feedforward_dim": 48,
        "dim_feedforward": 40,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers + 1,
        "num_attention_heads": heads,
        "num_queries": queries,
        "num_labels": labels,
        "use_auxiliary_loss": True,
    }
    config = Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **sizes)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    for name, tensor in model.state_dict().items():
        if not name.startswith("criterion"):
            noise = torch.randn_like(tensor) * (0.5 if tensor.ndim > 1 else 0.1)
            scale = max(1.0, tensor.shape[-1] ** 0.5) if tensor.ndim == 2 else 1.0
            gain = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            tensor.copy_(gain + noise / scale)
    return model


def mmdet_name(name: str) -> str:
    for start, ours, words in PLACES:
        if name.startswith(start):
            rest = name[len(start) :]
            for theirs, word in words:
                rest = rest.replace(theirs, word) if not rest.startswith(ours) or not ours else rest
            return ours + rest
    raise AssertionError(name)


def in_mmdet(model: Mask2FormerForUniversalSegmentation, layout: int) -> dict[str, Tensor]:
    """The tensors by the names and in the order of mmdet's `layout`, 2 or 3."""
    own = {name: t.clone() for name, t in model.state_dict().items() if not any(s in name for s in SKIPPED)}
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if found := re.fullmatch(r"(.*)\.q_proj\.(weight|bias)", name):
            parts = [own[f"{found[1]}.{part}_proj.{found[2]}"] for part in "qkv"]
            stem = mmdet_name(f"{found[1]}.")
            window = stem.startswith("backbone")
            target = stem.replace("attention.", "attn.w_msa.qkv.") if window else f"{stem}in_proj_"
            state[target + found[2]] = torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif ".downsample." in name:
            state[mmdet_name(name)] = unmerge(tensor)
        else:
            state[mmdet_name(name)] = tensor
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        window_size = (math.isqrt(len(state[name])) + 1) // 2
        state[name.replace("bias_table", "index")] = position_index(window_size)
    return state if layout == 3 else {as_in_2(name): tensor for name, tensor in state.items()}


def as_in_2(name: str) -> str:
    if "pixel_decoder.encoder" in name:
        name = name.replace("self_attn", "attentions.0")
    elif "transformer_decoder" in name:
        name = name.replace("cross_attn", "attentions.0").replace("self_attn", "attentions.1")
    return re.sub(r"^(panoptic_head.*layers\.\d+\.)ffn\.", r"\1ffns.0.", name)


def unmerge(tensor: Tensor) -> Tensor:
    """Columns from transformers' (neighbour 00, 10, 01, 11; channel) to mmdet's (channel; neighbour 00, 01, 10, 11)."""
    channels = tensor.shape[-1] // 4
    found = torch.empty_like(tensor)
    for channel in range(channels):
        for place, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            found[..., channel * 4 + 2 * row + column] = tensor[..., place * channels + channel]
    return found


def position_index(window: int) -> Tensor:
    """[W * W, W * W]: which row of the table belongs to the offset between two places."""
    index = torch.zeros(window**2, window**2, dtype=torch.long)
    for a in range(window**2):
        for b in range(window**2):
            down, across = a // window - b // window, a % window - b % window
            index[a, b] = (down + window - 1) * (2 * window - 1) + across + window - 1
    return index


# `tiny_model` of 80 classes in the words of the golden file of mmdet.
SIZES = {
    "embed_dims": 16,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "window": 4,
    "mlp_ratio": 2,
    "feat_channels": 32,
    "out_channels": 16,
    "num_queries": 6,
    "heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn": 48,
    "decoder_ffn": 40,
}


def save_checkpoint(folder: Path, layout: int = 3) -> Path:
    """A file of mmdet's kind with a tiny random model of 80 classes."""
    file = folder / "tiny.pth"
    content = {
        "meta": {"CLASSES": ("person",)},
        "config": SIZES,
        "state_dict": in_mmdet(tiny_model(), layout),
    }
    torch.save(content, file)
    return file
