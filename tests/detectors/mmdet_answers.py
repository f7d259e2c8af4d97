"""What mmdet says, to be run in its own environment: python -m tests.detectors.mmdet_answers WEIGHTS IMAGES ANSWERS.

WEIGHTS holds `state_dict`, `config` with the sizes of the model and, if there, prepared `pixels`; IMAGES is an array of
pictures. ANSWERS gets the last class and mask logits of `pixels`, and what the detector finds in the pictures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage.detectors.mmdet import MmdetDetector


def configuration(sizes: Mapping[str, Any]) -> Any:
    """mmdet's own configuration of the detector that GenEval takes, with other widths and depths."""
    import mmdet
    from mmengine.config import Config

    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "mask2former"
    config = Config.fromfile(folder / "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py")
    width, heads, queries = sizes["feat_channels"], sizes.get("heads", 8), sizes["num_queries"]
    backbone, head = config.model.backbone, config.model.panoptic_head
    backbone.update(embed_dims=sizes["embed_dims"], depths=sizes["depths"], num_heads=sizes["num_heads"])
    backbone.update(window_size=sizes["window"], mlp_ratio=sizes.get("mlp_ratio", 4), init_cfg=None)
    head.update(in_channels=[sizes["embed_dims"] * 2**i for i in range(4)], feat_channels=width)
    head.update(out_channels=sizes.get("out_channels", width), num_queries=queries)
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = width // 2
    head.pixel_decoder.encoder.num_layers = sizes["encoder_layers"]
    encoder = head.pixel_decoder.encoder.layer_cfg
    encoder.self_attn_cfg.update(embed_dims=width, num_heads=heads)
    encoder.ffn_cfg.update(embed_dims=width, feedforward_channels=sizes["encoder_ffn"])
    head.transformer_decoder.num_layers = sizes["decoder_layers"]
    decoder = head.transformer_decoder.layer_cfg
    decoder.self_attn_cfg.update(embed_dims=width, num_heads=heads)
    decoder.cross_attn_cfg.update(embed_dims=width, num_heads=heads)
    decoder.ffn_cfg.update(embed_dims=width, feedforward_channels=sizes["decoder_ffn"])
    return config


def main(weights: str, images: str, answers: str) -> None:
    content = torch.load(weights, weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.py"
        configuration(content["config"]).dump(file)
        detector = MmdetDetector(str(file), weights, min_score=0.0, device="cpu")
    found: dict[str, Any] = {"provenance": detector.provenance}
    if "pixels" in content:
        with torch.no_grad():
            classes, masks = detector.model.panoptic_head(detector.model.extract_feat(content["pixels"]), [])
        found |= {"class_logits": classes[-1], "mask_logits": masks[-1]}
    found["objects"] = [
        {
            name: [(thing.box, thing.score, torch.tensor(thing.mask)) for thing in things]
            for name, things in one.items()
        }
        for one in detector.detect(np.load(images))
    ]
    torch.save(found, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
