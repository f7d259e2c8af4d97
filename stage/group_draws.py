"""Groups of samples with their rewards: drawn, decoded and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage.drawn import Drawn
from stage.policy import drawing
from stage.ranks import ALONE, Ranks
from stage.replacement import replaced
from stage.rewards.members import compares_group
from stage.score_checks import check_values
from stage.types import Metrics, Prompt, PromptTokens, Samples, Scorer, Scores, TokenScores, map_tensors


class Stopwatch:
    """Adds up seconds by name. On CUDA it waits for the device, since kernels return before they have run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def draw(
    policy: Any,
    sampler: Any,
    prompts: Sequence[Prompt],
    group_size: int,
    *,
    seed: int,
    update: int,
    samples: slice | None = None,
) -> tuple[PromptTokens, Samples]:
    """Sample `group_size` images of each prompt as tokens `[P, G, L]`, with plans where the sampler reasons.

    The uniforms behind a sample are a function of (seed, update, prompt id, sample index) alone, so it does
    not matter which other prompts are drawn in the same call. Nor which other samples: with `samples` these alone of
    the group are drawn.
    """
    prompt_tokens = tokenized(policy, sampler, prompts)
    ids = [prompt.id for prompt in prompts]
    noise = drawing.noise(policy, sampler, seed, update, ids, group_size, vary=True)
    if samples is not None:
        noise = map_tensors(noise, lambda part: part[:, samples])
    return prompt_tokens, drawing.draw(policy, sampler, prompt_tokens, noise)


def tokenized(policy: Any, sampler: Any, prompts: Sequence[Prompt]) -> PromptTokens:
    """Tokens of prompts as this sampler begins."""
    return drawing.tokenize(policy, sampler, [prompt.text for prompt in prompts])


Drawer = Callable[
    [], AbstractContextManager[Any]
]  # lends the policy as a sampler reads it, for a `with` block


def draw_groups(
    drawer: Drawer,
    sampler: Any,
    scorer: Scorer,
    objective: Any,
    prompts: Sequence[Prompt],
    spare: Callable[[int], Sequence[Prompt]] | None,
    look: Callable[[PromptTokens, Samples], TokenScores] | None,
    *,
    group_size: int,
    seed: int,
    update: int,
    beside: bool,
    watch: Stopwatch,
    samples: slice | None = None,
    ranks: Ranks = ALONE,
) -> tuple[PromptTokens, Drawn, TokenScores | None, int]:
    """Prompt tokens, groups with their rewards, what the reference finds in them, and how many groups were drawn.

    Without rounds of resampling the reference may read while the scorer works; with them the rewards decide first
    which groups it reads. `drawer` is left before scorer and reference come, but stays entered from round to round.
    """
    make = partial(
        draw_and_score,
        drawer,
        sampler,
        scorer,
        features=objective.features,
        group_size=group_size,
        seed=seed,
        update=update,
        watch=watch,
        samples=samples,
        ranks=ranks,
    )
    rounds = objective.resampling_rounds
    with drawer() if rounds else nullcontext() as policy:
        prompt_tokens, first, seen = make(prompts, look=None if rounds else look, beside=beside)
        span = group_size // first.samples.tokens.shape[1]
        kept, count = replaced(first, make, spare, rounds=rounds, update=update, ranks=ranks, span=span)
        if kept is not first:
            prompt_tokens = tokenized(policy, sampler, kept.prompts)
    if rounds and look is not None:
        with watch("reference"):
            seen = look(prompt_tokens, kept.samples)
    return prompt_tokens, kept, seen, count


def draw_and_score(
    drawer: Drawer,
    sampler: Any,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    features: str,
    group_size: int,
    seed: int,
    update: int,
    watch: Stopwatch,
    look: Callable[[PromptTokens, Samples], TokenScores] | None = None,
    beside: bool = False,
    samples: slice | None = None,
    ranks: Ranks = ALONE,
) -> tuple[PromptTokens, Drawn, TokenScores | None]:
    """Samples of these prompts with images, rewards, and the vectors that the policy's method `features` gives.

    With `look` also what it finds in them, at the same time as the rewards where `beside` says so (see `judge`).
    `samples` are those of the group that are wanted, None is all. Where one process fails, all do. What `drawer`
    lends is given back before scorer and reference come.
    """
    with drawer() as policy, ranks.together():
        with watch("sample"):
            prompt_tokens, found = draw(
                policy, sampler, prompts, group_size, seed=seed, update=update, samples=samples
            )
            # The update needs the memory; the next rollout takes it again in a fraction of a second.
            sampler.release()
        with watch("decode"):
            images, codes = policy.decode(found.tokens), getattr(policy, features)(found.tokens)
    looks_back = None if look is None else partial(look, prompt_tokens, found)
    scores, seen = judge(
        scorer, images, prompts, looks_back, beside=beside, watch=watch, samples=samples, ranks=ranks
    )
    return prompt_tokens, Drawn(tuple(prompts), found, images, codes, scores), seen


def check_draws(objective: Any, sampler: Any) -> None:
    """Raise ValueError where samples of a group would be alike, or groups with plans have to be replaced."""
    if sampler.temperature == 0 and not drawing.reasons(sampler):
        raise ValueError(
            "the samples of a prompt must differ for an advantage; got sampler.temperature=0, which gives all of "
            "them the most likely tokens. Set it above 0."
        )
    if objective.resampling_rounds and drawing.reasons(sampler):
        raise ValueError(
            f"groups of equal rewards are not replaced with reasoning, got algorithm.resampling_rounds="
            f"{objective.resampling_rounds}; set it to 0, or sampler.reasoning to null"
        )


def judge(
    scorer: Scorer,
    images: Tensor,
    prompts: Sequence[Prompt],
    looks_back: Callable[[], TokenScores] | None,
    *,
    beside: bool,
    watch: Stopwatch,
    samples: slice | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Scores, TokenScores | None]:
    """The reward of images `[P, G, H, W, 3]`, and what the reference finds in their tokens.

    With `beside` the scorer runs in a thread of its own meanwhile, which is worth it where it waits for a server or has
    a device of its own; on one device the two share it, and memory must do for both. The results are the same. Then
    `reward` is the time that is waited for the scorer after the reference is done, so that parts still add up, and
    `reward_beside` all of the scorer's time.

    A scorer that fails on one of several processes stops all of them here, before anything waits for another. One that
    compares the images of a prompt sees those of the other processes too, `samples` are the places of these.
    """
    compared = ranks.sharing is not None and compares_group(scorer)
    shown = ranks.whole_group(images) if compared else images
    score = partial(_reward, scorer, shown, prompts, samples if compared else None)
    if looks_back is None or not beside:
        with ranks.together(), watch("reward"):
            scores = score()
        with watch("reference"):
            return scores, None if looks_back is None else looks_back()

    def timed() -> tuple[Scores, float]:
        started = time.perf_counter()
        scores = score()
        return scores, time.perf_counter() - started

    with ThreadPoolExecutor(1, thread_name_prefix="reward") as pool:
        running = pool.submit(timed)
        with watch("reference"):
            reference_scores = looks_back()
        with ranks.together(), watch("reward"):
            scores, watch.seconds["reward_beside"] = running.result()
    return scores, reference_scores


def _reward(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], samples: slice | None) -> Scores:
    """Checked scores, of all images or of those of `samples`.

    The scorer's own dtype counts, not that of training, in whatever thread this is.
    """
    device = images.device
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        scores = scorer(images, prompts)
    check_shape(scores.parts, *images.shape[:2])
    check_values(scores, images, prompts, "the scorer")
    if samples is None:
        return scores
    reasons = tuple(row[samples] for row in scores.reasons)
    return replace(map_tensors(scores, lambda tensor: tensor[:, samples]), reasons=reasons)


def check_shape(parts: Tensor, num_prompts: int, group_size: int) -> None:
    """Raise ValueError unless reward parts are `[P, G, R]`."""
    if parts.ndim != 3 or tuple(parts.shape[:2]) != (num_prompts, group_size):
        raise ValueError(
            f"a reward must give parts [{num_prompts}, {group_size}, R], one row a prompt and one column a sample; "
            f"got {list(parts.shape)}. Correct the scorer."
        )
