"""Groups of equal rewards give way to groups of spare prompts: the same ones, however many processes there are.

Every process keeps a list of all groups in the order of one process alone: whose they are, and whether their rewards
differ. It is made of what all processes tell one another once a round, so each comes to the same end by itself. The
spare prompts of a round are dealt out in order. At the end whoever holds too many groups hands some to those who hold
too few; only groups of spare prompts ever move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from stage.drawn import Drawn
from stage.ranks import ALONE, Ranks
from stage.types import Prompt, PromptTokens, TokenScores, map_tensors

Make = Callable[[Sequence[Prompt]], tuple[PromptTokens, Drawn, TokenScores | None]]


@dataclass(frozen=True)
class Place:
    """One group: its prompt's id, who holds it as number `index` of their own, and whether its rewards differ.

    A holder is a process, or with a group on several of them these, counted from 0.
    """

    prompt: int
    holder: int
    index: int
    informative: bool


@dataclass(frozen=True)
class Holders:
    """The processes as holders of whole groups, `span` of them each."""

    ranks: Ranks
    span: int

    @property
    def count(self) -> int:
        return self.ranks.world // self.span

    @property
    def mine(self) -> int:
        """Which holder this process is, or is a part of."""
        return self.ranks.rank // self.span

    def deal(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """This holder's part of `prompts`, which is none where there are too few."""
        start, stop = (len(prompts) * part // self.count for part in (self.mine, self.mine + 1))
        return prompts[start:stop]

    def places(self, drawn: Drawn | None, update: int, first: int) -> list[Place]:
        """What all holders have drawn, in order; a holder's groups are counted from `first`. All must call it."""
        mine = []
        if drawn is not None:
            whole = replace(drawn, scores=map_tensors(drawn.scores, self.ranks.whole_group))
            flags = whole.informative(update).tolist()
            mine = [
                [p.id, first + index, flag]
                for index, (p, flag) in enumerate(zip(drawn.prompts, flags, strict=True))
            ]
        rows = self.ranks.gathered(mine)[:: self.span]
        return [
            Place(prompt, holder, index, flag)
            for holder, row in enumerate(rows)
            for prompt, index, flag in row
        ]


def replaced(
    drawn: Drawn,
    make: Make,
    spare: Callable[[int], Sequence[Prompt]] | None,
    *,
    rounds: int,
    update: int,
    ranks: Ranks = ALONE,
    span: int = 1,
) -> tuple[Drawn, int]:
    """As many groups, those of equal rewards replaced as far as `rounds` of spare prompts go, and how many were drawn.

    DAPO's dynamic sampling (arXiv 2503.14476). Departures:
    1. Rounds are limited; what is then missing is filled up with groups of equal rewards.
    2. A group is informative when its rewards differ; the paper asks for right and wrong answers in it.

    All of `ranks` must call it, with the groups that each has. `spare(round)` are prompts for all of them, and the
    number of groups is that of all of them. `make` draws groups, and may wait for other processes: whoever has nothing
    to draw in a round repeats a group that it knows and drops it, while the others draw. With a group on several
    processes, `span` of them, each has its samples of it.
    """
    if rounds == 0 or spare is None:
        return drawn, len(drawn.prompts) * ranks.world // span
    first, holders = drawn, Holders(ranks, span)
    places = holders.places(drawn, update, 0)
    count, spares = len(places), dict[int, Prompt]()
    for number in range(1, rounds + 1):
        if all(place.informative for place in places):
            break
        known = {place.prompt for place in places}
        others = [prompt for prompt in spare(number) if prompt.id not in known]
        if others:
            count += len(others)
            spares |= {prompt.id: prompt for prompt in others}
            mine = holders.deal(others)
            found = make(mine or first.prompts[:1])[1]
            new = holders.places(found if mine else None, update, len(drawn.prompts))
            places, kept = refilled(places, new), holders.mine
            both = drawn.followed_by(found) if mine else drawn
            drawn = both.take([place.index for place in places if place.holder == kept])
            places = renumbered(places)
    return evened(drawn, first, places, spares, holders), count


def refilled(old: Sequence[Place], new: Sequence[Place]) -> list[Place]:
    """As many groups as the old ones: informative ones of both, these first, then uninformative old ones."""
    good = [place for place in (*old, *new) if place.informative]
    return [*good, *(place for place in old if not place.informative)][: len(old)]


def renumbered(places: Sequence[Place]) -> list[Place]:
    """The same places where every holder has its groups in this order."""
    counts: dict[int, int] = {}
    found = []
    for place in places:
        index = counts.setdefault(place.holder, 0)
        counts[place.holder] += 1
        found.append(replace(place, index=index))
    return found


def moves(places: Sequence[Place], holders: int, movable: Collection[int]) -> list[tuple[Place, int]]:
    """Which groups go to which holder, so that all have equally many: the last movable ones of who has too many."""
    each = len(places) // holders
    held = [[place for place in places if place.holder == holder] for holder in range(holders)]
    targets = [holder for holder, own in enumerate(held) for _ in range(each - len(own))]
    given: list[Place] = []
    for own in held:
        surplus = max(0, len(own) - each)
        free = [place for place in own if place.prompt in movable]
        given += free[len(free) - surplus :]
    return list(zip(given, targets, strict=True))


def evened(
    drawn: Drawn, first: Drawn, places: Sequence[Place], spares: Mapping[int, Prompt], holders: Holders
) -> Drawn:
    """The groups of this holder after all moves; `first` has groups of the same shapes, `spares` the prompts by id."""
    moving, ranks, mine = moves(places, holders.count, spares), holders.ranks, holders.mine
    if not moving:
        return drawn
    said = ranks.gathered([drawn.scores.reasons[place.index] for place, _ in moving if place.holder == mine])
    given = [place.index for place, _ in moving if place.holder == mine]
    found = drawn.take([index for index in range(len(drawn.prompts)) if index not in given])
    part = ranks.rank % holders.span
    for place, target in moving:
        ends = place.holder * holders.span + part, target * holders.span + part
        reasons = said[ends[0]].pop(0)
        group = drawn.take([place.index]) if mine == place.holder else first.take([0])
        cross = partial(ranks.hand_over, source=ends[0], target=ends[1])
        handed = Drawn(
            prompts=(spares[place.prompt],),
            samples=map_tensors(group.samples, cross),
            images=cross(group.images),
            codes=cross(group.codes),
            scores=replace(map_tensors(group.scores, cross), reasons=(tuple(reasons),)),
        )
        found = found.followed_by(handed) if mine == target else found
    return found
