"""Rewards with random weights at the shapes of published models, and what they are timed on.

Batch sizes and thresholds are those of conf/reward.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage.rewards.gdino import GDinoReward
from stage.rewards.git import GITReward
from stage.rewards.hps import HPSReward
from stage.types import Prompt

GROUP = 8  # images a prompt
DETECTIONS = 8  # the fewest boxes of an image that gdino is timed with
# Where bert-base-uncased has them; GroundingDINO knows these numbers by heart.
PLACES = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS = ("yes", "no", "red", "blue", "cat", "dog", "car", "zebra")
BERT_VOCABULARY = 30522
PROMPTS = (
    Prompt(
        0,
        "a red cat and a blue dog",
        {"task_type": "color", "nouns": ["cat", "dog"], "attr_nouns": ["red cat", "blue dog"]},
    ),
    Prompt(1, "a car and a zebra", {"task_type": "object", "nouns": ["car", "zebra"]}),
    Prompt(2, "a dog and a car", {"task_type": "object", "nouns": ["dog", "car"]}),
    Prompt(
        3,
        "a blue car and a red zebra",
        {"task_type": "color", "nouns": ["car", "zebra"], "attr_nouns": ["blue car", "red zebra"]},
    ),
)
CLIP_COLORS: dict[str, list[float]] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def pictures(images: int, side: int) -> Tensor:
    """Random pictures uint8 `[P, GROUP, side, side, 3]`, P prompts of GROUP each, at most four prompts.

    Raises ValueError for a number that is no multiple of GROUP, or too large.
    """
    if images % GROUP or not 0 < images <= GROUP * len(PROMPTS):
        raise ValueError(
            f"images of a timed reward are {GROUP} of each of up to {len(PROMPTS)} prompts; got {images}. Take 32."
        )
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(images, 3, 12, 12, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (-1, GROUP)).contiguous()


def build_hps(folder: Path, device: str, dtype: str, tiny: bool) -> HPSReward:
    """HPSv2.1: CLIP ViT-H-14 of open_clip, or a small one to try the path."""
    import open_clip

    name = tiny_clip(folder) if tiny else "ViT-H-14"
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, device=device)
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.to(_stored(dtype)).state_dict()}, file)
    del model
    return HPSReward(str(file), None, name, device, dtype, batch_size=32)


def tiny_clip(folder: Path) -> str:
    """The name by which open_clip then knows a small CLIP; its configuration is written to `folder`."""
    import open_clip

    name = "stage-speed-tiny"
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return name


def build_git(folder: Path, device: str, dtype: str, tiny: bool) -> GITReward:
    """GIT-large-VQAv2, as in the config.json of microsoft/git-large-vqav2."""
    from transformers import GitConfig, GitForCausalLM

    text: dict[str, Any] = dict(hidden_size=768, num_hidden_layers=6, num_attention_heads=12)
    text |= dict(intermediate_size=3072, max_position_embeddings=1024)
    vision: dict[str, Any] = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    vision |= dict(image_size=420, patch_size=14)
    if tiny:
        text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        text |= dict(max_position_embeddings=40, initializer_range=0.4)
        vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        vision |= dict(image_size=32, patch_size=8)
    tokens: dict[str, Any] = dict(vocab_size=BERT_VOCABULARY, bos_token_id=101, eos_token_id=102)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = GitForCausalLM(GitConfig(vision_config=vision, **tokens, **text))
    model.to(_stored(dtype)).save_pretrained(folder)
    side = vision["image_size"]
    _save_words(folder, 512)
    _save_preprocessor(
        folder, size={"shortest_edge": side}, resample=3, do_center_crop=True,
        crop_size={"height": side, "width": side}, **CLIP_COLORS,
    )  # fmt: skip
    del model
    return GITReward(str(folder), None, device, dtype, batch_size=32)


def build_gdino(folder: Path, device: str, dtype: str, tiny: bool) -> GDinoReward:
    """GroundingDINO with Swin-T, whose shapes are the defaults of transformers. The threshold is still to be set."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    config = GroundingDinoConfig()
    if tiny:
        text: dict[str, Any] = dict(model_type="bert", vocab_size=BERT_VOCABULARY, max_position_embeddings=64)
        text |= dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_size=32)
        backbone = dict(
            model_type="swin", embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4
        )
        config = GroundingDinoConfig(
            backbone_config=backbone | dict(out_indices=[2, 3, 4]), text_config=text, d_model=32, encoder_layers=1,
            decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, num_queries=12, max_text_len=32,
        )  # fmt: skip
    torch.manual_seed(4)
    with torch.device(device):
        model = GroundingDinoForObjectDetection(config)
    heads: Any = model.bbox_embed
    for head in heads:  # zero at first, which puts all boxes of an image in one place
        torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
    model.save_pretrained(folder)
    short, long = (128, 200) if tiny else (800, 1333)
    _save_words(folder, config.max_text_len)
    _save_preprocessor(
        folder, size={"shortest_edge": short, "longest_edge": long}, resample=2, rescale_factor=1 / 255,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    del model
    return GDinoReward(
        str(folder), None, threshold=0.3, released=False, overlap=0.1, near=0.293, suppression=0.5, device=device,
        dtype=dtype, batch_size=16,
    )  # fmt: skip


def lower_threshold(scorer: GDinoReward, images: Tensor, prompts: tuple[Prompt, ...]) -> None:
    """Sets the threshold so that every image `[P, G, H, W, 3]` has at least DETECTIONS boxes over all its nouns."""
    asked = [scorer._mentions(prompt) for prompt in prompts for _ in range(images.shape[1])]
    flat, most = images.flatten(0, 1), max(len(mentions.nouns) for mentions in asked)
    rows = scorer.batches.run(
        lambda batch: scorer._forward(flat, asked, batch, most), list(range(len(asked)))
    )
    best = rows[..., 4:].flatten(1).topk(DETECTIONS, dim=1).values[:, -1]
    scorer.threshold = max(0.0, float(best.min()) * 0.9)  # batches of another size round otherwise


def _stored(dtype: str) -> torch.dtype:
    """Files hold what is computed in: half the bytes to write and read."""
    return torch.float16 if dtype == "float16" else torch.float32


def _save_words(folder: Path, longest: int) -> None:
    """A tokenizer of `WORDS` with the special tokens of BERT in their places."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = PLACES | {word: 1030 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names).save_pretrained(
        folder
    )


def _save_preprocessor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
