"""Do tokens that look alike carry advantages of opposite sign? The claim that STAGE stands on, counted.

A pair is one position of two images of a prompt. STAGE (arXiv 2509.25027, section 3) says that many pairs whose tokens
are alike are pushed in opposite directions because one image was good and the other was not, as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage.objective.similarity import SMALLEST_NORM


@dataclass(frozen=True)
class Conflict:
    """Pairs by the cosine of their codes.

    Bin b holds cosines from `edges[b]` up to `edges[b + 1]`, the last bin its upper edge too. `pairs` and `opposed` int
    `[bins]` count all pairs and those with advantages of opposite sign. `same` and `same_opposed` count the pairs that
    drew the very same token, which stand in the last bin as well.
    """

    edges: tuple[float, ...]
    pairs: Tensor
    opposed: Tensor
    same: int
    same_opposed: int

    @property
    def share(self) -> Tensor:
        """Share of the pairs of each bin that are opposed, float `[bins]`, NaN where there is none."""
        return self.opposed.double() / self.pairs.double()

    @property
    def total(self) -> int:
        return int(self.pairs.sum())


def conflict_by_similarity(
    advantages: Tensor, codes: Tensor, tokens: Tensor, edges: tuple[float, ...]
) -> Conflict:
    """Count the pairs of a rollout.

    Args:
        advantages: A, `[P, G]`. A pair is opposed where `A_i A_j < 0`; an advantage of 0 opposes nothing.
        codes: q, `[P, G, L, C]`.
        tokens: int `[P, G, L]`.
        edges: ascending, from -1 to 1.

    Raises ValueError for other edges.
    """
    bounds = torch.tensor(edges, dtype=torch.float64)
    if len(edges) < 2 or edges[0] != -1 or edges[-1] != 1 or not bool((bounds.diff() > 0).all()):
        raise ValueError(f"edges must ascend from -1 to 1; got {edges}")
    first, second = torch.triu_indices(advantages.shape[1], advantages.shape[1], offset=1)
    signs = advantages.sign().cpu()
    opposed = (signs[:, first] * signs[:, second] < 0)[..., None]  # [P, pairs, 1]
    unit = codes.double().cpu()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    cosine = (unit[:, first] * unit[:, second]).sum(dim=-1).clamp(-1, 1)  # [P, pairs, L]
    place = (torch.bucketize(cosine, bounds, right=True) - 1).clamp(0, len(edges) - 2)
    opposed = opposed.expand_as(place)
    same = tokens.cpu()[:, first] == tokens.cpu()[:, second]
    size = len(edges) - 1
    return Conflict(
        edges=tuple(edges),
        pairs=torch.bincount(place.flatten(), minlength=size),
        opposed=torch.bincount(place[opposed], minlength=size),
        same=int(same.sum()),
        same_opposed=int((same & opposed).sum()),
    )
