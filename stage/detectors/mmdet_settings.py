"""What the configuration inside an mmdet checkpoint asks for, held against what Mask2Former of transformers does.

mmdet writes the text of its configuration beside the weights (`meta.cfg`, in mmdet 2 `meta.config`): assignments of
literals and of `dict(...)`. No tensor has another shape where an activation, a number of groups or the heads of an
attention differ, so that such a model would load and see something else. The text is read as a syntax tree; nothing in
it is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
# Of training, or of memory.
IDLE = ("inplace", "requires_grad")

# Of these settings, wherever they stand in a part of the model, transformers has one value alone.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "backbone": {
        "type": ("SwinTransformer",),
        "patch_size": (4,),
        "strides": ((4, 2, 2, 2),),
        "out_indices": ((0, 1, 2, 3),),
        "qk_scale": (None,),
        "use_abs_pos_embed": (False,),
        "patch_norm": (True,),
        "act_cfg": ({"type": "GELU"},),
        "norm_cfg": ({"type": "LN"},),
    },
    "panoptic_head": {
        "num_groups": (32,),
        "num_points": (4,),
        "num_levels": (3,),
        "num_transformer_feat_level": (3,),
        "num_outs": (3,),
        "num_fcs": (2,),
        "operation_order": (
            ("self_attn", "norm", "ffn", "norm"),
            ("cross_attn", "norm", "self_attn", "norm", "ffn", "norm"),
        ),
        "strides": ((4, 8, 16, 32),),
        "act_cfg": ({"type": "ReLU"},),
    },
}


def require_representable(meta: Any, file: Path) -> None:
    """Checks the configuration in the records of a checkpoint, where there is one.

    Raises:
        ValueError: it asks for what transformers' Mask2Former does not do; says for what, and where.
    """
    texts = [meta.get(name) for name in ("cfg", "config")] if isinstance(meta, Mapping) else []
    for text in texts:
        if isinstance(text, str) and (faults := _faults(_read(text))):
            raise ValueError(
                f"transformers' Mask2Former computes one kind of model, the configuration inside {file} asks for "
                f"another: {'; '.join(faults)}. Give mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco of mmdet's model "
                f"zoo, or run this one by stage.detectors.mmdet in its own environment"
            )


def _faults(settings: Settings) -> list[str]:
    """What the model of the settings has that transformers' has not; empty for settings without a model."""
    model = settings.get("model")
    if not isinstance(model, Mapping):
        return []
    found = [] if model.get("type") in (None, "Mask2Former") else [f"model.type is {model['type']!r}"]
    for part, fixed in FIXED.items():
        for place, name, value in _walk(model.get(part, {}), f"model.{part}"):
            known = fixed.get(name)
            if isinstance(value, Mapping):
                value = {key: inner for key, inner in value.items() if key not in IDLE}
            # Types of attentions and layers inside are mmdet's words for what the names of tensors tell.
            if known is not None and value not in known and (name != "type" or place == f"model.{part}.type"):
                found.append(f"{place} is {value!r} and not {' or '.join(map(repr, known))}")
    heads = {
        value: place
        for place, name, value in _walk(model.get("panoptic_head", {}), "model.panoptic_head")
        if name == "num_heads"
    }
    if len(heads) > 1:
        listed = ", ".join(f"{place} is {value}" for value, place in sorted(heads.items(), key=str))
        found.append(f"the decoders have different numbers of heads ({listed})")
    return found


def _walk(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of each setting in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{place}.{name}", str(name), inner
            yield from _walk(inner, f"{place}.{name}")
    elif isinstance(value, tuple):
        for number, inner in enumerate(value):
            yield from _walk(inner, f"{place}[{number}]")


def _read(text: str) -> dict[str, Any]:
    """The assignments of a configuration; none if it is no text of Python, as another framework may leave."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return {}
    return {
        target.id: _value(line.value)
        for line in tree.body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }


def _value(node: ast.expr) -> Any:
    """A literal, with lists as tuples; what is none, such as a name, as its text."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words):
            return {str(word.arg): _value(word.value) for word in words}
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_value(key)): _value(value) for key, value in pairs if key is not None}
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            return tuple(map(_value, nodes))
        case ast.Constant(value=value):
            return value
        case _:
            return ast.unparse(node)
