"""Where the host waits for the device within a training step: at the places that docs/scaling.md names, no others.

On a CPU the calls are counted that would wait for a GPU (values, sizes and shapes that depend on numbers), in one step
after the first. With CUDA torch itself says where it waits.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stage.speed.training import brightness
from tests.equality import Case, module_of
from tests.tiny_training import ROOT, tiny_base, tiny_trainer

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__array__"}
CASES = [
    Case("stage", recorded=False, dtype="float32"),
    Case("grpo", recorded=False, dtype="float32", micro_batch=4),
    Case("stage", recorded=False, dtype="float32", plans=True),
]
# On the CPU in any case: what the tokenizer gives, an optimizer's counters, and the scorer of these runs.
ELSEWHERE = {
    "policy/janus.py encode",
    "module.py _step",
    "speed/training.py brightness",
    "group_draws.py _reward",
}
COUNTS = {
    "policy/decoder.py find_prefixes": 1,
    "policy/sampler.py _check_finite": 1,
    "score_checks.py check_values": 1,
    "objective/checks.py check_rollout": 1,
    "objective/metrics.py to_floats": 2,
}


class Reads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, by the place in `stage`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits(getattr(func, "__name__", ""), args):
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))

    def _waits(self, name: str, args: Any) -> bool:
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)
        return name in READS


def place() -> str:
    """The innermost function of `stage` that runs, such as `policy/sampler.py _check_finite`."""
    inside = str(ROOT / "stage") + "/"
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(inside)]
    return f"{frames[-1].filename.removeprefix(inside)} {frames[-1].name}"


def second_step(case: Case, base: Path, folder: Path, watched: Callable[[Any], Any], **trainer: Any) -> None:
    """A run whose second training step is made by `watched(step)`, which calls it."""
    module = module_of(case, base)
    module._scorer = (brightness,)
    step, calls = module.training_step, list[int]()

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        run = lambda: step(*arguments, **named)  # noqa: E731
        return watched(run) if len(calls) == 2 else run()

    module.training_step = counted
    tiny_trainer(folder, [], [], enable_checkpointing=False, **trainer).fit(module)
    assert len(calls) > 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


def named() -> set[str]:
    """The places that the documentation names."""
    lines = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1] for line in lines if line.startswith("| `") and ".py " in line}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_host_waits_where_it_is_said(
    case: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage.policy.sampler._has_compiled", lambda *_: False)  # that path is a CPU's own
    reads = Reads()

    def watched(step: Callable[[], Any]) -> Any:
        with reads:
            return step()

    second_step(case, base, tmp_path, watched)
    found = {name: number for name, number in reads.found.items() if name not in ELSEWHERE}
    assert set(found) <= named(), found
    if not case.plans:
        assert {name: number for name, number in found.items() if name in COUNTS} == COUNTS


def test_every_place_that_is_named_exists() -> None:
    for name in named():
        file, function = name.split()
        assert f"def {function}(" in (ROOT / "stage" / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_waits_where_it_is_said(case: Case, base: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("only CUDA says where the host waits for it")
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[place()] += 1

    def watched(step: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    second_step(case, base, tmp_path, watched, accelerator="gpu")
    print(f"{case}: {dict(found)}")
    assert set(found) - ELSEWHERE <= named(), found
