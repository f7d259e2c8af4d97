"""The update loop: micro-batches, the ratio, what is trained and saved, and resuming bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from stage.checkpoints import Checkpoints
from stage.gradients import check_finite
from stage.group_draws import draw
from stage.loggers import MetricsFile, read_metrics
from stage.module import StageModule
from stage.optimizer import MasterAdamW
from stage.policy.janus import load_policy
from stage.policy.lora import add_lora
from stage.policy.sampler import Sampler
from stage.policy.template import Template
from stage.training_checkpoint import read_training_checkpoint
from tests.tiny_training import (
    FROZEN,
    Redness,
    objective,
    same,
    tiny_base,
    tiny_module,
    tiny_policy,
    tiny_trainer,
    weights,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


def fit(
    folder: Path, module: StageModule, *callbacks: Callback, resume: Path | None = None, **trainer: Any
) -> StageModule:
    """Train with checkpoints after every update and metrics in `folder`."""
    keep = Checkpoints(
        folder=str(folder / "checkpoints"), every=1, keep=1, beside_training=False, monitor="reward/mean"
    )
    found = tiny_trainer(folder, [*callbacks, keep], [MetricsFile(folder)], **trainer)
    found.fit(module, ckpt_path=resume, weights_only=True)
    return module


class Calls(Callback):
    """Counts the forward passes of the policy in each update."""

    def __init__(self, module: StageModule) -> None:
        self.counts = [0]
        policy: Any = module.policy
        score = policy.score

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[-1] += 1
            return score(*args, **kwargs)

        policy.score = policy.forward = counted

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(0)


class Keep(Callback):
    """Copies of the trained weights after each update."""

    def __init__(self) -> None:
        self.weights: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))


def test_micro_batches_make_the_same_update(base: Path, tmp_path: Path) -> None:
    """SGD, so that the update is the gradient: P 2, G 4 in one forward, in 8 of one sample, and in odd pieces."""
    found = {}
    for size in (None, 1, 3, 4):
        module = tiny_module(
            base,
            objective=objective("stage", micro_batch=size),
            optimizer=partial(torch.optim.SGD, lr=1.0),
            gradient_clip=None,
            updates=1,
        )
        before = weights(module)
        fit(tmp_path / str(size), module)
        found[size] = {name: value - before[name] for name, value in weights(module).items()}
    largest = max(step.abs().max() for step in found[None].values())
    assert largest > 1e-3
    for size in (1, 3, 4):
        for name, step in found[None].items():
            assert torch.allclose(found[size][name], step, atol=1e-5 * float(largest), rtol=1e-4), (
                size,
                name,
            )


@pytest.mark.parametrize("size", [None, 3, 8])
def test_the_first_ratio_is_exactly_one(base: Path, tmp_path: Path, size: int | None) -> None:
    module = fit(tmp_path, tiny_module(base, objective=objective(micro_batch=size), updates=2))
    assert module.latest["policy/ratio_mean"] == 1.0
    assert module.latest["policy/ratio_max"] == 1.0
    assert module.latest["policy/clip_fraction"] == 0.0


def test_later_updates_of_a_rollout_have_moved_on(base: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, tiny_module(base, objective=objective(updates_per_rollout=2), updates=1))
    assert module.latest["policy/ratio_max"] > 1.0
    assert module.update == 1 and module.trainer.global_step == 2


@pytest.mark.parametrize(
    ("updates", "size", "forwards"),
    [
        (1, None, 1),  # the rollout's forward carries the gradient
        (1, 8, 1),  # all 8 samples fit
        (1, 4, 4),  # 2 pieces, replayed and then with gradient
        (2, None, 3),  # one replay, two updates
    ],
)
def test_no_forward_is_made_twice(
    base: Path, tmp_path: Path, updates: int, size: int | None, forwards: int
) -> None:
    module = tiny_module(base, objective=objective(updates_per_rollout=updates, micro_batch=size), updates=1)
    calls = Calls(module)
    fit(tmp_path, module, calls)
    assert calls.counts[0] == forwards


class Recorder:
    """An objective that keeps the rollouts it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.rollouts: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def credit(self, rollout: Any) -> Any:
        self.rollouts.append(rollout)
        return self.inner.credit(rollout)


def test_every_update_has_its_own_prompts_and_noise(base: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the tokens of an update are those that anyone draws with its number."""
    recorder = Recorder(objective())
    module = tiny_module(base, objective=recorder, optimizer=partial(torch.optim.SGD, lr=0.0), seed=7)
    fit(tmp_path, module)
    assert [rollout.update for rollout in recorder.rollouts] == [0, 1, 2]
    for update, rollout in enumerate(recorder.rollouts):
        prompts = module.prompts.batch(update)
        _, drawn = draw(module.policy, module.sampler, prompts, 4, seed=7, update=update)
        assert rollout.prompts == prompts and torch.equal(rollout.tokens, drawn.tokens)
    assert recorder.rollouts[0].prompts != recorder.rollouts[1].prompts


def test_the_reference_is_the_base_and_lies_outside_the_module(base: Path, tmp_path: Path) -> None:
    module = tiny_module(base, updates=2)
    assert module.reference is not None
    before = {name: value.clone() for name, value in module.reference.state_dict().items()}
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"policy"}
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())
    fit(tmp_path, module)
    assert same(before, module.reference.state_dict())
    assert not same(before, module.policy.state_dict())
    assert module.latest["policy/kl"] > 0


def test_no_reference_where_none_is_needed(base: Path, tmp_path: Path) -> None:
    module = tiny_module(base, objective=objective(beta=0.0), updates=1)
    assert module.reference is None
    fit(tmp_path, module)
    assert "policy/kl" not in module.latest


def test_no_weight_is_there_twice_but_what_is_trained(base: Path) -> None:
    module = tiny_module(base)
    assert module.reference is not None
    own, other = ({p.data_ptr() for p in part.parameters()} for part in (module.policy, module.reference))
    trained = {p.data_ptr() for p in module.policy.parameters() if p.requires_grad}
    assert own - other == trained and len(other - own) == len(trained)


def test_adapters_train_against_their_own_base(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    policy = tiny_policy(base)
    add_lora(policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    module = tiny_module(base, policy=policy, optimizer=partial(torch.optim.AdamW, lr=1e-2), updates=2)
    assert module.reference is not None and list(module.reference.parameters()) == []
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    fit(tmp_path, module)
    assert module.latest["policy/kl"] > 0 and module.latest["policy/ratio_max"] == 1.0
    assert same(before, {name: p.detach() for name, p in policy.named_parameters() if name in before})
    assert all("lora_" in name for name in weights(module))


def test_bfloat16_weights_train_and_resume_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Steps of 1e-5 are lost in bfloat16 weights of this size; the masters keep them, and so do checkpoints."""

    def module(updates: int) -> StageModule:
        policy = load_policy(str(base), Template("plain", "", ""), "bfloat16", FROZEN, True)
        optimizer = partial(MasterAdamW, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        return tiny_module(base, policy=policy, optimizer=optimizer, updates=updates)

    whole = fit(tmp_path / "whole", module(4))
    fit(tmp_path / "cut", module(2))
    again = fit(tmp_path / "cut", module(4), resume=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert same(weights(again), weights(whole))
    assert all(value.dtype == torch.bfloat16 for value in weights(again).values())
    for left, right in zip(
        *(run.trainer.optimizers[0].state.values() for run in (whole, again)), strict=True
    ):
        assert left["master"].dtype == torch.float32 and same(left, right)
    assert whole.latest["policy/kl"] >= 0 and whole.latest["policy/ratio_max"] == 1.0


def test_only_what_is_trained_changes(base: Path, tmp_path: Path) -> None:
    module = tiny_module(base, updates=1)
    before = {name: value.clone() for name, value in module.policy.named_parameters()}
    fit(tmp_path, module)
    for name, value in module.policy.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, before[name]), name
    assert any(
        not torch.equal(value, before[name])
        for name, value in module.policy.named_parameters()
        if "layers" in name
    )


def test_gradients_are_clipped(base: Path, tmp_path: Path) -> None:
    """With SGD of learning rate 1 the weights move by the gradient, so by the clip."""
    module = tiny_module(base, optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=1e-2, updates=1)
    before = weights(module)
    fit(tmp_path, module)
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(module).items()]).norm()
    assert module.latest["policy/gradient_norm"] > 1e-2
    assert float(moved) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("per_rollout", [1, 2])
def test_the_update_is_the_x_axis_and_steps_the_schedule(
    base: Path, tmp_path: Path, per_rollout: int
) -> None:
    """lr 1e-3 falls to 0 over 10 updates, whatever the number of optimizer steps: 1, 0.9 and 0.8 of it are used."""
    fit(tmp_path, tiny_module(base, objective=objective(updates_per_rollout=per_rollout)))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["update"] for row in rows] == ["1", "2", "3"]
    assert [float(row["policy/learning_rate"]) for row in rows] == pytest.approx([1e-3, 0.9e-3, 0.8e-3])


def test_all_promised_metrics_are_there(base: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, tiny_module(base, objective=objective("stage"), updates=1))
    promised = {
        "reward": "mean std informative_groups red strict",
        "policy": "entropy kl ratio_mean ratio_max clip_fraction sampling_gap gradient_norm learning_rate",
        "reference": "entropy",
        "advantage": "abs_mean max",
        "weights": "advantage_mean kl_mean",
        "loss": "total policy kl",
        "time": "total sample decode reference rollout reward update rollout_share reward_share update_share "
        "images_per_second peak_memory_bytes",
    }
    names = [f"{group}/{name}" for group, text in promised.items() for name in text.split(" ")]
    assert [name for name in names if name not in module.latest] == []
    shares = [module.latest[f"time/{part}_share"] for part in ("rollout", "reward", "update")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0
    assert module.latest["time/images_per_second"] == pytest.approx(8 / module.latest["time/total"])
    assert 50e6 < module.latest["time/peak_memory_bytes"] < 50e9


def resumable(base: Path, updates: int) -> StageModule:
    """Reward noise from torch's generator, a falling learning rate, two updates a rollout: all of it must resume."""
    return tiny_module(
        base, scorer=Redness(noise=0.3), objective=objective("stage", updates_per_rollout=2), updates=updates
    )


def test_a_resumed_run_continues_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """Update 3 is the first of the second epoch: the run is cut in the middle of it, and elsewhere."""
    keep = Keep()
    torch.manual_seed(1)
    whole = fit(tmp_path / "whole", resumable(base, 5), keep)
    rows = read_metrics(tmp_path / "whole" / "metrics.csv")
    for cut in (2, 3):
        folder = tmp_path / f"cut{cut}"
        torch.manual_seed(1)
        fit(folder, resumable(base, cut))
        torch.manual_seed(99)
        torch.rand(7)
        last = folder / "checkpoints" / "last.ckpt"
        again = fit(folder, resumable(base, 5), resume=last)
        assert again.update == 5
        assert same(weights(again), keep.weights[4]) and same(weights(again), weights(whole))
        states = [run.trainer.optimizers[0].state for run in (whole, again)]
        for left, right in zip(*(state.values() for state in states), strict=True):
            assert same(left, right)
        found = read_metrics(folder / "metrics.csv")
        for row, expected in zip(found, rows, strict=True):
            assert {k: v for k, v in row.items() if not k.startswith("time/")} == {
                k: v for k, v in expected.items() if not k.startswith("time/")
            }


def test_a_run_that_was_killed_repeats_what_was_not_saved(base: Path, tmp_path: Path) -> None:
    """last.ckpt is of update 2, metrics.csv has row 3: the resumed run replaces that row."""
    folder = tmp_path / "killed"

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.update == 3:
                raise RuntimeError("killed")

    module = resumable(base, 4)
    keep = Checkpoints(
        folder=str(folder / "checkpoints"), every=2, keep=1, beside_training=False, monitor="none"
    )
    trainer = tiny_trainer(folder, [Kill(), keep], [MetricsFile(folder)])
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(module)
    before = read_metrics(folder / "metrics.csv")
    assert [row["update"] for row in before] == ["1", "2", "3"]
    fit(folder, resumable(base, 4), resume=folder / "checkpoints" / "last.ckpt")
    after = read_metrics(folder / "metrics.csv")
    assert [row["update"] for row in after] == ["1", "2", "3", "4"]
    assert after[2]["reward/mean"] == before[2]["reward/mean"]


def test_a_checkpoint_is_plain_and_holds_what_was_trained(base: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, tiny_module(base, updates=2, overrides=["seed=3"]))
    path = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["update"] == 2 and saved["config"] == {"updates": 3} and saved["overrides"] == ["seed=3"]
    assert saved["base"] == module.base
    assert set(weights(module)) <= {name.removeprefix("policy.") for name in saved["state_dict"]}
    frozen = {name for name, value in module.policy.named_parameters() if not value.requires_grad}
    assert frozen and not {f"policy.{name}" for name in frozen} & set(saved["state_dict"])
    assert read_training_checkpoint(path)["update"] == 2


def test_a_checkpoint_of_other_base_weights_is_refused(base: Path, tmp_path: Path) -> None:
    fit(tmp_path, tiny_module(base, updates=1))
    other = tiny_module(base, base={"path": "elsewhere", "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"needs the base it was trained from: .* got elsewhere"):
        fit(tmp_path, other, resume=tmp_path / "checkpoints" / "last.ckpt")


def test_a_checkpoint_that_trained_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    fit(tmp_path, tiny_module(base, updates=1))
    policy = tiny_policy(base)
    policy.freeze(["language_model.norm"])
    other = tiny_module(base, policy=policy)
    with pytest.raises(ValueError, match="exactly the weights that this model trains"):
        fit(tmp_path, other, resume=tmp_path / "checkpoints" / "last.ckpt")


class Spoilt:
    """An objective whose loss is no number from the second update on."""

    def __init__(self, inner: Any, spoil: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.spoil, self.rollouts = inner, spoil, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def credit(self, rollout: Any) -> Any:
        self.rollouts += 1
        return self.inner.credit(rollout)

    def loss(self, scores: Any, credit: Any) -> Any:
        loss, metrics = self.inner.loss(scores, credit)
        return (self.spoil(loss) if self.rollouts > 1 else loss), metrics


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda loss: loss * float("nan"), "loss"),
        (lambda loss: loss + 0 * (loss - loss.detach()).sqrt(), "gradient norm"),  # 0 * sqrt'(0) is NaN
    ],
)
def test_a_loss_that_is_no_number_stops_before_the_weights(
    base: Path, tmp_path: Path, spoil: Callable[[Tensor], Tensor], name: str
) -> None:
    keep = Keep()
    module = tiny_module(base, objective=Spoilt(objective(), spoil))
    with pytest.raises(ValueError, match=f"the {name} must be finite; it is nan in update 2"):
        fit(tmp_path, module, keep)
    assert same(weights(module), keep.weights[0])
    assert read_training_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["update"] == 1


def test_finite_values_pass() -> None:
    check_finite(1.0, "loss", 0)


def test_mixed_precision_does_not_reuse_weights_that_were_cast_before(base: Path, tmp_path: Path) -> None:
    """An autocast that kept cast weights would: of the rollout without gradient, of the first update the old ones.

    With them the first update would do nothing, or the second forward repeat the first: a ratio of exactly 1.
    """
    module = tiny_module(
        base,
        objective=objective(updates_per_rollout=2),
        optimizer=partial(torch.optim.SGD, lr=30.0),
        gradient_clip=None,
        updates=1,
    )
    before = weights(module)
    fit(tmp_path, module, precision="bf16-mixed")
    assert not same(before, weights(module))
    assert module.latest["policy/ratio_max"] > 1.01
    assert all(value.dtype == torch.float32 for value in weights(module).values())


def test_processes_exchange_gradients_with_the_last_micro_batch_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, strategy = tiny_module(base), DDPStrategy()
    blocked: list[str] = []

    @contextmanager
    def block() -> Iterator[None]:
        blocked.append("blocked")
        yield

    monkeypatch.setattr(strategy, "block_backward_sync", block)
    monkeypatch.setattr(StageModule, "trainer", SimpleNamespace(strategy=strategy))
    for last in (False, False, True):
        with module._gradient_sync(last=last):
            blocked.append("backward")
    assert blocked == ["blocked", "backward", "blocked", "backward", "backward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"sampler": Sampler(1.0, 0.0)}, "must differ for an advantage; got sampler.temperature=0"),
    ],
)
def test_arguments_without_sense_are_named(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_module(base, **changes)


def test_a_policy_without_anything_to_train_is_an_error(base: Path) -> None:
    module = tiny_module(base)
    with pytest.raises(ValueError, match="must have trainable parameters"):
        tiny_module(base, policy=module.policy.requires_grad_(False))
