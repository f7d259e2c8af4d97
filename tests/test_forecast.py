"""What a run says of itself: memory and its remedy before the start, hours after the first update."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stage import forecast
from stage.forecast import Forecast, device_memory, lost_steps, memory_line, workload
from stage.memory import Reference
from stage.optimizer import MasterAdamW
from stage.policy.janus import load_policy
from stage.policy.sampler import Sampler
from stage.policy.template import Template
from tests.tiny_training import FROZEN, objective, tiny_base, tiny_module

CPU = torch.device("cpu")
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


def test_a_module_is_described(base: Path) -> None:
    """2 prompts of 4 images; the longest prompt of the first update, bos and image start included."""
    sampler = Sampler(guidance_scale=3.0, temperature=1.0)
    module = tiny_module(base, sampler=sampler, objective=objective(micro_batch=3))
    run = workload(module)
    words = max(len(prompt.text.split()) for prompt in module.prompts.batch(0))
    assert (run.images, run.micro_batch, run.prompt_tokens) == (8, 3, words + 2)
    assert (run.rollout_rows, run.scored_rows) == (2, 1)
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    assert run.optimizer_bytes == 8 * trained
    assert (run.reference, run.checkpointing, run.full_attention) == (Reference.COPY, False, False)
    guided = tiny_module(base, sampler=sampler, objective=objective(distribution="guided", beta=0.0))
    assert (workload(guided).scored_rows, workload(guided).reference) == (2, Reference.NONE)
    assert workload(tiny_module(base, reference_on_cpu=True)).reference is Reference.ON_CPU


def test_the_line_names_every_part(base: Path) -> None:
    line = memory_line(tiny_module(base), CPU)
    for part in ("weights", "reference", "gradients", "optimizer", "rollout", "activations"):
        assert part in line
    assert line.startswith("memory on cpu: weights 3.") and "with slack" in line


def test_a_run_that_does_not_fit_stops_with_a_remedy(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module(base)
    monkeypatch.setattr(forecast, "device_memory", lambda device: 10**6)
    with pytest.raises(
        ValueError, match=r"must fit .* cpu has 1.0 MB. Take fewer images .* or model/adapter=lora"
    ):
        memory_line(module, CPU)
    room = forecast.needed(forecast.shape_of(module.policy), workload(module)) - 1
    monkeypatch.setattr(forecast, "device_memory", lambda device: room)
    with pytest.raises(ValueError, match=r"Set model.gradient_checkpointing=true, or"):
        memory_line(module, CPU)


def test_a_machine_has_memory() -> None:
    assert 2**28 < device_memory(CPU) < 2**44


def test_steps_that_bfloat16_loses_are_announced(base: Path) -> None:
    policy = load_policy(str(base), Template("plain", "", ""), "bfloat16", FROZEN, False)
    plain = tiny_module(base, policy=policy, optimizer=partial(torch.optim.AdamW, **ADAM))
    warning = lost_steps(plain)
    assert warning is not None and "Set optimizer=adamw_master" in warning
    assert lost_steps(tiny_module(base, policy=policy, optimizer=partial(MasterAdamW, **ADAM))) is None
    assert lost_steps(tiny_module(base)) is None


def report(seconds: list[float], updates: int, capsys: pytest.CaptureFixture[str], gpus: bool = True) -> str:
    strategy = SimpleNamespace(root_device=torch.device("cuda" if gpus else "cpu"))
    callback, trainer = Forecast(), SimpleNamespace(is_global_zero=True, world_size=2, strategy=strategy)
    for update, value in enumerate(seconds, start=1):
        module = SimpleNamespace(update=update, updates=updates, latest={"time/total": value})
        callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """360 updates left at 10 s are one hour, on two processes two GPU-hours."""
    expected = (
        "360 updates to go at 10.0 s: about 1:00:00, 1.00 hours, 2.00 GPU-hours, validation not counted\n"
    )
    assert report([10.0, 9.0, 1.0], 361, capsys) == expected
    # the first update warmed up for long: 359 updates at 5 s
    again = "359 updates to go at 5.0 s: about 0:29:55, 0.50 hours, 1.00 GPU-hours, validation not counted\n"
    assert report([10.0, 5.0, 1.0], 361, capsys) == expected + again
    assert report([10.0], 1, capsys) == ""
    on_cpu = "360 updates to go at 10.0 s: about 1:00:00, 1.00 hours, validation not counted\n"
    assert report([10.0], 361, capsys, gpus=False) == on_cpu
    assert report([3.0], 2, capsys) == "1 update to go at 3.0 s: about 0:00:03, validation not counted\n"
