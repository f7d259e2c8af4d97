"""Adding up against hand arithmetic, and the two stages on disk with a random tiny Janus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console

from stage.benchmarks.adding import add_up
from stage.benchmarks.benchmark import Verdict
from stage.benchmarks.evaluation import Candidate, Judged, draw_missing, open_folders
from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder, Planned
from stage.benchmarks.intervals import Bootstrap
from stage.benchmarks.judging import Judging
from stage.benchmarks.share import Share
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.types import PromptTokens, Samples
from tests.benchmarks.example import benchmark, prompts, tiny_policy

SETTINGS: dict[str, Any] = {"checkpoint": "c" * 64, "seed": 3}
BOOTSTRAP = Bootstrap(0.95, 1000, 0)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return tiny_policy(tmp_path_factory.mktemp("model"))


def folder(path: Path, images: int = 4, seed: int = 3) -> ImageFolder:
    return ImageFolder(path, {**SETTINGS, "seed": seed}, prompts(), images)


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("images/*"))
    }


def draw_all(policy: JanusPolicy, path: Path, batch_size: int, **arguments: Any) -> dict[str, str]:
    draw(
        policy, Sampler(2.0, 1.0), folder(path, **arguments), batch_size=batch_size, drawn=lambda count: None
    )
    return digests(path)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 8])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(
    policy: JanusPolicy, tmp_path: Path, batch_size: int
) -> None:
    whole = draw_all(policy, tmp_path / "whole", 64)
    assert len(whole) == len(set(whole.values())) == 12
    assert draw_all(policy, tmp_path / "parts", batch_size) == whole


def test_an_image_does_not_depend_on_how_many_there_are_of_its_prompt(
    policy: JanusPolicy, tmp_path: Path
) -> None:
    four, two = draw_all(policy, tmp_path / "four", 64), draw_all(policy, tmp_path / "two", 64, images=2)
    assert two == {name: digest for name, digest in four.items() if name[-5] in "01"}


def test_another_seed_draws_other_images(policy: JanusPolicy, tmp_path: Path) -> None:
    first, second = draw_all(policy, tmp_path / "a", 64), draw_all(policy, tmp_path / "b", 64, seed=4)
    assert not set(first.values()) & set(second.values())


def test_only_what_is_missing_is_drawn_and_it_is_what_it_was(
    policy: JanusPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw_all(policy, tmp_path, 64)
    gone = [tmp_path / "images" / name for name in sorted(whole)[::2]]
    gone.append(tmp_path / "images" / "00001_1.png")  # one prompt lacks three of its four, the others two
    for file in gone:
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("images/*")}
    images, saved = folder(tmp_path), []
    save = images.save

    def remember(item: Planned, image: np.ndarray) -> None:
        saved.append(item.file)
        save(item, image)

    monkeypatch.setattr(images, "save", remember)
    counts: list[int] = []
    made = draw(policy, Sampler(2.0, 1.0), images, batch_size=4, drawn=counts.append)
    assert made == sum(counts) == len(gone) == 7
    assert sorted(saved) == sorted(f"images/{file.name}" for file in gone)
    assert digests(tmp_path) == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_prompts_are_padded_alike_whatever_is_missing(
    policy: JanusPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_all(policy, tmp_path, 64)
    (tmp_path / "images" / "00000_0.png").unlink()  # of the shortest prompt
    widths = []
    sampler = Sampler(2.0, 1.0)

    def measured(policy: JanusPolicy, prompt: PromptTokens, uniforms: torch.Tensor) -> Samples:
        widths.append(prompt.ids.shape[1])
        return sampler(policy, prompt, uniforms)

    draw(policy, measured, folder(tmp_path), batch_size=64, drawn=lambda count: None)  # type: ignore[arg-type]
    assert widths == [policy.tokenize([prompt.text for prompt in prompts()]).ids.shape[1]]
    assert widths[0] > policy.tokenize([prompts()[0].text]).ids.shape[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_batches_of_a_split_have_one_shape_whoever_draws_them(
    policy: JanusPolicy, tmp_path: Path, processes: int
) -> None:
    """Three prompts of two images in batches of four: the last batch of each process is filled with another prompt."""
    shapes, sampler = [], Sampler(2.0, 1.0)

    def measured(policy: JanusPolicy, prompt: PromptTokens, uniforms: torch.Tensor) -> Any:
        different = len(torch.cat([prompt.ids, prompt.mask], 1).unique(dim=0))
        shapes.append((*prompt.ids.shape, *uniforms.shape[:2], different))
        return sampler(policy, prompt, uniforms)

    stand_in: Any = measured
    made = [
        draw(
            policy,
            stand_in,
            folder(tmp_path, 2),
            batch_size=4,
            drawn=lambda n: None,
            share=Share(rank, processes),
        )
        for rank in range(processes)
    ]
    width = policy.tokenize([prompt.text for prompt in prompts()]).ids.shape[1]
    assert shapes == [(2, width, 2, 2, 2)] * 2 and sum(made) == 6
    assert digests(tmp_path) == draw_all(policy, tmp_path / "whole", 64, images=2)


def test_what_is_drawn_after_an_interruption_has_the_shapes_of_the_whole(
    policy: JanusPolicy, tmp_path: Path
) -> None:
    """Shapes `[P, G]` of what a sampler is asked for, with 3 prompts of 5 images in batches of 4: G is 4, then 1."""
    shapes: list[tuple[int, ...]] = []

    def measured(policy: JanusPolicy, prompt: PromptTokens, uniforms: torch.Tensor) -> Any:
        shapes.append(tuple(uniforms.shape[:2]))
        return Sampler(2.0, 1.0)(policy, prompt, uniforms)

    def again() -> list[tuple[int, ...]]:
        shapes.clear()
        draw(policy, cast(Any, measured), folder(tmp_path, 5), batch_size=4, drawn=lambda n: None)
        return sorted(shapes)

    assert again() == [(1, 4)] * 3 + [(3, 1)]
    whole = digests(tmp_path)
    for name in ("00000_1", "00002_3", "00002_4"):
        (tmp_path / "images" / f"{name}.png").unlink()
    assert again() == [(1, 4)] * 2 + [(3, 1)]
    assert digests(tmp_path) == whole


def test_a_kill_between_batches_loses_nothing_that_was_drawn(policy: JanusPolicy, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        draw(policy, Sampler(2.0, 1.0), folder(tmp_path / "a"), batch_size=4, drawn=kill)
    half = digests(tmp_path / "a")
    assert len(half) in (4, 8)  # the batch before was being written
    whole = draw_all(policy, tmp_path / "b", 4)
    assert draw_all(policy, tmp_path / "a", 4) == whole
    assert half.items() <= whole.items()


def test_a_batch_is_at_most_as_large_as_asked(policy: JanusPolicy, tmp_path: Path) -> None:
    counts: list[int] = []
    draw(policy, Sampler(1.0, 1.0), folder(tmp_path, images=5), batch_size=3, drawn=counts.append)
    assert max(counts) <= 3 and sum(counts) == 15
    item = candidate(tmp_path, policy)
    with pytest.raises(ValueError, match="at least one image, got 0"):
        draw_missing(
            item, open_folders(item, benchmark(), ["heldout"]), Sampler(1.0, 1.0), batch_size=0, console=QUIET
        )


def candidate(path: Path, policy: JanusPolicy, role: str = "base") -> Candidate:
    return Candidate(role, path / role, SETTINGS, {}, lambda: policy)


def test_base_and_tuned_go_through_both_stages(policy: JanusPolicy, tmp_path: Path) -> None:
    bench, item = benchmark(2), candidate(tmp_path, policy)
    folders = open_folders(item, bench, ["validation", "heldout"])
    timing = draw_missing(item, folders, Sampler(2.0, 1.0), batch_size=4, console=QUIET)
    assert timing["images"] == 10 and timing["seconds"] > 0  # (3 + 2) prompts x 2
    judging = Judging(item, folders, bench)
    assert judging.missing() == 10
    assert judging.score(batch_size=3, console=QUIET) == 10
    assert judging.missing() == 0
    judged = judging.collect()
    assert [(j.split, j.index, j.sample) for j in judged] == [
        (split, index, sample)
        for split, count in (("validation", 3), ("heldout", 2))
        for index in range(count)
        for sample in range(2)
    ]
    for one in judged:  # what is judged is the picture on disk
        picture = folders[one.split].load(folders[one.split].planned[2 * one.index + one.sample])
        assert one.verdict.parts["partial"] == pytest.approx(picture.mean() / 255, abs=1e-6)
        assert one.file.is_file() and one.task == prompts()[one.index].metadata["tag"]


def test_complete_folders_need_no_weights(policy: JanusPolicy, tmp_path: Path) -> None:
    bench, item = benchmark(1), candidate(tmp_path, policy)
    folders = open_folders(item, bench, ["validation"])
    draw_missing(item, folders, Sampler(2.0, 1.0), batch_size=4, console=QUIET)

    def no_weights() -> JanusPolicy:
        raise AssertionError("the weights were read for nothing")

    again = Candidate(item.role, item.folder, item.settings, {}, no_weights)
    assert draw_missing(again, folders, Sampler(2.0, 1.0), batch_size=4, console=QUIET)["images"] == 0


def test_an_unknown_split_is_refused_before_anything_is_written(policy: JanusPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'"):
        open_folders(candidate(tmp_path, policy), benchmark(), ["test"])
    assert not list(tmp_path.iterdir())


def judged_by_hand(role: str, strict: list[list[int]], split: str = "validation") -> Iterator[Judged]:
    for index, (prompt, group) in enumerate(zip(benchmark().prompts(split), strict, strict=True)):
        for sample, value in enumerate(group):
            verdict = Verdict({"partial": value / 2, "strict": value}, "by hand")
            yield Judged(
                role,
                split,
                Path(f"{index}_{sample}.png"),
                prompt.text,
                prompt.id,
                index,
                sample,
                (benchmark().task(prompt),),
                verdict,
            )


def test_scores_add_up_by_hand() -> None:
    base = [*judged_by_hand("base", [[1, 0], [0, 0], [1, 1]])]
    tuned = [*judged_by_hand("tuned", [[1, 1], [1, 0], [1, 0]])]
    scores = add_up([*base, *tuned], benchmark(2), ["validation"], BOOTSTRAP)["validation"]
    means = {
        task: {column: entry["mean"] for column, entry in row.items()}
        for task, row in scores["strict"].items()
    }
    # colors: prompts (1/2, 0) against (1, 1/2); counting: prompt 1 against 1/2; overall: mean of the two tasks.
    assert means == {
        "colors": {"base": 0.25, "tuned": 0.75, "difference": 0.5},
        "counting": {"base": 1.0, "tuned": 0.5, "difference": -0.5},
        "overall": {"base": 0.625, "tuned": 0.625, "difference": 0.0},
    }
    # Both colour prompts gain a half, so there is no doubt about their difference.
    assert scores["strict"]["colors"]["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "prompts": 2}
    assert scores["partial"]["overall"]["base"]["mean"] == 0.3125
    assert scores["strict"]["counting"]["base"]["low"] is None  # one prompt


def test_splits_add_up_by_themselves() -> None:
    validation = judged_by_hand("base", [[1, 0], [0, 0], [1, 1]])
    heldout = judged_by_hand("base", [[1, 1], [1, 1]], "heldout")
    scores = add_up([*validation, *heldout], benchmark(2), ["validation", "heldout"], BOOTSTRAP)
    assert scores["validation"]["strict"]["overall"]["base"]["mean"] == 0.625
    assert scores["heldout"]["strict"]["overall"]["base"]["mean"] == 1.0
    assert list(scores["heldout"]["strict"]) == ["colors", "overall"]


def test_scores_do_not_depend_on_the_order_of_the_images() -> None:
    base = [*judged_by_hand("base", [[1, 0], [0, 0], [1, 1]])]
    mixed = [base[i] for i in np.random.default_rng(0).permutation(len(base))]
    straight = add_up(base, benchmark(2), ["validation"], BOOTSTRAP)
    assert add_up(mixed, benchmark(2), ["validation"], BOOTSTRAP) == straight
    assert set(straight["validation"]["strict"]["overall"]) == {"base"}


def test_drawing_leaves_no_gradient(policy: JanusPolicy, tmp_path: Path) -> None:
    assert torch.is_grad_enabled()
    draw_all(policy, tmp_path, 64)
    assert torch.is_grad_enabled() and all(p.grad is None for p in policy.parameters())
