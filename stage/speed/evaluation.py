"""An evaluation as GenEval's from prompts to PNG files, and its scorers on what was drawn, on random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.speed.machine import peak_gibibytes, seconds
from stage.speed.models import PROMPT_TOKENS, build_policy
from stage.speed.scorers import pictures, tiny_clip
from stage.types import Detection, Prompt, PromptTokens, Samples

GROUP, GUIDANCE = 4, 5.0  # images a prompt, as GenEval has them; guidance of Janus-Pro
SIDE = 384  # pixels of the images of Janus-Pro
DETECTOR, COLORS = "mask2former swin-s", "clip vit-l-14"
OBJECTS = (
    20  # detections an image: random weights are sure of nothing, so this many are taken whatever their score
)
CROPS = 2  # objects an image whose colour is asked; GenEval asks in two of its six tasks, for one and for two objects
Row = dict[str, float | str]


class TimedSampler:
    """A sampler that adds up the seconds it takes, the device's work included."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.taken = sampler, 0.0

    def __call__(self, policy: JanusPolicy, prompt: PromptTokens, uniforms: Tensor) -> Samples:
        found: list[Samples] = []
        run = lambda: found.append(self.sampler(policy, prompt, uniforms))  # noqa: E731  a closure in one line
        self.taken += seconds(run, policy.device)
        return found[0]


def measure_drawing(
    sizes: Sequence[str], images: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """A row of `drawing_row` for each model.

    Raises ValueError for numbers of images that are no whole prompts.
    """
    if images % GROUP or batch_size % GROUP or not 0 < batch_size <= images:
        raise ValueError(
            f"an evaluation draws {GROUP} images of each prompt, at least one batch: --evaluation {images} and "
            f"--evaluation-batch {batch_size} must be multiples of {GROUP}, the second no larger"
        )
    rows = []
    for size in sizes:
        policy = build_policy(size, device, dtype).requires_grad_(False).eval()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(drawing_row(policy, size, images, batch_size, Path(folder)))
        print(rows[-1], flush=True)
        del policy
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def drawing_row(policy: JanusPolicy, size: str, images: int, batch_size: int, folder: Path) -> Row:
    """Seconds from prompts to files on disk, after a first batch that compiles and captures."""
    sampler = TimedSampler(Sampler(GUIDANCE, 1.0))
    work: Any = sampler  # any callable stands for a sampler
    every = prompts(images // GROUP)
    first = ImageFolder(folder / f"{size}-first", _settings(size), every[: batch_size // GROUP], GROUP)
    draw(policy, work, first, batch_size=batch_size, drawn=_nothing)
    sampler.taken = 0.0
    whole = ImageFolder(folder / size, _settings(size), every, GROUP)
    taken: list[float] = []

    def run() -> None:
        taken.append(
            seconds(lambda: draw(policy, work, whole, batch_size=batch_size, drawn=_nothing), policy.device)
        )

    peak = peak_gibibytes(run, policy.device)
    written = [folder / size / item.file for item in whole.planned]
    return {
        "model": size,
        "images": images,
        "batch": batch_size,
        "seconds": taken[0],
        "images_per_second": images / taken[0],
        "sampling_seconds": sampler.taken,
        "other_seconds": taken[0] - sampler.taken,
        "png_megabytes": sum(file.stat().st_size for file in written) / 1e6,
        "peak_gib": peak,
    }


def measure_scorers(images: int, device: torch.device, tiny: bool) -> list[Row]:
    """Images a second of GenEval's detector, Mask2Former with Swin-S, and of its colour classifier, CLIP ViT-L/14.

    Args:
        images: a multiple of 8.
        tiny: small shapes, to try the path.
    """
    absent = [package for package in ("cv2", "open_clip") if find_spec(package) is None]
    if absent:
        print(f"no scorers: {', '.join(absent)} of the extra `geneval` are not installed", flush=True)
        return []
    side = 48 if tiny else SIDE
    shown = pictures(min(images, 32), side).flatten(0, 1).repeat(-(-images // 32), 1, 1, 1)[:images].numpy()
    thing = Detection((0.0, 0.0, float(side), float(side)), 1.0, np.ones((side, side), dtype=bool))
    sights = [(image, "dog", [thing] * CROPS) for image in shown]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
            detector = build_detector(Path(folder), str(device), dtype, tiny)
            rows.append(_timed(DETECTOR, dtype, images, partial(detector.detect, shown), device))
            colors = build_colors(Path(folder), str(device), dtype, tiny)
            rows.append(_timed(COLORS, dtype, images, partial(colors.colors_in_batches, sights), device))
            print(rows[-2], rows[-1], flush=True)
    return rows


def build_detector(folder: Path, device: str, dtype: str, tiny: bool) -> Any:
    """GenEval's detector with random weights, set as in conf/reward/geneval.yaml; by way of a file of mmdet."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    from stage.detectors.mask2former import Mask2FormerDetector  # of an extra
    from stage.detectors.mask2former_weights import UNREAD, name_in_mmdet

    depths, heads, width = ([2, 2, 18, 2], [3, 6, 12, 24], 96) if not tiny else ([1] * 4, [1, 1, 2, 2], 16)
    backbone: dict[str, Any] = dict(
        embed_dim=width, depths=depths, num_heads=heads, window_size=7 if not tiny else 2,
        out_features=[f"stage{number + 1}" for number in range(4)],
    )  # fmt: skip
    small: dict[str, Any] = dict(
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=4, num_queries=30,
    )  # fmt: skip
    settings: dict[str, Any] = dict(num_labels=80, use_auxiliary_loss=True) | (small if tiny else {})
    config = Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **settings)
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in UNREAD:
            parts.setdefault(name_in_mmdet(name), []).append(tensor)
    file = folder / "mask2former.pth"
    torch.save({"state_dict": {name: torch.cat(several) for name, several in parts.items()}}, file)
    return Mask2FormerDetector(
        str(file), None, min_score=0.0, max_per_image=OBJECTS, scale=(1333, 800) if not tiny else (64, 64),
        round_pixels=True, batch_size=8, device=device, dtype=dtype,
    )  # fmt: skip


def build_colors(folder: Path, device: str, dtype: str, tiny: bool) -> Any:
    """GenEval's colour classifier with random weights; settings of conf/reward/geneval.yaml."""
    import open_clip

    from stage.detectors.clip_colors import ClipColors

    name = tiny_clip(folder) if tiny else "ViT-L-14-quickgelu"
    torch.manual_seed(0)
    file = folder / "clip.pt"
    torch.save(open_clip.create_model(name, pretrained=None).state_dict(), file)
    return ClipColors(str(file), None, name, "#999", batch_size=64, device=device, dtype=dtype)


def prompts(count: int) -> tuple[Prompt, ...]:
    """`count` different prompts of `PROMPT_TOKENS` tokens each."""
    length = PROMPT_TOKENS - 2
    texts = (
        " ".join(
            f"w{word}" for word in [n % 64, n // 64 % 64, *((n + 7 * k) % 64 for k in range(length - 2))]
        )
        for n in range(count)
    )
    return tuple(Prompt(number, text) for number, text in enumerate(texts))


def _timed(name: str, dtype: str, images: int, run: Callable[[], object], device: torch.device) -> Row:
    run()
    taken = seconds(run, device)
    return {
        "scorer": name,
        "dtype": dtype,
        "images": images,
        "seconds": taken,
        "images_per_second": images / taken,
    }


def _settings(size: str) -> dict[str, Any]:
    return {"seed": 0, "checkpoint": f"random {size}"}


def _nothing(images: int) -> None:
    """Nobody watches."""
