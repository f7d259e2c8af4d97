"""Stage one of an evaluation: draw the images that a folder lacks.

Every image has its own uniforms, keyed by (seed, prompt id, sample), and every prompt of a split is padded to the same
width whatever is left to draw. So an image does not depend on the batch it is drawn in or on what was finished before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from stage.benchmarks.images import ImageFolder, Planned
from stage.benchmarks.share import WHOLE, Share
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
    tokens = drawing.tokenize(policy, sampler, [texts[index] for index in sorted(texts)])
    row = {index: position for position, index in enumerate(sorted(texts))}
    made = 0
    for batch in _batches(share.of(folder.missing()), batch_size):
        rows = torch.tensor([row[group[0].index] for group in batch], device=tokens.ids.device)
        prompt = map_tensors(tokens, lambda tensor, rows=rows: tensor[rows])
        samples = drawing.draw(policy, sampler, prompt, _noise(policy, sampler, batch))
        if samples.plans is not None:
            for group, plans in zip(batch, plan_texts(policy, samples.plans), strict=True):
                for item, plan in zip(group, plans, strict=True):
                    folder.save_plan(item, plan)
        images = policy.decode(samples.tokens).cpu().numpy()
        for group, pictures in zip(batch, images, strict=True):
            for item, picture in zip(group, pictures, strict=True):
                folder.save(item, picture)
        count = sum(len(group) for group in batch)
        made += count
        drawn(count)
    return made


def _batches(missing: tuple[Planned, ...], batch_size: int) -> Iterator[list[list[Planned]]]:
    """Batches `[P][G]` of at most `batch_size` images, all images of a prompt beside each other where they fit.

    A prompt that lacks fewer images than its neighbours, after an interruption, goes into a batch with its like.
    """
    groups = []
    for _, same in groupby(missing, key=lambda item: item.index):
        items = list(same)
        groups += [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    groups.sort(key=len, reverse=True)  # stable: the order of the prompt file within a size
    for size, alike in groupby(groups, key=len):
        rows = list(alike)
        step = max(1, batch_size // size)
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def _noise(policy: JanusPolicy, sampler: Sampler, batch: list[list[Planned]]) -> drawing.Noise:
    """Noise of P prompts and G samples; entry (p, g) is the one of that image's (seed, prompt id, sample)."""
    group = max(item.sample for items in batch for item in items) + 1
    seed, ids = batch[0][0].seed, [items[0].prompt_id for items in batch]
    rows = torch.arange(len(batch))[:, None]
    columns = torch.tensor([[item.sample for item in items] for items in batch])
    drawn = drawing.noise(policy, sampler, seed, UPDATE, ids, group)
    return map_tensors(drawn, lambda tensor: tensor[rows, columns])
