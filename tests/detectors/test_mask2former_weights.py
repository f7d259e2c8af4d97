"""The key mapping: back and forth between the names of mmdet 2, mmdet 3 and transformers, and every tensor counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage.detectors.mask2former_weights import build, name_in_mmdet, names_in_transformers
from stage.detectors.mmdet_checkpoint import modern_names
from tests.detectors.tiny_mask2former import in_mmdet, tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "other widths": {"width": 24, "depths": (2, 1, 1, 2), "window": 7},
    "no bias": {"qkv_bias": False, "window": 3},
    "projected": {"hidden": 16, "decoder_layers": 3, "labels": 5},
    "other heads": {"width": 48, "window_heads": (3, 6, 12, 24), "heads": 8, "queries": 11},
    "deep": {"depths": (2, 2, 3, 1), "encoder_layers": 3, "decoder_layers": 4, "heads": 2},
    "shallow": {"depths": (1, 1, 1, 1), "encoder_layers": 1, "decoder_layers": 1, "window": 12},
}


@pytest.mark.parametrize("layout", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_a_model_survives_the_way_through_mmdet(size: str, layout: int) -> None:
    """Every tensor is bit for bit that of the model it began with, and the logits are the same."""
    model = tiny_model(**SIZES[size])
    found = build(modern_names(in_mmdet(model, layout)))
    own = found.state_dict()
    for name, tensor in model.state_dict().items():
        if "swin.layernorm" not in name and not name.startswith("criterion"):
            assert torch.equal(own[name], tensor), name
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected, actual = model(pixel_values=pixels), found(pixel_values=pixels)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, atol=2e-5, rtol=0)
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


def test_the_two_tensors_that_the_model_does_not_read_change_nothing() -> None:
    """The norm left as it is initialised has no influence: another one gives the same logits."""
    model = tiny_model()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(pixel_values=pixels).masks_queries_logits
        model.state_dict()["model.pixel_level_module.encoder.swin.layernorm.weight"].fill_(7.0)
        after = model(pixel_values=pixels).masks_queries_logits
    torch.testing.assert_close(after, before, atol=2e-5, rtol=0)


def test_names_go_both_ways() -> None:
    model = tiny_model(hidden=16)
    state = in_mmdet(model, 3)
    for name in state:
        if not name.endswith("relative_position_index"):
            assert {name_in_mmdet(target) for target in names_in_transformers(name)} == {name}
    targets = [target for name in state for target in names_in_transformers(name)]
    assert len(targets) == len(set(targets))
    assert names_in_transformers("backbone.norm4.weight") == [] and name_in_mmdet("x.weight") == "x.weight"


def test_patches_merge_in_the_stated_order() -> None:
    """Of channels a, b, ...: mmdet has a00 a01 a10 a11 b00 ..., transformers a00 b00 ... a10 b10 ... a01 ... a11 ..."""
    model = tiny_model(width=16)
    state = in_mmdet(model, 3)
    name = "backbone.stages.0.downsample.norm.weight"
    state[name] = torch.arange(64).float()  # channel c, neighbour n (00, 01, 10, 11) at 4 c + n
    norm = build(state).state_dict()[
        "model.pixel_level_module.encoder.swin.encoder.layers.0.downsample.norm.weight"
    ]
    assert norm[:2].tolist() == [0.0, 4.0]  # neighbour 00 of channels 0 and 1
    assert norm[16:18].tolist() == [2.0, 6.0]  # 10
    assert norm[32:34].tolist() == [1.0, 5.0]  # 01
    assert norm[48:50].tolist() == [3.0, 7.0]  # 11


def test_all_faults_are_listed_at_once() -> None:
    state = in_mmdet(tiny_model(), 3)
    del state["backbone.norm2.bias"]
    del state["backbone.stages.1.blocks.1.attn.w_msa.qkv.weight"]
    state["backbone.absolute_pos_embed"] = torch.zeros(1)
    state["backbone.stages.0.downsample.reduction.weight"] = torch.zeros(32, 63)
    state["panoptic_head.mask_embed.4.bias"] = torch.zeros(3)
    state["backbone.stages.0.blocks.0.attn.w_msa.qkv.bias"] = torch.zeros(50)
    state["backbone.stages.2.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
    with pytest.raises(ValueError) as caught:
        build(state)
    text = str(caught.value)
    missing, unexpected, shaped = text.split("; ")
    assert missing.endswith(
        "3 missing: backbone.stages.0.blocks.0.attn.w_msa.qkv.bias, "
        "backbone.stages.1.blocks.1.attn.w_msa.qkv.weight, backbone.norm2.bias"
    )
    assert "3 unexpected: " in unexpected and "backbone.absolute_pos_embed" in unexpected
    assert "relative_position_index (not the usual index)" in unexpected
    assert "qkv.bias (50,) (not 3 equal parts)" in unexpected
    assert (
        "2 mis-shaped: backbone.stages.0.downsample.reduction.weight (as (32, 63) instead of (32, 64))"
        in shaped
    )
    assert "panoptic_head.mask_embed.4.bias (as (3,) instead of (16,))" in shaped


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("panoptic_head.query_feat.weight", None, "panoptic_head.query_feat.weight"),
        ("panoptic_head.query_feat.weight", (6,), "not enough values"),
        ("panoptic_head.pixel_decoder.level_encoding.weight", (3, 40), "32 groups and has 40 channels"),
        (
            "panoptic_head.pixel_decoder.level_encoding.weight",
            (4, 32),
            "3 levels of 4 stages, this model 4 of 4",
        ),
        (
            "panoptic_head.pixel_decoder.encoder.layers.0.self_attn.attention_weights.weight",
            (47, 32),
            "has 47 rows for 3 levels of 4 points",
        ),
    ],
)
def test_sizes_that_cannot_be_read_are_refused(name: str, shape: tuple[int, ...] | None, text: str) -> None:
    state = in_mmdet(tiny_model(), 3)
    del state[name]
    if shape is not None:
        state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=text):
        build(state)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 tensors, first fc\.weight\. Give mask2former_swin-s"):
        build({"fc.weight": torch.zeros(2)})


def test_a_mixture_of_both_layouts_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="its name in mmdet 2"):
        modern_names({**in_mmdet(model, 3), **in_mmdet(model, 2)})
