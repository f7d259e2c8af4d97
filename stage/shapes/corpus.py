"""Caption and scene pairs for pretraining, drawn as tensors on any device.

The corpus is wrong on purpose, as captions scraped from the web are: a share of the scenes disagrees with its
caption in one colour, one class, one count or one position. A model of such a corpus puts probability on scenes
nobody asked for, and that is the room reinforcement learning has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage.shapes.prompts import HELD_OUT_COLORS, HELD_OUT_PAIRS, RELATIONS, TASKS
from stage.shapes.scenes import CLASSES, COLORS, MAX_OBJECTS, Scenes, World, dress, place

FREE = -1  # a class, colour or relation that the caption leaves open


@dataclass(frozen=True)
class Captions:
    """What each of M captions asks for: kind, color int64 `[M, K]` (FREE where open), count `[M]`, relation `[M]`
    (index into RELATIONS: where object 1 is, seen from object 0), task `[M]` (index into TASKS)."""

    kind: Tensor
    color: Tensor
    count: Tensor
    relation: Tensor
    task: Tensor

    @classmethod
    def read(cls, lines: Sequence[Mapping[str, Any]], device: torch.device) -> Captions:
        """From GenEval metadata lines of this world."""
        rows = [_row(line) for line in lines]
        kind, color, count, relation, task = (
            torch.tensor(column, device=device) for column in zip(*rows, strict=True)
        )
        return cls(kind, color, count, relation, task)


def _row(line: Mapping[str, Any]) -> tuple[list[int], list[int], int, int, int]:
    kinds: list[int] = []
    colors: list[int] = []
    relation = FREE
    for thing in line["include"]:
        kinds += [CLASSES.index(thing["class"])] * thing["count"]
        colors += [COLORS.index(thing["color"]) if "color" in thing else FREE] * thing["count"]
        if "position" in thing:
            relation = RELATIONS.index(thing["position"][0])
    padding = [0] * (MAX_OBJECTS - len(kinds))
    return kinds + padding, colors + [FREE] * len(padding), len(kinds), relation, TASKS.index(line["tag"])


@dataclass(frozen=True)
class Allowed:
    """Which combinations the corpus may show: `color` bool `[classes, colours]`, `pair` bool `[classes, classes]`."""

    color: Tensor
    pair: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Allowed:
        """Everything except the held-out combinations."""
        color = torch.ones(len(CLASSES), len(COLORS), dtype=torch.bool, device=device)
        pair = torch.ones(len(CLASSES), len(CLASSES), dtype=torch.bool, device=device)
        for kind, tone in HELD_OUT_COLORS:
            color[kind, tone] = False
        for a, b in HELD_OUT_PAIRS:
            pair[a, b] = pair[b, a] = False
        return cls(color, pair)


def sample(
    captions: Captions, index: Tensor, noise: float, world: World, generator: torch.Generator
) -> tuple[Scenes, Tensor]:
    """One scene for each caption in `index` `[N]`, and bool `[N]`: does the scene disagree with its caption?

    Args:
        noise: probability that one thing the caption asks for is changed. Changes that would show a held-out
            combination are taken back, so the share of wrong scenes is a little lower.
    """
    device, count = index.device, len(index)
    allowed = Allowed.on(device)
    kind, color = captions.kind[index].clone(), captions.color[index].clone()
    present = torch.arange(MAX_OBJECTS, device=device) < captions.count[index][:, None]
    relation = captions.relation[index].clone()
    wrong = torch.rand(count, generator=generator, device=device) < noise
    kind, present, color, relation = _corrupt(kind, present, color, relation, wrong, allowed, generator)
    color = _fill_colors(kind, color, allowed, generator)
    cells = _cells(present, relation, world, generator)
    changed = (
        (kind != captions.kind[index])
        | ((color != captions.color[index]) & (captions.color[index] != FREE))
        | (present != (torch.arange(MAX_OBJECTS, device=device) < captions.count[index][:, None]))
    )
    disagrees = changed.any(dim=1) | (relation != captions.relation[index])
    return dress(kind, color, present, cells, world, generator), disagrees


def _corrupt(
    kind: Tensor,
    present: Tensor,
    color: Tensor,
    relation: Tensor,
    wrong: Tensor,
    allowed: Allowed,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Changes one thing in each row where `wrong`: a class, a named colour, the number of objects, or the position."""
    device, count = kind.device, kind.shape[0]
    rows = torch.arange(count, device=device)

    def choice(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    amount = present.sum(dim=1)
    slot = choice(MAX_OBJECTS) % amount
    mode = choice(3)
    # Whoever names no colour or position cannot get it wrong: such captions get a wrong class or count instead.
    names_color, names_place = color[rows, slot] != FREE, relation != FREE
    recolor = wrong & names_color & (mode == 0)
    move = wrong & names_place & (mode != 2)
    rest = wrong & ~recolor & ~move
    rekind = rest & (mode != 1)
    recount = rest & (mode == 1)

    new_color = torch.where(recolor, choice(len(COLORS)), color[rows, slot])
    new_kind = torch.where(rekind, choice(len(CLASSES)), kind[rows, slot])
    kind_after, color_after = kind.clone(), color.clone()
    kind_after[rows, slot], color_after[rows, slot] = new_kind, new_color
    legal = _legal(kind_after, color_after, present, allowed)[:, None]
    kind, color = torch.where(legal, kind_after, kind), torch.where(legal, color_after, color)

    more = recount & ((choice(2) == 0) | (amount == 1)) & (amount < MAX_OBJECTS)
    fewer = recount & ~more & (amount > 1)
    # A further object repeats the first, so that no new pair can arise; a missing one is the last.
    kind[rows[more], amount[more]] = kind[rows[more], 0]
    color[rows[more], amount[more]] = color[rows[more], 0]
    after = torch.arange(MAX_OBJECTS, device=device) < (amount + more.long() - fewer.long())[:, None]
    relation = torch.where(move, (relation + 1 + choice(3)) % 4, relation)
    return kind, after, color, relation


def _legal(kind: Tensor, color: Tensor, present: Tensor, allowed: Allowed) -> Tensor:
    """bool `[N]`: no held-out colour on a class and no held-out pair among the present objects."""
    named = (color != FREE) & present
    colors = (allowed.color[kind, color.clamp(min=0)] | ~named).all(dim=1)
    both = present[:, :, None] & present[:, None, :]
    pairs = (allowed.pair[kind[:, :, None], kind[:, None, :]] | ~both).flatten(1).all(dim=1)
    return colors & pairs


def _fill_colors(kind: Tensor, color: Tensor, allowed: Allowed, generator: torch.Generator) -> Tensor:
    """Draws open colours uniformly from those that the corpus shows on that class."""
    weights = allowed.color[kind].float().flatten(0, 1)
    drawn = torch.multinomial(weights, 1, generator=generator).view_as(kind)
    return torch.where(color == FREE, drawn, color)


def _cells(present: Tensor, relation: Tensor, world: World, generator: torch.Generator) -> Tensor:
    """Cells `[N, K]` where the first two objects clearly stand in the asked relation.

    The first of 16 random tries that does; where none does (about 1 in 200 scenes with a relation), the first try.
    """
    device, count = present.device, present.shape[0]
    tries = 16
    cells = place(count * tries, MAX_OBJECTS, world, generator, device).view(count, tries, MAX_OBJECTS)
    row, column = cells // world.grid, cells % world.grid
    dx, dy = column[..., 1] - column[..., 0], row[..., 1] - row[..., 0]
    # Along the asked axis by two cells or more, and never further across it: GenEval wants more than half of the way.
    along = torch.stack([-dx, dx, -dy, dy], dim=-1)
    across = torch.stack([dy, dy, dx, dx], dim=-1).abs()
    holds = (along >= 2) & (across < along)
    asked = relation.clamp(min=0)[:, None, None].expand(-1, tries, 1)
    fits = holds.gather(2, asked)[..., 0] | (relation == FREE)[:, None]
    first = fits.int().argmax(dim=1)
    return cells[torch.arange(count, device=device), first]
