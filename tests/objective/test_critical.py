"""Critical tokens against loops over a picture of 4 x 4 tokens, and what they do to the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stage.objective.critical import CriticalShares, early, entropy_slope, largest, variety
from tests.objective import loop
from tests.objective.example import build, drifted, evaluate, rollout, scores, some_rewards

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}
SIDE = 4


def slope(entropy: list[float]) -> list[float]:
    """Size of the gradient of the causally smoothed map, pixel by pixel."""
    smooth = []
    for r in range(SIDE):
        for c in range(SIDE):
            places = [(r, c), (r, c - 1), (r - 1, c - 1), (r - 1, c), (r - 1, c + 1)]
            inside = [(a, b) for a, b in places if a >= 0 and 0 <= b < SIDE]
            smooth.append(loop.mean([entropy[a * SIDE + b] for a, b in inside]))

    def along(row: list[float], k: int) -> float:
        if k == 0:
            return row[1] - row[0]
        return row[k] - row[k - 1] if k == SIDE - 1 else (row[k + 1] - row[k - 1]) / 2

    rows = [smooth[r * SIDE : (r + 1) * SIDE] for r in range(SIDE)]
    columns = [smooth[c::SIDE] for c in range(SIDE)]
    return [math.hypot(along(rows[r], c), along(columns[c], r)) for r in range(SIDE) for c in range(SIDE)]


def chosen(values: list[float], among: set[int], count: int) -> set[int]:
    return set(sorted(among, key=lambda t: -values[t])[:count])


def test_entropy_slope_equals_a_loop() -> None:
    entropy = torch.rand(2, 3, SIDE * SIDE, dtype=torch.float64)
    found = entropy_slope(entropy)
    for p in range(2):
        for g in range(3):
            assert found[p, g].tolist() == pytest.approx(slope(entropy[p, g].tolist()), abs=1e-12)
    with pytest.raises(ValueError, match="tokens in a square"):
        entropy_slope(torch.zeros(1, 1, 5))


def test_variety_is_the_mean_cosine_to_the_others() -> None:
    codes = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    found = variety(codes)
    for p in range(2):
        for i in range(3):
            for t in range(5):
                vectors = codes[p, :, t].tolist()
                expected = loop.mean([loop.cosine(vectors[i], vectors[j]) for j in range(3) if j != i])
                assert found[p, i, t].item() == pytest.approx(expected, abs=1e-12)


def test_early_and_largest_by_hand() -> None:
    assert early(torch.zeros(1, 1, 10), 0.35)[0, 0].tolist() == [True] * 3 + [False] * 7
    values = torch.tensor([[[5.0, 1.0, 3.0, 3.0]]])
    among = torch.tensor([[[False, True, True, True]]])
    assert largest(values, among, 1)[0, 0].tolist() == [False, False, True, False]  # the first of equals
    assert largest(values, among, 9).equal(among)


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("bound", [0.5, None])
def test_gcpo_equals_a_loop(switches: bool, bound: float | None) -> None:
    """The whole objective: tokens chosen one by one, weights of STAGE on top, divisors of chosen tokens alone."""
    prompts, group, length, shares = 2, 3, SIDE * SIDE, (0.13, 0.2, 0.13)
    record = rollout(scores(some_rewards("discrete", prompts, group, seed=7)), length=length)
    names = ("early", "entropy", "variety")
    changes = {f"critical_tokens.{name}": share for name, share in zip(names, shares, strict=True)}
    reweighting = {"reweight_advantage": switches, "reweight_kl": switches}
    objective = build("gcpo", beta=0.3, **{"critical_tokens.bound": bound}, **changes, **reweighting)
    logps = drifted(record)
    counts = [int(share * length) for share in shares]  # 2, 3, 2
    assert record.reference is not None
    total = torch.zeros((), dtype=torch.float64)
    for p in range(prompts):
        found = loop.advantages(loop.task_rewards(record, p), [0.0] * group, "raw")
        similar = loop.similarity(found, record.codes[p].tolist(), self_at_zero=False)
        gain, divisor, kl, tokens = torch.zeros(()).double(), 0.0, torch.zeros(()).double(), 0.0
        for i in range(group):
            first = set(range(counts[0]))
            middle = set(range(counts[0], length - counts[0]))
            steep = chosen(slope(record.old.entropy[p, i].tolist()), middle, counts[1])
            rest = set(range(length)) - first - steep
            alike = [
                loop.mean(
                    [
                        loop.cosine(record.codes[p, i, t].tolist(), record.codes[p, j, t].tolist())
                        for j in range(group)
                        if j != i
                    ]
                )
                for t in range(length)
            ]
            kept = first | steep | chosen([-value for value in alike], rest, counts[2])
            ratios = []
            for t in range(length):
                apart = (record.old.logps - record.reference.logps)[p, i, t].item()
                ratios.append(1.0 if bound is None else math.exp(loop.clip(apart, -bound, bound)))
                if t not in kept:
                    continue
                w = loop.clip((1 - similar[i][t]) / 2, 0, 1) if switches else 1.0
                m = 0.5 + 0.5 * loop.clip(similar[i][t] + 1, 0, 1) if switches else 1.0
                lp = logps[p, i, t]
                gain = gain + w * loop.mean(ratios) * torch.exp(lp - lp.detach()) * found[i]
                divisor, tokens = divisor + w, tokens + 1
                d = record.reference.logps[p, i, t].item() - lp
                kl = kl + m * (torch.exp(d) - d - 1)
        total = total + (-gain / (divisor + 1e-6) + 0.3 * kl / (tokens + 1e-6)) / prompts
    (gradient,) = torch.autograd.grad(total, logps)
    value, mine = evaluate(objective, record, logps)
    torch.testing.assert_close(value, total.detach(), **EXACT)
    torch.testing.assert_close(mine, gradient, **EXACT)
    assert int((mine != 0).any(dim=1).sum()) > 0 and int((mine[0] == 0).all(dim=0).sum()) > 0


def test_tokens_that_are_not_critical_get_no_gradient_and_all_of_them_change_nothing() -> None:
    record = rollout(scores(some_rewards("discrete", 2, 3, seed=7)), length=10)
    slot = {
        "_target_": "stage.objective.critical.CriticalShares",
        "early": 0.3,
        "entropy": 0.0,
        "variety": 0.0,
        "bound": None,
    }
    objective = build("stage", critical_tokens=slot)
    _, gradient = evaluate(objective, record, drifted(record))
    assert gradient[..., :3].any() and not gradient[..., 3:].any()
    assert objective.credit(record)[1]["weights/critical_share"] == pytest.approx(0.3)
    logps = drifted(record)
    every = evaluate(build("stage", critical_tokens={**slot, "early": 1.0}), record, logps)
    plain = evaluate(build("stage"), record, logps)
    torch.testing.assert_close(every[0], plain[0], atol=1e-7, rtol=1e-6)  # the epsilon of the KL's divisor
    torch.testing.assert_close(every[1], plain[1], atol=1e-7, rtol=1e-6)


def test_the_gain_asks_for_a_reference() -> None:
    shares = {"early": 0.1, "entropy": 0.0, "variety": 0.0}
    assert CriticalShares(**shares, bound=0.5).needs_reference
    assert not CriticalShares(**shares, bound=None).needs_reference
    assert build("gcpo", beta=0.0).needs_reference
