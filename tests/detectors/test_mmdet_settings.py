"""The configuration inside a checkpoint: what it asks for and transformers does not do is named, and nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage.detectors.mask2former import Mask2FormerDetector
from stage.detectors.mmdet_checkpoint import read_checkpoint
from stage.detectors.mmdet_settings import require_representable
from tests.detectors.test_mask2former import ARGUMENTS
from tests.detectors.tiny_mask2former import in_mmdet, tiny_model

# As mmdet 3 writes it, and as mmdet 2 does, but for what tensors tell.
THREE = """
custom = dict(num_points=12544)
model = dict(
    backbone=dict(type='SwinTransformer', num_heads=[3, 6, 12, 24], out_indices=(0, 1, 2, 3),
        patch_norm=True, qk_scale=None, with_cp=False, init_cfg=dict(type='Pretrained', checkpoint='https://x')),
    panoptic_head=dict(
        num_transformer_feat_level=3, strides=[4, 8, 16, 32], loss_cls=dict(class_weight=[1.0] * 80 + [0.1]),
        pixel_decoder=dict(act_cfg=dict(type='ReLU'), norm_cfg=dict(num_groups=32, type='GN'), num_outs=3,
            encoder=dict(layer_cfg=dict(
                ffn_cfg=dict(act_cfg=dict(inplace=True, type='ReLU'), num_fcs=2),
                self_attn_cfg=dict(num_heads=8, num_levels=3, num_points=4)))),
        transformer_decoder=dict(layer_cfg=dict(
            cross_attn_cfg=dict(num_heads=8), ffn_cfg=dict(act_cfg=dict(inplace=True, type='ReLU'), num_fcs=2),
            self_attn_cfg=dict(num_heads=8)))),
    train_cfg=dict(num_points=12544),
    type='Mask2Former')
"""
TWO = """
model = dict(
    type='Mask2Former',
    backbone=dict(type='SwinTransformer', strides=(4, 2, 2, 2), use_abs_pos_embed=False, act_cfg=dict(type='GELU')),
    panoptic_head=dict(
        pixel_decoder=dict(encoder=dict(transformerlayers=dict(
            attn_cfgs=dict(type='MultiScaleDeformableAttention', num_heads=8, num_levels=3, num_points=4),
            operation_order=('self_attn', 'norm', 'ffn', 'norm')))),
        transformer_decoder=dict(transformerlayers=dict(
            attn_cfgs=dict(type='MultiheadAttention', num_heads=8),
            operation_order=('cross_attn', 'norm', 'self_attn', 'norm', 'ffn', 'norm')))))
"""


def test_the_official_settings_are_accepted() -> None:
    for meta in (
        {"cfg": THREE},
        {"config": TWO},
        {"cfg": "no = Python ("},
        {"cfg": object()},
        {"config": "model = None"},
        {},
        None,
    ):
        require_representable(meta, Path("weights.pth"))


@pytest.mark.parametrize(
    ("text", "old", "new", "says"),
    [
        (THREE, "'SwinTransformer'", "'ResNet'", "model.backbone.type is 'ResNet' and not 'SwinTransformer'"),
        (THREE, "type='Mask2Former'", "type='MaskFormer'", "model.type is 'MaskFormer'"),
        (THREE, "(0, 1, 2, 3)", "(1, 2, 3)", r"backbone.out_indices is \(1, 2, 3\) and not \(0, 1, 2, 3\)"),
        (THREE, "patch_norm=True", "patch_norm=False", "model.backbone.patch_norm is False"),
        (THREE, "qk_scale=None", "qk_scale=0.5", "model.backbone.qk_scale is 0.5"),
        (THREE, "num_groups=32", "num_groups=16", "pixel_decoder.norm_cfg.num_groups is 16 and not 32"),
        (THREE, "num_levels=3", "num_levels=4", "self_attn_cfg.num_levels is 4 and not 3"),
        (THREE, "num_levels=3, num_points=4", "num_levels=3, num_points=8", "num_points is 8 and not 4"),
        (THREE, "feat_level=3", "feat_level=4", "num_transformer_feat_level is 4"),
        (
            THREE,
            "act_cfg=dict(type='ReLU')",
            "act_cfg=dict(type='GELU')",
            "pixel_decoder.act_cfg is {'type': 'GELU'}",
        ),
        (
            THREE,
            "cross_attn_cfg=dict(num_heads=8)",
            "cross_attn_cfg=dict(num_heads=4)",
            "different numbers of heads",
        ),
        (TWO, "'cross_attn', 'norm', 'self_attn'", "'self_attn', 'norm', 'cross_attn'", "operation_order is"),
        (TWO, "use_abs_pos_embed=False", "use_abs_pos_embed=True", "use_abs_pos_embed is True and not False"),
        (TWO, "'GELU'", "'SiLU'", "backbone.act_cfg is {'type': 'SiLU'} and not {'type': 'GELU'}"),
        (TWO, "(4, 2, 2, 2)", "(2, 2, 2, 2)", r"backbone.strides is \(2, 2, 2, 2\)"),
    ],
)
def test_what_transformers_does_not_do_is_named(text: str, old: str, new: str, says: str) -> None:
    assert text.count(old) == 1
    with pytest.raises(ValueError, match=rf"inside weights\.pth asks for another: .*{says}.*run this one by"):
        require_representable({"cfg": text.replace(old, new)}, Path("weights.pth"))


def test_all_faults_are_named_and_nothing_is_run(tmp_path: Path) -> None:
    text = THREE.replace("num_groups=32", "num_groups=8").replace(
        "type='SwinTransformer'", f"type=open({str(tmp_path / 'ran')!r}, 'w')"
    )
    with pytest.raises(ValueError, match=r"backbone\.type is \"open\(.*; .*num_groups is 8"):
        require_representable({"cfg": text}, Path("weights.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_is_refused_before_it_is_converted(tmp_path: Path, monkeypatch: Any) -> None:
    """Every tensor fits: sixteen groups of 32 channels have the weights of 32 groups."""
    state, file = in_mmdet(tiny_model(), 3), tmp_path / "weights.pth"
    torch.save({"meta": {"cfg": THREE}, "state_dict": state}, file)
    Mask2FormerDetector(str(file), **ARGUMENTS)
    torch.save({"meta": {"cfg": THREE.replace("num_groups=32", "num_groups=16")}, "state_dict": state}, file)
    assert len(read_checkpoint(file)) == len(state)  # mmdet itself may have it
    monkeypatch.setattr("stage.detectors.mask2former.build", None)
    with pytest.raises(ValueError, match="num_groups is 16 and not 32"):
        Mask2FormerDetector(str(file), **ARGUMENTS)
