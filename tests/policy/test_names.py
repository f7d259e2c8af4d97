"""The names and shapes of Janus-Pro-1B and 7B, listed by hand, are covered by the mapping with none left over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.policy.architecture import TOWERS, original_config, transformers_config
from stage.policy.layout import expected_shapes
from stage.policy.names import (
    Shape,
    is_unread,
    join,
    looks_original,
    original_shapes,
    split,
    split_shape,
    to_original,
    to_transformers,
)

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("janus_pro_1b", "janus_pro_7b")


def published(name: str) -> dict[str, Any]:
    """The facts of the model's published config.json; what it leaves out is transformers' default of a Llama."""
    hidden = {"janus_pro_1b": 2048, "janus_pro_7b": 4096}[name]
    language = {"model_type": "llama", "vocab_size": 102400, "max_position_embeddings": 16384}
    if name == "janus_pro_1b":
        language |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
        language |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    else:
        language |= {"num_hidden_layers": 30}
    projector = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": hidden}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {
                "image_size": 384,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
        "aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": 1024}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": 8}},
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": hidden, "image_token_size": 16384, "n_embed": hidden},
        },
        "language_config": language,
    }


def listed(name: str) -> dict[str, Shape]:
    """The list of a model, with `{a..b}` counted out."""
    found: dict[str, Shape] = {}
    for line in (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        template, *shape = line.split()
        for tensor in counted(template):
            assert tensor not in found
            found[tensor] = tuple(map(int, shape))
    return found


def counted(template: str) -> Iterator[str]:
    blocks = re.search(r"\{(\d+)\.\.(\d+)\}", template)
    if blocks is None:
        yield template
    else:
        for number in range(int(blocks[1]), int(blocks[2]) + 1):
            yield template.replace(blocks[0], str(number))


@pytest.mark.parametrize("name", MODELS)
def test_every_name_and_shape_of_the_published_model(name: str) -> None:
    original = listed(name)
    config = transformers_config(published(name), original, {}, tied=False)
    built = expected_shapes(config)
    mapped: dict[str, Shape] = {}
    for tensor, shape in original.items():
        parts = split_shape(tensor, shape)
        assert not parts.keys() & mapped.keys()
        mapped |= parts
    assert mapped == built  # nothing missing, nothing left over
    assert original_shapes(built) == original
    # 24 blocks with a fused matrix and bias become three each; 13 of the pool and one counter have no place.
    assert len(built) == len(original) + 24 * 2 * 2 - 14


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_there_and_back(name: str) -> None:
    original = listed(name)
    config: Any = transformers_config(published(name), original, {}, tied=False)
    assert config.vision_config.num_attention_heads == 16 and config.vision_config.num_image_tokens == 576
    assert config.text_config.rms_norm_eps == 1e-6 and config.text_config.max_position_embeddings == 16384
    assert config.text_config.num_attention_heads == {"janus_pro_1b": 16, "janus_pro_7b": 32}[name]
    assert tuple(config.vq_config.channel_multiplier) == (1, 1, 2, 2, 4) and not config.tie_word_embeddings
    back = original_config(config, original)
    for part in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        assert back[f"{part}_config"]["params"] == published(name)[f"{part}_config"]["params"], part
    language = published(name)["language_config"]
    assert {key: back["language_config"][key] for key in language} == language
    again: Any = transformers_config(back, original, {}, tied=False)
    for part in ("vision_config", "text_config", "vq_config"):
        assert getattr(again, part).to_dict() == getattr(config, part).to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_the_mapping_is_its_own_inverse(name: str) -> None:
    for original in listed(name):
        names = to_transformers(original)
        assert is_unread(original) == (not names)
        for part, mapped in enumerate(names):
            assert to_original(mapped) == (original, part, len(names))


@pytest.mark.parametrize(
    ("original", "names"),
    [
        ("gen_aligner.layers.0.bias", ("model.generation_aligner.fc1.bias",)),
        ("gen_aligner.layers.2.bias", ("model.generation_aligner.hidden_layers.0.bias",)),
        ("aligner.layers.6.weight", ("model.aligner.hidden_layers.2.weight",)),
        (
            "gen_vision_model.decoder.conv_blocks.11.res.2.nin_shortcut.weight",
            ("model.vqmodel.decoder.up.11.block.2.nin_shortcut.weight",),
        ),
        ("gen_vision_model.encoder.mid.1.q.bias", ("model.vqmodel.encoder.mid.attn_1.q.bias",)),
        ("language_model.model.layers.3.self_attn.rotary_emb.inv_freq", ()),
        (
            "vision_model.vision_tower.blocks.7.attn.qkv.bias",
            tuple(f"model.vision_model.encoder.layers.7.self_attn.{part}_proj.bias" for part in "qkv"),
        ),
    ],
)
def test_names_by_hand(original: str, names: tuple[str, ...]) -> None:
    assert to_transformers(original) == names


@pytest.mark.parametrize(
    "name", ["aligner.layers.1.weight", "vision_tower.norm.weight", "lm_head.weight", "optimizer.step", ""]
)
def test_a_name_of_neither_layout(name: str) -> None:
    with pytest.raises(KeyError):
        to_transformers(name)
    with pytest.raises(KeyError):
        to_original(f"{name}.lora_A")


def test_what_is_split_is_joined() -> None:
    fused = torch.arange(18.0).view(9, 2)
    name = "vision_model.vision_tower.blocks.0.attn.qkv.weight"
    parts = split(name, fused)
    assert list(parts.values())[1].tolist() == [
        [6.0, 7.0],
        [8.0, 9.0],
        [10.0, 11.0],
    ]  # rows 3 to 5 are the keys
    assert torch.equal(join(name, list(parts.values())), fused)
    positions = torch.randn(1, 4, 2)
    parts = split("vision_model.vision_tower.pos_embed", positions)
    assert next(iter(parts.values())).shape == (4, 2)
    assert torch.equal(join("vision_model.vision_tower.pos_embed", list(parts.values())), positions)


def test_a_layout_shows_in_its_names() -> None:
    assert looks_original(["gen_embed.weight"]) and not looks_original(["model.generation_embeddings.weight"])


class TestWhatTensorsDoNotShow:
    """The heads of a vision tower, and configurations that belong to other tensors."""

    shapes = listed("janus_pro_1b")

    def config(self, **params: Any) -> Any:
        """The published configuration with changes to the vision tower's parameters."""
        stated = published("janus_pro_1b")
        stated["vision_config"]["params"] |= params
        return stated

    def heads(self, stated: Any, meta: Any = None) -> int:
        found: Any = transformers_config(stated, self.shapes, meta or {}, tied=True)
        return found.vision_config.num_attention_heads

    def test_meta_and_configuration_come_first(self) -> None:
        assert self.heads(self.config(heads=8)) == 8
        assert self.heads(self.config(heads=8), {"vision_tower": {"heads": 4}}) == 4

    def test_a_guess_is_said(self) -> None:
        with pytest.warns(UserWarning, match="16 is a guess"):
            assert self.heads(self.config(model_name="siglip_new")) == 16  # heads of 64

    def test_a_published_name_counts_only_with_its_width(self) -> None:
        assert TOWERS["siglip_so400m_patch14_384"] == (1152, 16)
        with pytest.warns(UserWarning, match="is a guess"):
            self.heads(self.config(model_name="siglip_so400m_patch14_384"))

    @pytest.mark.parametrize(
        ("part", "changes", "message"),
        [
            ("language_config", {"num_hidden_layers": 30}, "num_hidden_layers is 30 and the tensors say 24"),
            (
                "language_config",
                {"num_key_value_heads": 8},
                "num_key_value_heads is 8 and the tensors say 16",
            ),
            ("language_config", {"hidden_size": 4096}, "hidden_size is 4096"),
        ],
    )
    def test_a_configuration_of_other_tensors(self, part: str, changes: Any, message: str) -> None:
        stated = published("janus_pro_1b")
        stated[part] |= changes
        with pytest.raises(ValueError, match=message):
            self.heads(stated)

    def test_another_image_size_or_projector(self) -> None:
        with pytest.raises(ValueError, match=r"24 x 24 patches of 16 pixels; got 224"):
            self.heads(self.config(image_size=224))
        stated = self.config()
        stated["aligner_config"]["params"]["projector_type"] = "low_high_hybrid_split_mlp_gelu"
        with pytest.raises(ValueError, match="low_high_hybrid_split_mlp_gelu"):
            self.heads(stated)

    def test_a_missing_part(self) -> None:
        shapes = {name: shape for name, shape in self.shapes.items() if not name.startswith("gen_head")}
        with pytest.raises(ValueError, match=r"must hold the tensor gen_head\.output_mlp_projector\.weight"):
            transformers_config(self.config(), shapes, {}, tied=True)

    def test_a_width_whose_ratio_rounds_down(self) -> None:
        """so400m has 4304 hidden units on a width of 1152, a ratio that float division does not give back as is."""
        shapes = dict(self.shapes)
        name = "vision_model.vision_tower.blocks.0.mlp.fc1.weight"
        for hidden in range(4290, 4310):
            shapes[name] = (hidden, 1024)
            found: Any = transformers_config(self.config(), shapes, {}, tied=True)
            assert int(1024 * found.vision_config.mlp_ratio) == hidden
