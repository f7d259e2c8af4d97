"""Numbers of tokens drawn over the images they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

STRENGTH = 0.62  # of the colour over the image


@dataclass(frozen=True)
class Layer:
    """Numbers for each token, `[G, L]`, with the ends of their colour scale and what they are."""

    title: str
    values: Tensor
    low: float
    high: float
    colors: str


def overlay(image: np.ndarray, values: np.ndarray, low: float, high: float, colors: str) -> np.ndarray:
    """An image with its token numbers as colours over it.

    Args:
        image: uint8 `[H, W, 3]`, shown in grey under the colours.
        values: `[L]` in raster order, L a square.
        low, high: ends of the colour scale; what lies outside has the colour of the end.
        colors: a colour map of matplotlib.

    Returns uint8 `[H, W, 3]`. Raises ValueError where L is no square, or H and W no multiples of its side.
    """
    side = round(len(values) ** 0.5)
    if side * side != len(values) or any(length % side for length in image.shape[:2]):
        raise ValueError(
            f"tokens must cover an image as a square grid; got {len(values)} tokens for {image.shape[:2]} pixels"
        )
    scaled = np.clip((values.reshape(side, side) - low) / (high - low), 0, 1)
    colored = matplotlib.colormaps[colors](scaled)[..., :3]
    colored = colored.repeat(image.shape[0] // side, axis=0).repeat(image.shape[1] // side, axis=1)
    grey = image.astype(np.float64).mean(axis=-1, keepdims=True) / 255
    return np.round(255 * (STRENGTH * colored + (1 - STRENGTH) * grey)).astype(np.uint8)


def map_sheet(
    images: Tensor, layers: Sequence[Layer], captions: Sequence[str], title: str, scale: float = 1.35
) -> Figure:
    """One group: a row a sample with its image, a column a layer, a colour scale under each.

    Args:
        images: uint8 `[G, H, W, 3]`.
        captions: what stands beside each row, for example reward and advantage.
        scale: inches a picture.
    """
    rows, columns = len(images), 1 + len(layers)
    figure = Figure(figsize=(scale * columns + 1.1, scale * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (image, caption) in enumerate(zip(images.cpu().numpy(), captions, strict=True)):
        axes[row][0].imshow(image)
        axes[row][0].set_ylabel(caption, fontsize=7, rotation=0, ha="right", va="center")
        for axis, layer in zip(axes[row][1:], layers, strict=True):
            values = layer.values[row].double().cpu().numpy()
            axis.imshow(overlay(image, values, layer.low, layer.high, layer.colors))
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0][0].set_title("image", fontsize=8)
    for column, layer in enumerate(layers, start=1):
        axes[0][column].set_title(layer.title, fontsize=8)
        norm = matplotlib.colors.Normalize(layer.low, layer.high)
        mappable = matplotlib.cm.ScalarMappable(norm, layer.colors)
        bar = figure.colorbar(mappable, ax=axes[:, column], location="bottom", fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=6)
    return figure


def conflict_chart(
    found: Mapping[str, Sequence[float]], edges: Sequence[float], pairs: Sequence[int]
) -> Figure:
    """Share of opposed pairs by similarity as bars, and above them how many pairs there are.

    Args:
        found: name of a curve to its share in each bin, NaN for an empty one.
        edges: of the bins; pairs: in each bin.
    """
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    counts, shares = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    left, width = np.array(edges[:-1]), np.diff(edges)
    counts.bar(
        left, np.array(pairs) / max(1, sum(pairs)), width, align="edge", color="#5a6b7b", edgecolor="white"
    )
    counts.set_ylabel("share of\nall pairs")
    for number, (name, values) in enumerate(found.items()):
        color = ("#0072b2", "#d55e00", "#009e73")[number % 3]
        shares.stairs(
            np.nan_to_num(np.array(values, dtype=float)), edges, label=name, color=color, linewidth=2
        )
    shares.set_ylim(0, 1)
    shares.set_xlabel("cosine between the codes of two samples at one position")
    shares.set_ylabel("share with\nopposite advantages")
    shares.legend(frameon=False)
    for axis in (counts, shares):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
