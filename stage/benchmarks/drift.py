"""What training costs: how far the tuned model has moved from its base, and what of the base it no longer draws.

Four numbers an image, tuned beside base:

    kl         nats a token. Of the tuned model's own tokens, teacher-forced through both models; the base's is 0.
    entropy    nats a token: of each model on its own tokens.
    distance   mean distance to the other images of its prompt, 1 minus the cosine of features, in [0, 2].
    recall     1 where the base's image lies among those of the model, by T. Kynkaanniemi et al., "Improved Precision
               and Recall Metric for Assessing Generative Models" (arXiv 1904.06991), eq. 1 and 2, with the roles of
               real and generated images taken by base and model. The base is compared with its other images.

All are of the distribution that was sampled, guidance and temperature included. `kl` is the k3 estimator of
`stage.objective.divergence`, unbiased and never negative, as training logs it. Base and tuned images of one place share
their random numbers, so recall is higher than it would be for independent draws. Features are those of the base's own
vision tower, so nothing else need be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stage.benchmarks.benchmark import Benchmark, Rows, Verdict
from stage.benchmarks.evaluation import Candidate, Judged, judged_image, progress
from stage.benchmarks.images import ImageFolder, Images
from stage.objective.divergence import k3
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.policy.understanding import features
from stage.types import Prompt, PromptTokens, map_tensors

Folders = Mapping[str, Mapping[str, Images]]


class DriftBenchmark(Benchmark):
    """`kl`, `entropy`, `distance` and `recall`; see above.

    Args:
        neighbours: k of recall: an image's neighbourhood reaches to its k-th nearest of the same model.
        name, splits, images_per_prompt, rows: see `Benchmark`.
    """

    neighbours: int

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Prompt]],
        images_per_prompt: int,
        rows: Rows,
        neighbours: int,
    ) -> None:
        beside = ("entropy", "distance", "recall")
        super().__init__(name, splits, images_per_prompt, None, "kl", beside, rows, False, False, None)
        object.__setattr__(self, "neighbours", neighbours)
        if images_per_prompt < 2:
            raise ValueError(
                f"a distance is between two images of a prompt, got {images_per_prompt} of each; set "
                "benchmark.images_per_prompt=2 or more"
            )
        least = min(len(prompts) for prompts in splits.values()) * images_per_prompt
        if not 1 <= neighbours < least:
            raise ValueError(
                f"benchmark.neighbours must be at least 1 and less than the {least} images of a model, got {neighbours}"
            )

    @property
    def keeps_tokens(self) -> bool:
        return True

    def check_models(self, sampler: Mapping[str, Any]) -> None:
        """Raises ValueError for samplers whose distribution has no density at single tokens."""
        if sampler.get("reasoning") is not None or not sampler.get("temperature", 1) > 0:
            raise ValueError(
                "drift compares distributions over image tokens, sampled without plans and at a temperature above 0; "
                f"got reasoning {sampler.get('reasoning')!r} and temperature {sampler.get('temperature')}. Set "
                "sampler.reasoning=null and sampler.temperature=1"
            )

    def judge_models(
        self,
        candidates: Sequence[Candidate],
        folders: Folders,
        splits: Sequence[str],
        sampler: Sampler,
        batch_size: int,
        console: Console,
    ) -> list[Judged]:
        """A line for each image, base before tuned. Each model is read once, one after the other."""
        step = max(1, batch_size // self.images_per_prompt)
        passes = len(candidates) + sum(item.role != "base" for item in candidates)
        total = passes * self.images_per_prompt * sum(len(self.prompts(split)) for split in splits)
        own: dict[
            tuple[str, str], tuple[Tensor, Tensor]
        ] = {}  # logps and entropy of its tokens, by role and split
        based: dict[tuple[str, str], Tensor] = {}  # logps of the same tokens under the base
        seen: dict[tuple[str, str], Tensor] = {}
        with progress("drift: scoring", total, 0, console) as advance:
            for item in candidates:
                policy = item.load()
                for split in splits:
                    found = self._scores(policy, folders[item.role][split], split, sampler, step, advance)
                    own[item.role, split] = found
                    if item.role != "base":
                        continue
                    based["base", split] = found[0]
                    for other in candidates:
                        images = folders[other.role][split]
                        seen[other.role, split] = self._features(policy, images, step)
                        if other.role != "base":
                            scores = self._scores(policy, images, split, sampler, step, advance)
                            based[other.role, split] = scores[0]
                del policy
        return [
            line
            for item in candidates
            for split in splits
            for line in self._lines(item, split, folders[item.role][split], own, based, seen)
        ]

    def _lines(
        self,
        item: Candidate,
        split: str,
        images: Images,
        own: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
        based: Mapping[tuple[str, str], Tensor],
        seen: Mapping[tuple[str, str], Tensor],
    ) -> list[Judged]:
        logps, entropy = own[item.role, split]
        mine, base = seen[item.role, split], seen["base", split]
        parts = {
            "kl": k3(logps, based[item.role, split]).mean(-1),
            "entropy": entropy.mean(-1),
            "distance": distances(mine),
            "recall": recalled(base.flatten(0, 1), mine.flatten(0, 1), self.neighbours, item.role == "base")
            .view(base.shape[:2])
            .float(),
        }
        group = self.images_per_prompt
        return [
            judged_image(item, split, images, line, self, _verdict(parts, *divmod(place, group)))
            for place, line in enumerate(images.planned)
        ]

    @torch.no_grad()
    def _scores(
        self,
        policy: JanusPolicy,
        images: Images,
        split: str,
        sampler: Sampler,
        step: int,
        advance: Callable[[int], None],
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy `[P, G, L]`, on the CPU, of the tokens of all images."""
        assert isinstance(images, ImageFolder)
        prompts = self.prompts(split)
        known = policy.tokenize([prompt.text for prompt in prompts])
        tokens = torch.from_numpy(np.stack([images.load_tokens(item) for item in images.planned]))
        tokens = tokens.unflatten(0, (len(prompts), self.images_per_prompt))
        logps, entropy = [], []
        for start in range(0, len(prompts), step):
            rows = slice(start, start + step)
            prompt: PromptTokens = map_tensors(known, lambda part, rows=rows: part[rows])
            found = policy.score(
                prompt,
                tokens[rows].to(policy.device),
                guidance_scale=sampler.guidance_scale,
                temperature=sampler.temperature,
            )
            logps.append(found.logps.float().cpu())
            entropy.append(found.entropy.float().cpu())
            advance(len(prompts[rows]) * self.images_per_prompt)
        return torch.cat(logps), torch.cat(entropy)

    def _features(self, policy: JanusPolicy, images: Images, step: int) -> Tensor:
        """Unit vectors `[P, G, D]` of all images, on the CPU."""
        found = []
        size = step * self.images_per_prompt
        for start in range(0, len(images.planned), size):
            several = np.stack([images.load(item) for item in images.planned[start : start + size]])
            found.append(features(policy, several).cpu())
        return torch.cat(found).unflatten(0, (-1, self.images_per_prompt))


def distances(features: Tensor) -> Tensor:
    """Mean distance `[P, G]` of each image to the others of its prompt, of unit features `[P, G, D]`, G at least 2."""
    group = features.shape[1]
    apart = 1 - features @ features.transpose(1, 2)
    return (apart * (1 - torch.eye(group))).sum(-1) / (group - 1)


def recalled(wanted: Tensor, model: Tensor, neighbours: int, same: bool) -> Tensor:
    """bool `[N]`: whether each of the features `wanted` `[N, D]` lies in the neighbourhood of one of `model` `[M, D]`.

    A neighbourhood reaches to the `neighbours`-th nearest other feature of the model.

    Args:
        same: both are one set; a feature is then not found in its own neighbourhood.
    """
    model = model.double()
    among = torch.cdist(model, model).fill_diagonal_(torch.inf)
    radius = among.kthvalue(neighbours, dim=1).values
    between = among if same else torch.cdist(wanted.double(), model)
    return (between <= radius).any(1)


def _verdict(parts: Mapping[str, Tensor], prompt: int, sample: int) -> Verdict:
    values = {name: float(part[prompt, sample]) for name, part in parts.items()}
    reason = (
        f"KL {values['kl']:.4f} and entropy {values['entropy']:.3f} nats a token, distance {values['distance']:.4f}, "
        f"the base's image {'is' if values['recall'] else 'is not'} within reach"
    )
    return Verdict(values, reason)
