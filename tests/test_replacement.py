"""Groups of equal rewards and what takes their place: the same groups in one process and in several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.drawn import Drawn
from stage.ranks import ALONE, Ranks, blocks
from stage.replacement import Place, moves, refilled, renumbered, replaced
from stage.types import Prompt, Samples, Scores
from tests.processes import run

GROUP, PROMPTS, CASES, ROUNDS = 4, 6, 40, 3


def row(*groups: tuple[int, bool], holder: int = 0) -> list[Place]:
    """Groups of one holder: prompt and whether its rewards differ."""
    return [Place(prompt, holder, index, good) for index, (prompt, good) in enumerate(groups)]


def test_informative_groups_come_first_and_the_number_stays() -> None:
    found = refilled(row((0, False), (1, True), (2, False)), row((10, False), (11, True), (12, True)))
    assert [place.prompt for place in found] == [1, 11, 12]


def test_what_is_missing_is_filled_with_what_was_there() -> None:
    found = refilled(row((0, False), (1, True), (2, False)), row((10, False)))
    assert [place.prompt for place in found] == [1, 0, 2]


def test_the_last_spare_groups_of_who_has_too_many_go_to_who_has_too_few() -> None:
    second = row((1, True), (12, True), (13, True), (2, False), holder=1)
    places = renumbered([*row((0, True)), *second, *row((3, True), holder=2)])
    found = [(place.prompt, target) for place, target in moves(places, 3, {12, 13})]
    assert found == [(12, 0), (13, 2)]
    assert moves(row((0, True), (1, False)), 1, {}) == []


def reward(case: int, prompt: int, sample: int) -> float:
    """0 throughout for some prompts, in some cases for most."""
    return float(sample * prompt) if (31 * prompt**2 + 17 * case + prompt * case) % 7 < 1 + case % 6 else 0.0


def drawn(case: int, prompts: Sequence[Prompt], samples: slice) -> Drawn:
    """Groups whose every number says which sample of which prompt it is."""
    columns = range(GROUP)[samples]
    marks = torch.tensor([[[100 * p.id + g] * 2 for g in columns] for p in prompts])
    parts = torch.tensor([[[reward(case, p.id, g)] for g in columns] for p in prompts])
    reasons = tuple(tuple(f"{p.id}.{g}" for g in columns) for p in prompts)
    return Drawn(
        prompts=tuple(prompts),
        samples=Samples(marks, marks.double(), temperature=marks[..., 0].float()),
        images=(marks % 256).byte()[..., None, None].expand(-1, -1, -1, 2, 3),
        codes=marks[..., None].float(),
        scores=Scores(parts, ("r",), (1.0,), reasons, gates=torch.ones_like(parts, dtype=torch.bool)),
    )


def numbers(drawn: Drawn) -> torch.Tensor:
    """All that a group consists of, one number beside another."""
    records = *vars(drawn.samples).values(), *vars(drawn.scores).values(), drawn.images, drawn.codes
    return torch.cat([part.flatten().double() for part in records if isinstance(part, torch.Tensor)])


def replace_all(ranks: Ranks, prompts: int) -> list[Any]:
    """What this process keeps in every case, and how many groups were drawn: ids, tokens and the rest, reasons."""
    division = ranks.divide(prompts, GROUP)
    found = []
    for case in range(CASES):
        batch = [Prompt(id, str(id)) for id in range(case, case + prompts)]
        calls: list[int] = []

        def make(asked: Sequence[Prompt], case: int = case, calls: list[int] = calls) -> Any:
            calls.append(len(ranks.gathered(len(asked))))  # as drawing does, it waits for all
            return None, drawn(case, asked, division.samples), None

        def spare(number: int, case: int = case) -> list[Prompt]:
            return [Prompt(id, str(id)) for id in range(case + 2 * number, case + 2 * number + prompts)]

        kept, count = replaced(
            drawn(case, batch[division.prompts], division.samples),
            make,
            spare,
            rounds=ROUNDS,
            update=0,
            ranks=ranks,
            span=division.span,
        )
        expected = drawn(case, kept.prompts, division.samples)
        assert numbers(kept).equal(numbers(expected)) and kept.scores.reasons == expected.scores.reasons
        found.append([[prompt.id for prompt in kept.prompts], count, len(calls)])
    return found


def replace_here(prompts: int) -> list[Any]:
    """`replace_all` as one of the processes of a test."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    span, sharing = max(1, world // prompts), None
    for members in blocks(world, span) if span > 1 else ():
        made = dist.new_group(members)
        sharing = made if rank in members else sharing
    return replace_all(Ranks(rank, world, dist.new_group(list(range(world))), sharing), prompts)


@pytest.mark.parametrize(
    ("world", "prompts"),
    [(2, PROMPTS), (3, PROMPTS), (2, 1), (4, 2)],
    ids=["two", "three", "one group", "pairs"],
)
def test_several_processes_keep_the_groups_of_one(world: int, prompts: int, tmp_path: Path) -> None:
    """With all they consist of, equally many each; a group on two processes counts as one."""
    one = replace_all(ALONE, prompts)
    assert prompts == 1 or len({count for _, count, _ in one}) > 1  # the cases differ
    ranks = run(world, tmp_path, replace_here, prompts)
    span = max(1, world // prompts)
    for case, (ids, count, calls) in enumerate(one):
        found = [rank[case] for rank in ranks]
        assert sorted(id for kept, _, _ in found[::span] for id in kept) == sorted(ids)
        assert all(len(kept) * world == prompts * span for kept, _, _ in found)
        assert {(drawn, made) for _, drawn, made in found} == {(count, calls)}
