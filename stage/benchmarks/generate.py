"""Stage one of an evaluation: draw the images that a folder lacks.

Every image has its own uniforms, keyed by (seed, prompt id, sample), and every prompt of a split is padded to the same
width whatever is left to draw. So an image does not depend on the batch it is drawn in or on what was finished before.

The batches of a split have one shape, whoever draws them: a last one that is not full is filled with other prompts,
whose images are thrown away, and a prompt that lacks some of its images, after an interruption, is drawn with all of
them. Matrix products of another shape may round otherwise, and a token in ten thousand then
falls on the other side of its uniform number; and on CUDA every shape is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from stage.benchmarks.images import ImageFolder, Planned
from stage.benchmarks.share import WHOLE, Share
from stage.benchmarks.writer import Writer
from stage.policy import drawing
from stage.policy.janus import JanusPolicy
from stage.policy.plans import plan_texts
from stage.policy.sampler import Sampler
from stage.types import map_tensors

UPDATE = 0  # the uniforms of an evaluation do not follow training: before and after must share them


@torch.no_grad()
def draw(
    policy: JanusPolicy,
    sampler: Sampler,
    folder: ImageFolder,
    *,
    batch_size: int,
    drawn: Callable[[int], None],
    share: Share = WHOLE,
) -> int:
    """Draw and save the missing images of `folder`; return how many were made.

    Args:
        batch_size: images drawn at once, at least 1.
        drawn: called with the number of images after each batch is on disk.
        share: of the images, for this process.
    """
    texts = {item.index: item.prompt for item in folder.planned}
    indices = sorted(texts)
    tokens = drawing.tokenize(policy, sampler, [texts[index] for index in indices])
    row = {index: position for position, index in enumerate(indices)}
    wanted = share.of(folder.missing())
    absent = {item.file for item in wanted}
    with Writer(drawn) as writer:
        for batch, fillers in _batches(share.of(folder.planned), absent, indices, batch_size):
            places = [row[group[0].index] for group in batch] + [row[index] for index in fillers]
            rows = torch.tensor(places, device=tokens.ids.device)
            prompt = map_tensors(tokens, lambda tensor, rows=rows: tensor[rows])
            samples = drawing.draw(policy, sampler, prompt, _noise(policy, sampler, batch, len(fillers)))
            drawn_rows = slice(len(batch))
            samples = map_tensors(samples, lambda tensor, kept=drawn_rows: tensor[kept])
            plans = None if samples.plans is None else plan_texts(policy, samples.plans)
            images = policy.decode(samples.tokens).cpu().numpy()
            codes = samples.tokens.cpu().numpy()
            places_of = [
                (p, g) for p, group in enumerate(batch) for g, item in enumerate(group) if item.file in absent
            ]
            writer.write(
                [
                    partial(
                        _save,
                        folder,
                        batch[p][g],
                        images[p, g],
                        codes[p, g],
                        None if plans is None else plans[p][g],
                    )
                    for p, g in places_of
                ]
            )
    return len(wanted)


def _save(
    folder: ImageFolder, item: Planned, image: np.ndarray, tokens: np.ndarray, plan: str | None
) -> None:
    """Everything of one image; the picture last, so that one that exists has the rest."""
    if plan is not None:
        folder.save_plan(item, plan)
    if item.tokens is not None:
        folder.save_tokens(item, tokens)
    folder.save(item, image)


def _batches(
    planned: Sequence[Planned], absent: Set[str], indices: Sequence[int], batch_size: int
) -> Iterator[tuple[list[list[Planned]], list[int]]]:
    """Batches `[P][G]` of at most `batch_size` images, all images of a prompt beside each other where they fit.

    Prompts of which nothing is absent are left out, others have all their images, so that G does not tell what was
    there before. With each batch come the lines of the prompt file that fill it up to as many prompts as any of its G
    has.

    Args:
        planned: all images of the share, and `absent` the files that are to be drawn.
        indices: all lines of the split, whether drawn or not.
    """
    groups = []
    for _, same in groupby(planned, key=lambda item: item.index):
        items = list(same)
        parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        groups += [part for part in parts if any(item.file in absent for item in part)]
    groups.sort(key=len, reverse=True)  # stable: the order of the prompt file within a size
    for size, alike in groupby(groups, key=len):
        rows = list(alike)
        step = min(max(1, batch_size // size), len(indices))
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            there = {group[0].index for group in batch}
            others = [index for index in indices if index not in there] if len(batch) < step else []
            yield batch, others[: step - len(batch)]


def _noise(policy: JanusPolicy, sampler: Sampler, batch: list[list[Planned]], fillers: int) -> drawing.Noise:
    """Noise of P prompts and G samples; entry (p, g) is the one of that image's (seed, prompt id, sample).

    Any numbers do for the prompts that fill the batch up: those of the first.
    """
    group = max(item.sample for items in batch for item in items) + 1
    seed, ids = batch[0][0].seed, [items[0].prompt_id for items in batch]
    rows = torch.arange(len(batch))[:, None]
    columns = torch.tensor([[item.sample for item in items] for items in batch])
    drawn = drawing.noise(policy, sampler, seed, UPDATE, ids, group)

    def chosen(tensor: Tensor) -> Tensor:
        found = tensor[rows, columns]
        return torch.cat([found, found[:1].expand(fillers, *found.shape[1:])])

    return map_tensors(drawn, chosen)
