"""A reference that follows the policy: by arithmetic after each update, and through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from stage.checkpoints import Checkpoints
from stage.reference_refresh import FollowingReference, MovingReference, RefreshedReference
from tests.processes import run
from tests.tiny_training import objective, tiny_base, tiny_module, tiny_policy, tiny_trainer, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


class History(Callback):
    """Weights of policy and reference after each update."""

    def __init__(self) -> None:
        self.policy: list[dict[str, Any]] = []
        self.reference: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        mine = weights(pl_module)
        self.policy.append(dict(mine))
        theirs = dict(pl_module.reference.named_parameters())
        self.reference.append({name: theirs[name].detach().clone() for name in mine})


def trained(base: Path, folder: Path, callback: FollowingReference) -> tuple[dict[str, Any], History]:
    module = tiny_module(base, updates=3, objective=objective(beta=0.1))
    start, history = dict(weights(module)), History()
    tiny_trainer(folder, [callback, history]).fit(module)
    return start, history


def test_a_refreshed_reference_is_the_policy_of_its_update(base: Path, tmp_path: Path) -> None:
    start, history = trained(base, tmp_path, RefreshedReference(every=2))
    for name, value in start.items():
        first, second, third = (reference[name] for reference in history.reference)
        assert first.equal(value)
        assert second.equal(history.policy[1][name]) and third.equal(second)
    assert any(not history.policy[2][name].equal(history.reference[2][name]) for name in start)


def test_a_moving_reference_is_an_average(base: Path, tmp_path: Path) -> None:
    start, history = trained(base, tmp_path, MovingReference(decay=0.75))
    for name, value in start.items():
        expected = value.double()
        for policy, reference in zip(history.policy, history.reference, strict=True):
            expected = 0.75 * expected + 0.25 * policy[name].double()
            torch.testing.assert_close(reference[name].double(), expected, atol=1e-6, rtol=0)


def test_what_it_holds_is_saved_and_comes_back(base: Path, tmp_path: Path) -> None:
    callback = MovingReference(decay=0.5)
    trained(base, tmp_path, callback)
    saved = callback.state_dict()
    again, module = MovingReference(decay=0.5), tiny_module(base, objective=objective(beta=0.1))
    again.load_state_dict(saved)
    again.on_train_start(None, module)  # type: ignore[arg-type]
    found = dict(module.reference.named_parameters())  # type: ignore[union-attr]
    assert saved and all(found[name].equal(value) for name, value in saved.items())


def followed(base: Path, folder: Path, strategy: dict[str, Any] | None) -> dict[str, Any]:
    """What a moving reference holds after three updates, and after a resume and a fourth, in float64."""
    more: dict[str, Any] = {} if strategy is None else {"strategy": strategy, "devices": 2}
    found = []
    for updates, resume in ((3, None), (4, folder / "last.ckpt")):
        callback = MovingReference(decay=0.75)
        keep = Checkpoints(folder=str(folder), every=3, keep=1, beside_training=False, monitor="reward/mean")
        policy = tiny_policy(base).double()
        module = tiny_module(base, policy=policy, updates=updates, objective=objective(beta=0.1))
        tiny_trainer(folder, [callback, keep], **more).fit(module, ckpt_path=resume, weights_only=True)
        found.append(callback.state_dict())
    return {"three": found[0], "four": found[1], "metric": module.latest["policy/kl"]}


@pytest.mark.slow
def test_slices_follow_as_the_whole_does(base: Path, tmp_path: Path) -> None:
    strategy = {
        "_target_": "stage.strategy.Sharded",
        "checkpoint": "sharded",
        "timeout_seconds": 60,
        "cpu_offload": False,
        "rollout": "copy",
    }
    one = followed(base, tmp_path / "one", None)
    two = run(2, tmp_path / "two", followed, base, tmp_path / "runs", strategy)
    start = dict(tiny_policy(base).named_parameters())
    for moment in ("three", "four"):
        assert one[moment].keys() == two[0][moment].keys()
        for name, value in one[moment].items():
            torch.testing.assert_close(two[0][moment][name], value, atol=1e-9, rtol=0)
    assert any(not torch.equal(value, start[name].double()) for name, value in one["three"].items())
    assert any(not torch.equal(value, one["three"][name]) for name, value in one["four"].items())
    assert two[1]["metric"] == pytest.approx(one["metric"], abs=1e-9)


def test_what_cannot_follow_raises(base: Path) -> None:
    bare = tiny_module(base, objective=objective(beta=0.0))
    with pytest.raises(ValueError, match="needs weights of its own on the device, got none"):
        RefreshedReference(every=1).on_train_start(None, bare)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every 1 or more updates, got 0"):
        RefreshedReference(every=0)
    with pytest.raises(ValueError, match="lies in"):
        MovingReference(decay=1.0)
