"""The compiled sampler: its arithmetic against float64, its independence of threads, and where it is not used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage.policy.draws import inverse_cdf
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.sampler import Sampler, uniforms
from tests.policy.conftest import PLAIN, PROMPTS, load
from tests.policy.tiny_model import build_tiny_janus

numba = pytest.importorskip("numba")
compiled: Any = pytest.importorskip("stage.policy.compiled_decode")
cpu_decode: Any = pytest.importorskip("stage.policy.cpu_decode")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def test_exp_over_its_range() -> None:
    """Within two units of the last place, clamped outside, and NaN stays NaN."""
    x = np.linspace(-87, 88, 20001, dtype=np.float32)
    got, wanted = np.array([compiled.exp(number) for number in x]), np.exp(x.astype(np.float64))
    assert np.abs((got - wanted) / np.spacing(wanted.astype(np.float32))).max() < 2
    assert compiled.exp(np.float32(0)) == 1 and np.isnan(compiled.exp(np.float32("nan")))
    assert compiled.exp(np.float32(-1e4)) < 2e-38 and compiled.exp(np.float32(1e4)) > 1e38


@pytest.mark.parametrize("width", [1, 7, 64])
def test_linear(width: int) -> None:
    x, matrix, bias, out = random(3, 24), random(24, width, seed=1), random(width, seed=2), random(3, width)
    compiled.linear(x, matrix, bias, out)
    np.testing.assert_allclose(out, x.astype(np.float64) @ matrix + bias, rtol=1e-5, atol=1e-5)


def test_rms_norm() -> None:
    x, weight, out = random(3, 24), random(24, seed=1), random(3, 24)
    compiled.rms_norm(x, weight, np.float32(0.1), out)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 0.1) * weight
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_draw_is_the_inverse_cdf(temperature: float) -> None:
    """The tokens of `inverse_cdf` for 500 rows and the ends of the unit interval, and nothing of probability zero."""
    logits = random(500, 40) * 3
    logits[:, 5] = -1e30
    draws = np.random.default_rng(0).random(500)
    draws[:2] = 0, 1 - 2**-53
    tokens, logps = inverse_cdf(torch.tensor(logits), torch.tensor(draws), temperature)
    got = [
        compiled.draw(row.copy(), u, np.float32(temperature)) for row, u in zip(logits, draws, strict=True)
    ]
    assert [token for token, _ in got] == tokens.tolist()
    np.testing.assert_allclose([logp for _, logp in got], logps, atol=1e-5)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_shows(spoilt: float, temperature: float) -> None:
    logits = random(40)
    logits[3] = spoilt
    assert np.isnan(compiled.draw(logits, 0.5, np.float32(temperature))[1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_threads_and_parts_do_not_show(shared_policy: JanusPolicy, scale: float) -> None:
    """The same bits on one to five threads, and for the first samples of a group alone."""
    prompt, length = shared_policy.tokenize(PROMPTS), shared_policy.num_image_tokens
    draws, threads = uniforms(3, 0, range(4), 9, length), torch.get_num_threads()
    found = []
    for count, group in ((1, 9), (2, 9), (5, 9), (2, 1), (3, 4)):
        torch.set_num_threads(count)
        try:
            found.append(Sampler(scale, 1.0)(shared_policy, prompt, draws[:, :group]))
        finally:
            torch.set_num_threads(threads)
    for part in found[1:]:
        group = part.tokens.shape[1]
        assert torch.equal(part.tokens, found[0].tokens[:, :group])
        assert torch.equal(part.logps, found[0].logps[:, :group])


def test_who_is_compiled(random_checkpoint: Path, tmp_path: Path) -> None:
    def can(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
        name = str(dtype).removeprefix("torch.")
        return cpu_decode.can_decode(load_policy(str(folder), PLAIN, name, (), False), dtype)

    assert can(random_checkpoint)
    assert not can(random_checkpoint, torch.bfloat16)
    others: dict[str, dict[str, Any]] = {
        "activation": {"hidden_act": "gelu"},
        "a size that is no multiple": {"hidden": 60, "head_dim": 16},
        "a matrix too large to gain": {"intermediate_size": 2**14},
    }
    for name, changes in others.items():
        assert not can(build_tiny_janus(tmp_path / name, **changes)), name


def test_a_size_that_is_not_compiled_still_samples(tmp_path: Path) -> None:
    policy = load(build_tiny_janus(tmp_path, hidden=60, head_dim=16))
    prompt = policy.tokenize(PROMPTS)
    samples = Sampler(2.0, 1.0)(policy, prompt, uniforms(0, 0, range(4), 2, policy.num_image_tokens))
    replayed = policy.score(prompt, samples.tokens, guidance_scale=2.0, temperature=1.0)
    torch.testing.assert_close(samples.logps, replayed.logps.detach(), rtol=1e-4, atol=1e-4)


def doubled(x: Any) -> Any:
    return x * 2


def test_what_was_kept_may_be_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled code is kept for the next process; files that cannot be read cost a compilation and are named."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "decode", doubled)
    compile_anew, signature = cpu_decode._compile.__wrapped__, (numba.types.int64,)
    with caplog.at_level(logging.WARNING):
        assert compile_anew(signature)(21) == 42
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files and compile_anew(signature)(21) == 42 and not caplog.messages
        for path in files:
            path.write_bytes(path.read_bytes()[:40])
        assert compile_anew(signature)(21) == 42
    assert len(caplog.messages) == 1 and "not kept" in caplog.messages[0]
