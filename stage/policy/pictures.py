"""What the VQ decoder makes of image tokens: pictures, and the features it holds on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Pixels that go through the VQ decoder together. A CPU is fastest while the activations stay in its cache: 64
# images of 96 pixels took half the time in chunks of 3 to 8 that they took at once. A GPU wants to be filled.
DECODE_PIXELS = {"cpu": 2**15, "cuda": 2**20}
DECODE_IMAGES = 64  # and never more: a chunk is always full


def decoded(vq: Any, processor: Any, tokens: Tensor, side: int) -> Tensor:
    """Tokens `[N, L]` to uint8 pictures `[N, H, W, 3]` of `side` pixels.

    The VQ model gives pixels x; a picture is the integer part of 255 (x std + mean), clipped to [0, 255], with mean
    and std of the processor.
    """
    size = DECODE_PIXELS.get(tokens.device.type, 2**20) // side**2
    size = min(max(1, size), DECODE_IMAGES)
    # The last chunk is filled up: a convolution of another batch size may round otherwise, and an image must not
    # depend on how many are decoded with it.
    filled = torch.cat([tokens, tokens[-1:].expand(-len(tokens) % size, -1)])
    statistics = torch.tensor([processor.image_mean, processor.image_std]).to(
        tokens.device, non_blocking=True
    )
    return torch.cat([_chunk(vq, statistics, part) for part in filled.split(size)])[: len(tokens)]


def _chunk(vq: Any, statistics: Tensor, tokens: Tensor) -> Tensor:
    # Channels last: convolutions take two thirds of the time on a CPU, and the output is wanted so anyway.
    latent = _latent(vq, tokens).contiguous(memory_format=torch.channels_last)
    pixels = vq.decoder(latent).float().permute(0, 2, 3, 1)
    mean, std = statistics
    return ((pixels * std + mean) * 255).clamp(0, 255).to(torch.uint8)


def features(vq: Any, tokens: Tensor) -> Tensor:
    """Features `[N, L, D]` of tokens `[N, L]`, float32: what the VQ decoder holds before it first upsamples."""
    found = [
        vq.decoder.mid(vq.decoder.conv_in(_latent(vq, part))).flatten(2).transpose(1, 2).float()
        for part in tokens.split(DECODE_IMAGES)
    ]
    return torch.cat(found)


def _latent(vq: Any, tokens: Tensor) -> Tensor:
    found: Tensor = vq.post_quant_conv(vq.quantize.get_codebook_entry(tokens))
    return found
