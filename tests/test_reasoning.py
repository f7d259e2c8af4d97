"""Training with a plan before each image: the update, its micro-batches, and what it teaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from stage.callbacks import ImageGrid
from stage.module import StageModule
from stage.policy import drawing
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.sampler import Sampler
from stage.policy.template import Template
from stage.types import Plans, Prompt, Rollout, Scores
from tests.policy.tiny_model import BOI, BOS
from tests.test_module import Recorder, fit
from tests.tiny_training import FROZEN, PROMPTS, objective, same, tiny_base, tiny_module, weights

ENDS = (2, 9, 12, 17, 20, 23)
ASKING = Template("asking", "", "", "a photo of {prompt} :")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


def planner(folder: Path) -> JanusPolicy:
    """A policy that plans; with several end tokens, so that the plans of random weights have many lengths."""
    policy = load_policy(str(folder), ASKING, "float32", FROZEN, False)
    policy.model.generation_config.eos_token_id = list(ENDS)
    return policy


def reasoning(weight: float = 0.5) -> Sampler:
    return Sampler(1.0, 1.0, "text", weight, 6, 1.2)


def module(folder: Path, **changes: Any) -> StageModule:
    return tiny_module(folder, **({"policy": planner(folder), "sampler": reasoning()} | changes))


def logps_of(policy: JanusPolicy, record: Rollout, p: int, g: int) -> tuple[Tensor, Tensor]:
    """Float64 log-probabilities of one plan's words and one image's tokens: a row without padding or cache."""
    assert record.plans is not None
    words = f"a photo of {record.prompts[p].text} :"
    start = [BOS, *policy.tokenizer(words, add_special_tokens=False)["input_ids"]]
    plan = record.plans.tokens[p, g][record.plans.mask[p, g].bool()].tolist()
    image = record.tokens[p, g]
    text = policy.model.get_input_embeddings()(torch.tensor([*start, *plan, BOI]))
    rest = policy.model.prepare_embeddings_for_image_generation(image[:-1])
    hidden = policy.language_model(inputs_embeds=torch.cat([text, rest])[None]).last_hidden_state[0]
    said = (hidden[len(start) - 1 : len(start) + len(plan) - 1] @ policy.model.lm_head.weight.T).log_softmax(
        -1
    )
    seen = policy.model.model.generation_head(hidden[len(start) + len(plan) :]).log_softmax(-1)
    return said[range(len(plan)), plan], seen[range(len(image)), image.tolist()]


def loop_loss(
    policy: JanusPolicy, record: Rollout, old: dict[tuple[int, int], tuple[Tensor, Tensor]], beta: float
) -> Tensor:
    """GRPO on images plus half of GRPO on plans; `old` are the log-probabilities of the rollout and the reference."""
    groups = []
    for p in range(2):
        rewards = record.scores.parts[p, :, 0].double()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        sums, counts = [torch.zeros(()).double(), torch.zeros(()).double()], [0, 0]
        for g in range(4):
            for kind, now in enumerate(logps_of(policy, record, p, g)):
                before = old[p, g][kind]
                ratio, apart = torch.exp(now - before), before - now
                gain = torch.minimum(ratio * advantages[g], ratio.clamp(0.8, 1.2) * advantages[g])
                sums[kind] = sums[kind] + (beta * (torch.exp(apart) - apart - 1) - gain).sum()
                counts[kind] += len(now)
        groups.append(0.5 * sums[0] / counts[0] + sums[1] / counts[1])
    return torch.stack(groups).mean()


def test_two_updates_are_those_of_a_plain_loop(base: Path, tmp_path: Path) -> None:
    """In float64, by SGD: the second update has ratios, clips and a KL. Everything is computed again, row by row."""
    rate, beta = 1.0, 0.5
    recorder = Recorder(objective(beta=beta, updates_per_rollout=2))
    trained = module(
        base,
        policy=planner(base).double(),
        objective=recorder,
        optimizer=partial(torch.optim.SGD, lr=rate),
        gradient_clip=None,
        updates=1,
    )
    fit(tmp_path, trained)
    (record,) = recorder.rollouts
    lengths = record.plans.mask.sum(-1)
    assert len(lengths.unique()) > 2 and trained.latest["plan/length"] == lengths.double().mean()
    assert trained.latest["plan/ratio_max"] > 1.01 and trained.latest["plan/kl"] > 1e-5
    mine = planner(base).double()
    with torch.no_grad():
        old = {(p, g): logps_of(mine, record, p, g) for p in range(2) for g in range(4)}
    trainable = {name: value for name, value in mine.named_parameters() if value.requires_grad}
    for _ in range(2):
        loss = loop_loss(mine, record, old, beta)
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        with torch.no_grad():
            for value, gradient in zip(trainable.values(), gradients, strict=True):
                if gradient is not None:
                    value.sub_(rate * gradient)
    assert trained.latest["loss/total"] == pytest.approx(loss.item(), rel=1e-6)
    start = dict(planner(base).double().named_parameters())
    largest = max((value - start[name]).abs().max().item() for name, value in trainable.items())
    assert largest > 1e-3
    for name, after in weights(trained).items():
        # The VQ codes and rewards of a rollout are float32; nothing else is.
        torch.testing.assert_close(after, trainable[name].detach(), atol=1e-7 * largest, rtol=1e-6)


def test_micro_batches_make_the_same_update(base: Path, tmp_path: Path) -> None:
    found = {}
    for size in (None, 1, 3):
        trained = module(
            base,
            objective=objective("stage", micro_batch=size),
            optimizer=partial(torch.optim.SGD, lr=1.0),
            gradient_clip=None,
            updates=1,
        )
        before = weights(trained)
        fit(tmp_path / str(size), trained)
        assert trained.latest["plan/ratio_max"] == trained.latest["policy/ratio_max"] == 1.0
        assert trained.latest["plan/sampling_gap"] > 0  # sampled at temperature 1.2, scored at 1
        found[size] = {name: value - before[name] for name, value in weights(trained).items()}
    largest = max(step.abs().max() for step in found[None].values())
    assert largest > 1e-3
    for size in (1, 3):
        for name, step in found[None].items():
            torch.testing.assert_close(found[size][name], step, atol=1e-5 * float(largest), rtol=1e-4)


def test_plans_sampled_as_scored_leave_no_gap(base: Path, tmp_path: Path) -> None:
    """`guided` scores what was sampled: image tokens with guidance and temperature, words at theirs."""
    trained = module(
        base,
        objective=objective(distribution="guided"),
        sampler=Sampler(2.0, 0.9, "text", 1.0, 6, 1.2),
        updates=1,
    )
    fit(tmp_path, trained)
    assert trained.latest["plan/sampling_gap"] < 1e-5 and trained.latest["policy/sampling_gap"] < 1e-4


def test_without_reasoning_nothing_changes(base: Path, tmp_path: Path) -> None:
    """Bit for bit, whatever the template's instruction and the sampler's other settings are."""
    plain = tiny_module(base, updates=2)
    other = module(base, sampler=Sampler(1.0, 1.0, None, 0.5, 6, 1.2), updates=2)
    fit(tmp_path / "plain", plain)
    fit(tmp_path / "other", other)
    assert same(weights(plain), weights(other))
    assert not [name for name in other.latest if name.startswith("plan/")]
    values = {name: value for name, value in plain.latest.items() if not name.startswith("time/")}
    assert values == {name: other.latest[name] for name in values}


class SaysRed:
    """A reward for the word, whatever the image shows; it looks at the plans that were drawn last."""

    def __init__(self, word: int) -> None:
        self.word, self.plans = word, list[Plans]()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        said = (self.plans[-1].tokens == self.word).any(-1).float()
        return Scores(said[..., None], ("said",), (1.0,), ())


class Rewards(Callback):
    """The mean reward of each update."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.means.append(pl_module.latest["reward/mean"])


def test_a_reward_for_a_word_makes_it_likelier(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = planner(base)
    scorer = SaysRed(policy.tokenizer.get_vocab()["red"])
    draw = drawing.draw_plans

    def watched(*arguments: Any) -> Plans:
        scorer.plans.append(draw(*arguments))
        return scorer.plans[-1]

    monkeypatch.setattr(drawing, "draw_plans", watched)
    trained = module(
        base,
        policy=policy,
        sampler=reasoning(1.0),
        scorer=scorer,
        objective=objective(beta=0.0),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        group_size=32,
        updates=6,
    )
    rewards = Rewards()
    fit(tmp_path, trained, rewards)
    assert rewards.means[0] < 0.5 and rewards.means[-1] > rewards.means[0] + 0.3, rewards.means


def test_plans_of_fixed_prompts_are_logged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each picture, and as a table for the loggers that take one: the same plans for the same weights."""
    tables = []
    monkeypatch.setattr("stage.callbacks.log_table", lambda *arguments: tables.append(arguments[1:]))
    lines = [{**prompt.metadata, "include": [{"class": "circle", "count": 1}]} for prompt in PROMPTS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    grid = ImageGrid(folder=str(tmp_path / "images"), prompts=str(file), count=2, samples=3, seed=9, every=1)
    trained = module(base, optimizer=partial(torch.optim.SGD, lr=0.0), updates=1)
    fit(tmp_path, trained, grid)
    found = sorted((tmp_path / "images").glob("*.txt"))
    assert [path.name for path in found] == ["update_00000.txt", "update_00001.txt"]
    text = found[0].read_text(encoding="utf-8")
    assert text == found[1].read_text(encoding="utf-8") and len(text.splitlines()) == 6
    assert text.startswith(f"{PROMPTS[0].text}, 1: ")
    assert [table[0] for table in tables] == ["images/plans"] * 2 and tables[1][3] == 1
    assert [f"{prompt}, {number}: {plan}" for prompt, number, plan in tables[0][2]] == text.splitlines()


def test_a_policy_that_cannot_plan_is_an_error_before_it_starts(base: Path) -> None:
    with pytest.raises(ValueError, match="template 'plain' has none"):
        tiny_module(base, sampler=reasoning())
