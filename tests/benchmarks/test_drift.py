"""What training costs, against loops in float64 and a model that has not moved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stage.benchmarks.adding import add_up
from stage.benchmarks.categories import Key
from stage.benchmarks.drift import DriftBenchmark, distances, recalled
from stage.benchmarks.evaluation import Candidate, Judged, draw_missing, open_folders
from stage.benchmarks.intervals import Bootstrap
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from tests.benchmarks.example import prompts, tiny_policy

QUIET = Console(quiet=True)
SAMPLER = Sampler(2.0, 1.0)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JanusPolicy]:
    folder = tmp_path_factory.mktemp("model")
    base, tuned = tiny_policy(folder), tiny_policy(folder)
    torch.manual_seed(1)
    for parameter in tuned.language_model.parameters():
        parameter.data += 0.2 * parameter.abs().mean() * torch.randn_like(parameter)
    return {"base": base, "tuned": tuned}


def bench(**changed: Any) -> DriftBenchmark:
    settings: dict[str, Any] = {"images_per_prompt": 3, "neighbours": 2, "rows": Key("tag")}
    return DriftBenchmark(name="drift", splits={"test": prompts()}, **(settings | changed))


def _same(policy: JanusPolicy) -> JanusPolicy:
    return policy


def judged(path: Path, policies: dict[str, JanusPolicy], batch_size: int = 4) -> list[Judged]:
    made = bench()
    candidates = [
        Candidate(role, path / role, {"checkpoint": role, "seed": 5}, {}, partial(_same, policy))
        for role, policy in policies.items()
    ]
    folders = {item.role: open_folders(item, made, None) for item in candidates}
    for item in candidates:
        draw_missing(item, folders[item.role], SAMPLER, batch_size=batch_size, console=QUIET)
    return made.judge_models(candidates, folders, ["test"], SAMPLER, batch_size, QUIET)


def parts(lines: list[Judged], role: str, name: str) -> torch.Tensor:
    return torch.tensor([line.verdict.parts[name] for line in lines if line.role == role])


def test_kl_and_entropy_are_those_of_the_tokens_drawn(
    policies: dict[str, JanusPolicy], tmp_path: Path
) -> None:
    """Against the sampler's own log-probabilities, and the tokens drawn anew."""
    lines = judged(tmp_path, policies)
    assert [(line.role, line.index, line.sample) for line in lines[::3]] == [
        (role, index, 0) for role in policies for index in range(3)
    ]
    from stage.policy import drawing

    tuned, base = policies["tuned"], policies["base"]
    tokens = drawing.tokenize(tuned, SAMPLER, [prompt.text for prompt in prompts()])
    noise = drawing.noise(tuned, SAMPLER, 5, 0, [prompt.id for prompt in prompts()], 3)
    drawn = drawing.draw(tuned, SAMPLER, tokens, noise)
    with torch.no_grad():
        other = base.score(tokens, drawn.tokens, guidance_scale=2.0, temperature=1.0)
        mine = tuned.score(tokens, drawn.tokens, guidance_scale=2.0, temperature=1.0)
    torch.testing.assert_close(mine.logps, drawn.logps, atol=1e-4, rtol=0)
    ratio = (other.logps - drawn.logps).double()
    expected = (ratio.exp() - ratio - 1).mean(-1).flatten().float()
    torch.testing.assert_close(parts(lines, "tuned", "kl"), expected, atol=1e-4, rtol=1e-4)
    assert parts(lines, "base", "kl").abs().max() == 0 and expected.min() > 0
    torch.testing.assert_close(
        parts(lines, "tuned", "entropy"), mine.entropy.mean(-1).flatten(), atol=1e-5, rtol=1e-5
    )


def test_a_model_that_has_not_moved_costs_nothing(policies: dict[str, JanusPolicy], tmp_path: Path) -> None:
    lines = judged(tmp_path, {"base": policies["base"], "tuned": policies["base"]})
    scores = add_up(lines, bench(), ["test"], Bootstrap(0.95, 100, 0))["test"]
    for part in ("kl", "entropy", "distance"):
        assert scores[part]["overall"]["difference"]["mean"] == pytest.approx(0, abs=1e-7)
    assert scores["recall"]["overall"]["tuned"]["mean"] == 1  # each of its images is the base's


def test_numbers_do_not_depend_on_the_batch(policies: dict[str, JanusPolicy], tmp_path: Path) -> None:
    first, second = judged(tmp_path, policies, 3), judged(tmp_path, policies, 9)
    for one, other in zip(first, second, strict=True):
        assert one.verdict.parts == pytest.approx(other.verdict.parts, abs=1e-5)


def test_tokens_that_are_gone_or_damaged(policies: dict[str, JanusPolicy], tmp_path: Path) -> None:
    judged(tmp_path, policies)
    file = tmp_path / "tuned" / "test" / "tokens" / "00001_2.npy"
    for content in (file.read_bytes()[:100], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001_2.npy cannot be read .*delete .*00001_2.png and run"):
            judged(tmp_path, policies)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001_2.npy cannot be read"):
        judged(tmp_path, policies)


def test_distances_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    torch.testing.assert_close(
        distances(features), torch.tensor([[1.5, 1.0, 1.5]])
    )  # 1 and 2, 1 and 1, 2 and 1


@pytest.mark.parametrize("same", [False, True])
def test_recall_against_a_loop(same: bool) -> None:
    model = torch.randn(20, 3)
    wanted = model if same else torch.randn(15, 3) * 1.5
    expected = []
    for number, one in enumerate(wanted.double()):
        within = False
        for place, center in enumerate(model.double()):
            others = sorted(float((center - m).norm()) for i, m in enumerate(model.double()) if i != place)
            within |= bool((one - center).norm() <= others[2]) and not (same and number == place)
        expected.append(within)
    assert recalled(wanted, model, 3, same).tolist() == expected
    assert 0 < sum(expected) < len(expected) or same


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="distance is between two images"):
        bench(images_per_prompt=1)
    with pytest.raises(ValueError, match="less than the 9 images of a model, got 9"):
        bench(neighbours=9)
    for sampler in ({"reasoning": "text", "temperature": 1.0}, {"reasoning": None, "temperature": 0}):
        with pytest.raises(ValueError, match=r"without plans and at a temperature above 0"):
            bench().check_models(sampler)
    bench().check_models({"temperature": 0.9})
