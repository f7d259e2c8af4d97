"""ImageReward from its published names, beside BLIP and the head written out on the tensors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from stage.rewards.imagereward import ImageRewardReward, Rater, read_rater
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_bert import VOCABULARY, save_tokenizer
from tests.rewards.tiny_towers import PROMPTS, pictures

VISION, TEXT, PATCH, SIDE, LAYERS = 128, 64, 8, 32, 2
MEAN, STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)
State = dict[str, Tensor]


def published() -> State:
    """Seeded random tensors under the names and shapes of ImageReward.pt, but narrow and shallow."""
    state, generator = {}, torch.Generator().manual_seed(11)

    def add(name: str, *shape: int, norm: bool = False) -> None:
        scale = 0.3 if norm else shape[-1] ** -0.5 if len(shape) == 2 else 0.2
        state[name] = torch.randn(*shape, generator=generator) * scale + (1.0 if norm else 0.0)

    def both(name: str, *shape: int, norm: bool = False) -> None:
        add(f"{name}.weight", *shape, norm=norm)
        add(f"{name}.bias", shape[0])

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{vision}.cls_token", 1, 1, VISION)
    add(f"{vision}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, VISION)
    both(f"{vision}.patch_embed.proj", VISION, 3, PATCH, PATCH)
    both(f"{vision}.norm", VISION, norm=True)
    for i in range(LAYERS):
        block = f"{vision}.blocks.{i}"
        both(f"{block}.norm1", VISION, norm=True)
        both(f"{block}.norm2", VISION, norm=True)
        both(f"{block}.attn.qkv", 3 * VISION, VISION)
        both(f"{block}.attn.proj", VISION, VISION)
        both(f"{block}.mlp.fc1", 80, VISION)
        both(f"{block}.mlp.fc2", VISION, 80)
        layer = f"{text}.encoder.layer.{i}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            both(f"{layer}.{kind}.self.query", TEXT, TEXT)
            both(f"{layer}.{kind}.self.key", TEXT, width)
            both(f"{layer}.{kind}.self.value", TEXT, width)
            both(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            both(f"{layer}.{kind}.output.LayerNorm", TEXT, norm=True)
        both(f"{layer}.intermediate.dense", 72, TEXT)
        both(f"{layer}.output.dense", TEXT, 72)
        both(f"{layer}.output.LayerNorm", TEXT, norm=True)
    add(f"{text}.embeddings.word_embeddings.weight", len(VOCABULARY), TEXT)
    add(f"{text}.embeddings.position_embeddings.weight", 48, TEXT)
    both(f"{text}.embeddings.LayerNorm", TEXT, norm=True)
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    both("blip.vision_proj", 16, VISION)
    both("blip.text_proj", 16, TEXT)
    sizes = (TEXT, 1024, 128, 64, 16, 1)
    for name, before, after in zip("02467", sizes[:-1], sizes[1:], strict=True):
        both(f"mlp.layers.{name}", after, before)
    return state


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of 64, `[S, D]` and `[T, D]`."""
    parts = []
    for start in range(0, q.shape[1], 64):
        cut = slice(start, start + 64)
        parts.append((q[:, cut] @ k[:, cut].T / 8.0).softmax(-1) @ v[:, cut])
    return torch.cat(parts, -1)


def rating(state: State, image: Tensor, ids: list[int]) -> float:
    """One image `[32, 32, 3]` and unpadded tokens, in float64. Layer norms: 1e-6 in the image, 1e-12 in the text."""
    w = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    pixels = ((image.double() / 255 - MEAN.double()) / STD.double()).permute(2, 0, 1)
    kernel = w[f"{vision}.patch_embed.proj.weight"].flatten(1)
    cuts = [
        pixels[:, y : y + PATCH, x : x + PATCH].flatten()
        for y in range(0, SIDE, PATCH)
        for x in range(0, SIDE, PATCH)
    ]
    patches = torch.stack(cuts) @ kernel.T + w[f"{vision}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{vision}.cls_token"][0], patches]) + w[f"{vision}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{vision}.blocks.{i}"
        q, k, v = apply(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + apply(f"{block}.attn.proj", attend(q, k, v))
        x = x + apply(f"{block}.mlp.fc2", gelu(apply(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{vision}.norm", x, 1e-6)

    embeddings = f"{text}.embeddings"
    y = (
        w[f"{embeddings}.word_embeddings.weight"][ids]
        + w[f"{embeddings}.position_embeddings.weight"][: len(ids)]
    )
    y = norm(f"{embeddings}.LayerNorm", y, 1e-12)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for kind, memory in (("attention", None), ("crossattention", seen)):
            source = y if memory is None else memory
            q, k, v = (
                apply(f"{layer}.{kind}.self.{part}", y if part == "query" else source)
                for part in ("query", "key", "value")
            )
            out = apply(f"{layer}.{kind}.output.dense", attend(q, k, v))
            y = norm(f"{layer}.{kind}.output.LayerNorm", out + y, 1e-12)
        inner = gelu(apply(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", apply(f"{layer}.output.dense", inner) + y, 1e-12)
    value = y[0]
    for name in "02467":
        value = apply(f"mlp.layers.{name}", value)
    return float((value[0] - 0.16717362830052426) / 1.0333394966054072)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, Any]]:
    folder, state = tmp_path_factory.mktemp("imagereward"), published()
    torch.save(state, folder / "ImageReward.pt")
    save_tokenizer(folder)
    settings = {
        "path": str(folder),
        "tokenizer_path": str(folder),
        "revision": None,
        "tokenizer_revision": None,
    }
    return state, {**settings, "device": "cpu", "dtype": "float32", "batch_size": 4}


def test_scores_are_blip_and_the_head(files: Any) -> None:
    from tokenizers import Tokenizer

    state, settings = files
    images = pictures(3, 2, SIDE, SIDE)
    scores = ImageRewardReward(**settings)(images, PROMPTS)
    tokenizer = Tokenizer.from_file(f"{settings['path']}/tokenizer.json")
    expected = torch.zeros(3, 2)
    for p, prompt in enumerate(PROMPTS):
        for g in range(2):
            expected[p, g] = rating(state, images[p, g], tokenizer.encode(prompt.text).ids[:35])
    torch.testing.assert_close(scores.parts[..., 0], expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1 and scores.reasons[2][1] == f"ImageReward {expected[2, 1]:.3f}"


def test_batch_size_does_not_matter(files: Any) -> None:
    images = pictures(3, 3, 40, 60)
    found = [ImageRewardReward(**{**files[1], "batch_size": n})(images, PROMPTS).parts for n in (1, 4, 9)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)


def test_files_that_do_not_fit(files: Any, tmp_path: Path) -> None:
    state, file = files[0], tmp_path / "ImageReward.pt"
    for changes, words in (
        ({"mlp.layers.0.bias": None}, r"lacks 1 tensors \(head\.0\.bias\)"),
        ({"blip.itm_head.bias": torch.zeros(2)}, r"besides 1 tensors \(blip\.itm_head\.bias\)"),
        ({"blip.visual_encoder.pos_embed": None}, "no BLIP under the names"),
        ({"blip.vision_proj.bias": None}, None),
    ):
        torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, file)
        if words is None:
            read_rater(file)  # the projections of pretraining are not needed
        else:
            with pytest.raises(ValueError, match=words):
                read_rater(file)


def test_files_that_are_not_there(files: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download THUDM/ImageReward ImageReward\.pt"):
        ImageRewardReward(**{**files[1], "path": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"hf download google-bert/bert-base-uncased tokenizer\.json"):
        ImageRewardReward(**{**files[1], "tokenizer_path": str(tmp_path)})


def test_the_published_sizes_are_read_from_the_tensors(files: Any) -> None:
    """ImageReward.pt: BLIP with a ViT-L/16 of 224 pixels and BERT-base, without memory for any of it."""
    big = {"pos_embed": (1, 197, 1024), "patch_embed.proj.weight": (1024, 3, 16, 16)}
    big |= {f"blocks.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)}
    sizes = {f"blip.visual_encoder.{name}": shape for name, shape in big.items()}
    text = {
        "embeddings.word_embeddings.weight": (30524, 768),
        "embeddings.position_embeddings.weight": (512, 768),
    }
    text |= {f"encoder.layer.{i}.intermediate.dense.weight": (3072, 768) for i in range(12)}
    sizes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    with torch.device("meta"):
        model = Rater({name: torch.empty(shape) for name, shape in sizes.items()})
    vision, language = model.vision.config, model.text.config
    assert (model.side, vision.num_hidden_layers, vision.num_attention_heads) == (224, 24, 16)
    assert (language.num_hidden_layers, language.num_attention_heads, language.vocab_size) == (12, 12, 30524)
    assert sum(value.numel() for value in model.vision.parameters()) == 303_301_632


def test_a_small_card_and_bad_images(files: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    scorer = ImageRewardReward(**{**files[1], "batch_size": 9})
    images = pictures(3, 3, 40, 60)
    refuses_bad_images(scorer, images, PROMPTS)
    survives_a_small_card(lambda: (scorer, scorer.batches), images, PROMPTS, monkeypatch, caplog)
