"""The configuration of a Janus, translated between the original `multi_modality` layout and transformers.

The original states little: the sizes of its VQ model and of the published vision towers stand in its code. All sizes
are therefore read from the tensors; what tensors cannot show (heads, constants of normalisation and position) comes
from the configuration, and for the vision tower from its published name. A file `meta.json` beside config.json may
state the heads of a tower that was never published: `{"vision_tower": {"heads": 4}}`.

Published towers: deepseek-ai/Janus, janus/models/siglip_vit.py (SigLIP_MODEL_CONFIG).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from stage.policy.names import Shapes

Json = Mapping[str, Any]
# Width and heads of the vision towers that the original code can build.
TOWERS = {
    "siglip_large_patch16_384": (1024, 16),
    "siglip_so400m_patch14_384": (1152, 16),
    "siglip_so400m_patch14_224": (1152, 16),
}
_HEAD_SIZE = 64  # of a vision tower that nothing is known of, where it divides the width
_TOWER, _VQ, _LAYER = "vision_model.vision_tower", "gen_vision_model", "language_model.model.layers.0"
# Tensors that sizes are read from, by their number of axes.
_AXES = {
    2: (
        "language_model.model.embed_tokens.weight",
        *(f"{_LAYER}.{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "mlp.gate")),
        *(f"{_TOWER}.blocks.0.mlp.fc1.weight", "aligner.layers.0.weight"),
        *(f"{_VQ}.quantize.embedding.weight", "gen_head.output_mlp_projector.weight"),
    ),
    3: (f"{_TOWER}.pos_embed",),
    4: (
        f"{_TOWER}.patch_embed.proj.weight",
        f"{_VQ}.encoder.conv_in.weight",
        f"{_VQ}.decoder.conv_out.weight",
    ),
}


def transformers_config(config: Json, shapes: Shapes, meta: Json, *, tied: bool) -> JanusConfig:
    """The configuration of transformers' Janus for a checkpoint in the original layout.

    Args:
        config: config.json of the original.
        shapes: of its tensors, under their original names; none of `names.is_unread` is needed.
        meta: meta.json, or an empty mapping.
        tied: whether the text head is the text embedding. transformers' default is True, which would overwrite a
            checkpoint's own head.

    Raises ValueError where configuration and tensors contradict each other, or for parts that Janus-Pro does not have.
    """
    _check_parts(config)
    _check_axes(shapes)
    try:
        text = _text_config(config.get("language_config", {}), shapes)
        vision = _vision_config(config, shapes, meta)
        vq = _vq_config(shapes)
    except KeyError as error:
        raise ValueError(
            f"a Janus in the original layout must hold the tensor {error.args[0]}; this checkpoint does not. "
            "Take all files of the checkpoint, or another one."
        ) from error
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=tied)


def original_config(config: JanusConfig, shapes: Shapes) -> dict[str, Any]:
    """config.json of the original layout; `shapes` are those of the original tensors.

    The vision tower goes by its published name if it has one; otherwise its heads are stated beside the name, and the
    original code needs an entry for it.
    """
    parts: Any = config
    text, vision = parts.text_config, parts.vision_config
    head, embedding = shapes["gen_head.output_mlp_projector.weight"], shapes["gen_embed.weight"]
    tower = {
        "image_size": vision.image_size,
        "model_name": _tower_name(vision),
        "select_feature": "same",
        "select_layer": -1,
    }
    if tower["model_name"] not in TOWERS:
        tower["heads"] = vision.num_attention_heads
    aligner = {"depth": vision.depth, "input_dim": vision.hidden_size, "n_embed": vision.projection_dim}
    generation = {
        "depth": _count(r"gen_aligner\.layers\.(\d+)\.weight", shapes),
        "input_dim": embedding[1],
        "n_embed": text.hidden_size,
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": str(parts.dtype).removeprefix("torch.") if parts.dtype is not None else None,
        "vision_config": _part("vision", "CLIPVisionTower", tower),
        "aligner_config": _part("aligner", "MlpProjector", {**aligner, "projector_type": "mlp_gelu"}),
        "gen_vision_config": _part(
            "gen_vision", "VQ-16", {"image_token_size": embedding[0], "n_embed": embedding[1]}
        ),
        "gen_aligner_config": _part(
            "gen_aligner", "MlpProjector", {**generation, "projector_type": "mlp_gelu"}
        ),
        "gen_head_config": _part(
            "gen_head",
            "vision_head",
            {"image_token_embed": head[0], "image_token_size": embedding[0], "n_embed": head[1]},
        ),
        "language_config": _language_config(text, bool(parts.tie_word_embeddings)),
    }


def _check_parts(config: Json) -> None:
    """Raise ValueError for projectors and features that the Janus of transformers does not have."""
    wanted = {
        ("aligner_config", "projector_type"): ("mlp_gelu", "linear"),
        ("gen_aligner_config", "projector_type"): ("mlp_gelu", "linear"),
        ("vision_config", "select_feature"): ("same",),
    }
    for (part, key), known in wanted.items():
        value = config.get(part, {}).get("params", {}).get(key, known[0])
        if value not in known:
            raise ValueError(
                f"{part}.params.{key} must be {' or '.join(known)}, as in Janus-Pro; config.json has {value!r}. "
                "This model is not a Janus-Pro."
            )


def _check_axes(shapes: Shapes) -> None:
    """Raise ValueError for a tensor that sizes are read from and that has another number of axes."""
    for axes, names in _AXES.items():
        for name in names:
            if name in shapes and len(shapes[name]) != axes:
                raise ValueError(
                    f"{name} must have {axes} axes; got the shape {list(shapes[name])}. "
                    "Copy or download the checkpoint again."
                )


def _text_config(language: Json, shapes: Shapes) -> LlamaConfig:
    vocabulary, hidden = shapes["language_model.model.embed_tokens.weight"]
    queries, keys = (shapes[f"{_LAYER}.self_attn.{part}_proj.weight"][0] for part in "qk")
    heads = language.get("num_attention_heads", LlamaConfig().num_attention_heads)
    size = language.get("head_dim") or queries // heads
    read = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes[f"{_LAYER}.mlp.gate_proj.weight"][0],
        "num_hidden_layers": _count(r"language_model\.model\.layers\.(\d+)\.input_layernorm\.weight", shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": keys // size,
        "head_dim": size,
        "attention_bias": f"{_LAYER}.self_attn.q_proj.bias" in shapes,
        "mlp_bias": f"{_LAYER}.mlp.gate_proj.bias" in shapes,
    }
    wrong = {
        key: value for key, value in read.items() if value is not None and language.get(key, value) != value
    }
    if wrong:
        raise ValueError(
            "language_config must agree with the tensors; "
            + ", ".join(
                f"{key} is {language[key]} and the tensors say {value}" for key, value in wrong.items()
            )
            + ". Take config.json and weights from one checkpoint."
        )
    stated = {
        key: value
        for key, value in language.items()
        if not key.startswith("_") and key not in ("torch_dtype", "tie_word_embeddings", "model_type")
    }
    return LlamaConfig(**{**stated, **read})


def _vision_config(config: Json, shapes: Shapes, meta: Json) -> JanusVisionConfig:
    stated = config.get("vision_config", {}).get("params", {})
    width, channels, patch, _ = shapes[f"{_TOWER}.patch_embed.proj.weight"]
    grid = math.isqrt(shapes[f"{_TOWER}.pos_embed"][1])
    image = stated.get("image_size", grid * patch)
    if image // patch != grid:
        raise ValueError(
            f"vision_config.image_size must fit the position embedding, {grid} x {grid} patches of {patch} pixels; "
            f"got {image}. Take config.json and weights from one checkpoint."
        )
    return JanusVisionConfig(
        hidden_size=width,
        num_hidden_layers=_count(rf"{_TOWER}\.blocks\.(\d+)\.norm1\.weight", shapes),
        num_attention_heads=_tower_heads(width, stated, meta.get("vision_tower", {})),
        num_channels=channels,
        patch_size=patch,
        image_size=image,
        mlp_ratio=_ratio(shapes[f"{_TOWER}.blocks.0.mlp.fc1.weight"][0], width),
        projection_dim=shapes["aligner.layers.0.weight"][0],
        depth=_count(r"aligner\.layers\.(\d+)\.weight", shapes),
        num_image_tokens=grid * grid,
    )


def _tower_heads(width: int, stated: Json, meta: Json) -> int:
    """Heads of the vision tower: as stated, else of the published tower of this name, else a guess with a warning."""
    name = stated.get("model_name")
    for source in (meta, stated):
        if "heads" in source:
            return int(source["heads"])
    if name in TOWERS and TOWERS[name][0] == width:
        return TOWERS[name][1]
    heads = next(
        (heads for heads in (width / _HEAD_SIZE, 16, 8, 4, 2) if heads >= 1 and width % heads == 0), 1
    )
    warnings.warn(
        f"the vision tower {name!r} of width {width} is none of {', '.join(TOWERS)}, and its number of heads stands in "
        f"no tensor: {int(heads)} is a guess. It matters for reading images, not for drawing them; state it as "
        "vision_config.params.heads in config.json.",
        stacklevel=2,
    )
    return int(heads)


def _tower_name(vision: Any) -> str:
    size = (vision.hidden_size, vision.num_attention_heads)
    patch = f"patch{vision.patch_size}"
    known = [name for name, tower in TOWERS.items() if tower == size and patch in name]
    return next(
        (name for name in known if name.endswith(str(vision.image_size))),
        (known or ["siglip_unpublished"])[0],
    )


def _vq_config(shapes: Shapes) -> JanusVQVAEConfig:
    base, channels = shapes[f"{_VQ}.encoder.conv_in.weight"][:2]
    codes, dimension = shapes[f"{_VQ}.quantize.embedding.weight"]
    levels = _count(rf"{_VQ}\.encoder\.conv_blocks\.(\d+)\.res\.0\.conv1\.weight", shapes)
    widths = [shapes[f"{_VQ}.encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in range(levels)]
    if any(width % base for width in widths):
        raise ValueError(
            f"VQ widths must be multiples of {base}, the first; got {widths}. This is no Janus VQ model."
        )
    embedded, width = shapes["gen_head.output_mlp_projector.weight"]
    return JanusVQVAEConfig(
        embed_dim=dimension,
        num_embeddings=codes,
        latent_channels=shapes[f"{_VQ}.encoder.conv_out.weight"][0],
        in_channels=channels,
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=_count(rf"{_VQ}\.encoder\.conv_blocks\.0\.res\.(\d+)\.conv1\.weight", shapes),
        out_channels=shapes[f"{_VQ}.decoder.conv_out.weight"][0],
        projection_dim=embedded,
        num_hidden_layers=_count(r"gen_aligner\.layers\.(\d+)\.weight", shapes),
        image_token_embed_dim=width,
    )


def _language_config(text: Any, tied: bool) -> dict[str, Any]:
    """Fields of a Llama as transformers 4 reads them, which is what the original code runs on."""
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    rope = dict(text.rope_parameters or {})
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = {key: getattr(text, key) for key in keys} | {"rope_theta": rope.get("rope_theta", 10000.0)}
    if scaling.get("rope_type", "default") != "default":
        fields["rope_scaling"] = scaling
    return {"model_type": "llama", "tie_word_embeddings": tied, **fields}


def _part(kind: str, name: str, params: Json) -> dict[str, Any]:
    return {"model_type": kind, "cls": name, "params": dict(params)}


def _ratio(hidden: int, width: int) -> float:
    """The ratio r of which transformers takes `int(width * r)`, which must give `hidden` in spite of rounding."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _count(pattern: str, names: Iterable[str]) -> int:
    """How many different numbers stand at the group of `pattern` in the names it matches."""
    return len({found[1] for name in names if (found := re.fullmatch(pattern, name))})
