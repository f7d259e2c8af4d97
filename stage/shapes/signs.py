"""Signs: one word in capital letters on a plain board, one letter a patch, as tensors and as pictures.

The glyphs are those of DejaVu Sans Bold, which comes with matplotlib: it is the same file wherever this package is
installed, and PP-OCR reads it at this size. Every patch is a board colour, or a letter in one of a few readable colour
schemes, so that one image token is one decision that a reader of text can check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stage.shapes.scenes import World

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = len(LETTERS)  # the glyph of a patch without a letter, and the end of a spelt word
SHORTEST, LONGEST = 2, 4
RGB = {
    "white": (244, 244, 244),
    "yellow": (246, 208, 64),
    "blue": (34, 72, 176),
    "black": (26, 26, 30),
    "red": (200, 30, 36),
}
BOARDS = ("white", "yellow", "blue", "black")
# Board and letters: nine pairs with enough contrast that PP-OCR reads all of them.
SCHEMES = (
    ("white", "black"),
    ("white", "red"),
    ("white", "blue"),
    ("yellow", "black"),
    ("yellow", "blue"),
    ("blue", "white"),
    ("blue", "yellow"),
    ("black", "white"),
    ("black", "yellow"),
)
ROWS = ("top", "upper", "lower", "bottom")  # one word a row of the grid
PLAIN = len(BOARDS)  # contents below this are patches without a letter
CONTENTS = PLAIN + len(SCHEMES) * len(LETTERS)

# 4 x 4 patches of 16 pixels; of the rest of a `World` nothing is used.
SIGN_WORLD = World(size=64)
FONT = "DejaVuSans-Bold.ttf"
POINTS = 14
FINE = 4  # glyphs are drawn this much larger and averaged down, so that they can move by quarter pixels
REACH = 2  # furthest a letter moves from the centre of its patch, in quarter pixels


@dataclass(frozen=True)
class Signs:
    """N pictures of L patches in raster order.

    glyph int64 `[N, L]` (index into LETTERS, or BLANK), scheme int64 `[N, L]` (index into SCHEMES), shift int64
    `[N, L, 2]` (x, y in quarter pixels, 0 to 2 REACH, REACH is the centre).
    """

    glyph: Tensor
    scheme: Tensor
    shift: Tensor

    def __len__(self) -> int:
        return self.glyph.shape[0]

    def contents(self) -> Tensor:
        """What each patch shows, int64 `[N, L]`: see `contents`."""
        return contents(self.glyph, self.scheme)


def contents(glyph: Tensor, scheme: Tensor) -> Tensor:
    """Index of what a patch shows, int64 of the shape of both: a board, or PLAIN + scheme * letters + letter."""
    boards = torch.tensor([BOARDS.index(board) for board, _ in SCHEMES], device=scheme.device)
    return torch.where(glyph == BLANK, boards[scheme], PLAIN + scheme * len(LETTERS) + glyph)


@lru_cache(maxsize=1)
def glyphs() -> Tensor:
    """How much ink each pixel of each glyph has: float32 `[27, 2 REACH + 1, 2 REACH + 1, patch, patch]`, 0 to 1.

    The second and third axes are the shift in y and x; the last glyph is BLANK.
    """
    # Both take long to import, and only pretraining and its tests draw letters.
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    patch = SIGN_WORLD.patch
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", FONT), POINTS * FINE)
    side, middle = patch * FINE + 2 * REACH, patch * FINE / 2 + REACH
    height = -font.getbbox("H", anchor="ls")[1]
    drawn = []
    for letter in LETTERS:
        canvas = Image.new("L", (side, side))
        left, _, right, _ = font.getbbox(letter, anchor="ls")
        at = (middle - (left + right) / 2, middle + height / 2)
        ImageDraw.Draw(canvas).text(at, letter, fill=255, font=font, anchor="ls")
        drawn.append(np.asarray(canvas, dtype=np.float32) / 255)
    large = torch.from_numpy(np.stack([*drawn, np.zeros_like(drawn[0])]))
    # A window that starts further left shows the letter further right.
    windows = large.unfold(1, patch * FINE, 1).unfold(2, patch * FINE, 1).flip(1, 2)
    return windows.unflatten(4, (patch, FINE)).unflatten(3, (patch, FINE)).mean(dim=(4, 6))


def render(signs: Signs) -> Tensor:
    """Draws signs: uint8 `[N, size, size, 3]` on their device."""
    device, grid, patch = signs.glyph.device, SIGN_WORLD.grid, SIGN_WORLD.patch
    alpha = glyphs().to(device)[signs.glyph, signs.shift[..., 1], signs.shift[..., 0], ..., None]
    board, ink = (colors[signs.scheme][:, :, None, None] for colors in scheme_colors(device))
    patches = (board + alpha * (ink - board)).round().clamp(0, 255).to(torch.uint8)
    return (
        patches.view(-1, grid, grid, patch, patch, 3)
        .transpose(2, 3)
        .reshape(-1, SIGN_WORLD.size, SIGN_WORLD.size, 3)
    )


def scheme_colors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Colours of board and letters of every scheme, two of float32 `[len(SCHEMES), 3]`, 0 to 255."""
    board, ink = (
        torch.tensor([RGB[pair[side]] for pair in SCHEMES], dtype=torch.float32, device=device)
        for side in (0, 1)
    )
    return board, ink


def spell(words: Sequence[str]) -> Tensor:
    """Letters of words, int64 `[N, LONGEST]`, BLANK after the last.

    Raises ValueError for a word that is not of SHORTEST to LONGEST capital letters.
    """
    for word in words:
        if not SHORTEST <= len(word) <= LONGEST or not set(word) <= set(LETTERS):
            raise ValueError(
                f"a sign holds {SHORTEST} to {LONGEST} capital letters, got {word!r}; choose another word"
            )
    rows = [[LETTERS.index(letter) for letter in word] + [BLANK] * (LONGEST - len(word)) for word in words]
    return torch.tensor(rows, dtype=torch.long).view(len(rows), LONGEST)


def read(letters: Tensor) -> list[str]:
    """The words of `letters` `[N, LONGEST]`."""
    return ["".join(LETTERS[i] for i in row if i != BLANK) for row in letters.tolist()]


def place(letters: Tensor, row: Tensor) -> Tensor:
    """Glyphs `[N, L]` of the words `letters` `[N, LONGEST]` on `row` `[N]` of the grid.

    A word of two letters stands in the middle, a longer one begins at the left edge.
    """
    grid, count = SIGN_WORLD.grid, len(letters)
    length = (letters != BLANK).sum(dim=1, keepdim=True)
    column = torch.arange(LONGEST, device=letters.device) + (grid - length) // 2
    # One patch more than the grid has takes what stands after the end of a word.
    at = torch.where(letters != BLANK, row[:, None] * grid + column, grid * grid)
    glyph = torch.full((count, grid * grid + 1), BLANK, device=letters.device)
    return glyph.scatter(1, at, letters)[:, :-1]


def lay_out(letters: Tensor, scheme: Tensor, row: Tensor, generator: torch.Generator) -> Signs:
    """Signs that show the words `letters` `[N, LONGEST]` in `scheme` `[N]` on `row` `[N]` of the grid."""
    glyph = place(letters, row)
    return Signs(glyph, scheme[:, None].expand_as(glyph), _shifts(glyph, generator))


def quilt(count: int, generator: torch.Generator, device: torch.device) -> Signs:
    """Pictures for the codec: letters anywhere, few or many; in every other picture each patch has its own scheme.

    A codec that sees patches which have nothing to do with their neighbours cannot hide a letter in them.
    """

    def choice(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    cells = SIGN_WORLD.grid**2
    crowded = choice(10, count, cells) < choice(10, count, 1)
    glyph = torch.where(crowded, choice(len(LETTERS), count, cells), BLANK)
    own, common = choice(len(SCHEMES), count, cells), choice(len(SCHEMES), count, 1)
    scheme = torch.where(choice(2, count, 1) == 0, common, own)
    return Signs(glyph, scheme, _shifts(glyph, generator))


def _shifts(glyph: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2 * REACH + 1, (*glyph.shape, 2), generator=generator, device=glyph.device)
