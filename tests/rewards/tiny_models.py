"""Small models of transformers with seeded random weights, in folders like the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stage.rewards.pixels import CLIP_MEAN, CLIP_STD
from tests.rewards.tiny_bert import VOCABULARY, save_preprocessor, save_tokenizer

# Published with microsoft/git-large-vqav2, but for the side of 480.
GIT_PREPROCESSOR = {
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 32},
    "resample": 3,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
# Published with IDEA-Research/grounding-dino-tiny, but for the sides of 800 and 1333.
GDINO_PREPROCESSOR = {
    "size": {"shortest_edge": 128, "longest_edge": 200},
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def save_git(folder: Path) -> None:
    """A small GIT with seeded random weights, in the layout of microsoft/git-large-vqav2."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.4,
        bos_token_id=101,
        eos_token_id=102,
    )
    GitForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, 40)
    save_preprocessor(folder, **GIT_PREPROCESSOR)


def save_gdino(folder: Path) -> None:
    """A small GroundingDINO with seeded random weights, in the layout of IDEA-Research/grounding-dino-tiny."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    torch.manual_seed(4)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 32}
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 4,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 64,
            **small,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=12,
        max_text_len=32,
    )
    model = GroundingDinoForObjectDetection(config)
    heads: Any = model.bbox_embed
    for head in heads:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
    torch.nn.init.normal_(model.model.text_projection.weight, std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder, 64)
    save_preprocessor(folder, **GDINO_PREPROCESSOR)
