"""Decoding with Triton kernels in static buffers is decoding in plain torch; on CUDA in a graph."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA; this torch has none")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from stage.policy import sampler as sampler_module  # noqa: E402
from stage.policy.graphed import GraphedDecoders  # noqa: E402
from stage.policy.janus import JanusPolicy  # noqa: E402
from stage.policy.sampler import Sampler, uniforms  # noqa: E402
from tests.policy.conftest import PROMPTS, load  # noqa: E402
from tests.policy.reference import tolerance  # noqa: E402
from tests.policy.tiny_model import build_tiny_janus  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
# The interpreter takes milliseconds for what a GPU does in microseconds.
SMALL = {} if CUDA else {"grid": 2, "layers": 1}
TEXTS = PROMPTS if CUDA else PROMPTS[:2]


def noise(policy: JanusPolicy, group: int, prompts: int = len(PROMPTS)) -> Tensor:
    return uniforms(7, 0, range(prompts), group, policy.num_image_tokens)


def graphs(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(sampler_module, "_has_graphs", lambda policy: on)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_janus(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.mark.parametrize(
    ("variant", "scale"),
    [
        pytest.param({}, 3.0, marks=pytest.mark.slow),
        pytest.param({"num_key_value_heads": 2}, 1.0, marks=pytest.mark.slow),
        pytest.param({"attention_bias": True, "mlp_bias": True}, 3.0, marks=pytest.mark.slow),
    ],
)
def test_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict[str, int], scale: float
) -> None:
    """Prompts of four lengths; the second batch has other prompts, the third other weights, on the same buffers."""
    policy = load(build_tiny_janus(tmp_path, **SMALL, **variant)).to(DEVICE)
    sampler, plain = Sampler(scale, 1.0), Sampler(scale, 1.0)
    for batch in range(3):
        texts = [text + " a" * batch for text in TEXTS]
        if batch == 2:
            with torch.no_grad():
                for parameter in policy.language_model.parameters():
                    parameter.mul_(1.1)
        prompt = policy.tokenize(texts)
        graphs(monkeypatch, True)
        got = sampler(policy, prompt, noise(policy, 2, len(TEXTS)))
        graphs(monkeypatch, False)
        wanted = plain(policy, prompt, noise(policy, 2, len(TEXTS)))
        same = (got.tokens == wanted.tokens).all(-1)
        assert same.float().mean() >= 0.8  # a uniform number at the edge of a token may fall on either side
        torch.testing.assert_close(got.logps[same], wanted.logps[same], **tolerance(5.0))
    assert len(sampler._graphs) == 1
    sampler.release()
    assert not sampler._graphs


def test_settings_of_each_image(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance and temperature are read from buffers: other numbers in the next rollout need no other graph."""
    policy, sampler = load(small_checkpoint).to(DEVICE), Sampler(2.0, 1.0)
    prompt, draws = policy.tokenize(TEXTS), noise(policy, 2, len(TEXTS))
    for seed in range(2):
        torch.manual_seed(seed)
        own = {
            "guidance_scale": 1 + 3 * torch.rand(draws.shape[:2]),
            "temperature": 0.5 + torch.rand(draws.shape[:2]),
        }
        found = []
        for on in (True, False):
            graphs(monkeypatch, on)
            found.append(sampler(policy, prompt, draws, **own))
        agree = (found[0].tokens == found[1].tokens).all(-1)
        assert agree.float().mean() >= 0.7
        torch.testing.assert_close(found[0].logps[agree], found[1].logps[agree], **tolerance(5.0))
        if seed == 0:
            kept = sampler._graphs[0]._kept[2]
    assert sampler._graphs[0]._kept[2] is kept


def test_what_a_sampler_gives_back_is_gone_at_once(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined weights, keys and values hang in no cycle, which Python would look for at some time or other."""
    graphs(monkeypatch, True)
    policy, sampler = load(small_checkpoint).to(DEVICE), Sampler(2.0, 1.0)
    gc.collect()
    gc.disable()
    try:
        sampler(policy, policy.tokenize(TEXTS), noise(policy, 1, len(TEXTS)))
        decoder = sampler._graphs[0]._kept[2]
        held = [weakref.ref(part) for part in (decoder, decoder.weights, decoder.cache)]
        del decoder
        assert all(part() is not None for part in held)
        sampler.release()
        assert all(part() is None for part in held)
    finally:
        gc.enable()


def test_greedy(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(small_checkpoint).to(DEVICE)
    prompt = policy.tokenize(TEXTS)
    found = []
    for on in (True, False):
        graphs(monkeypatch, on)
        found.append(Sampler(2.0, 0.0)(policy, prompt, noise(policy, 1, len(TEXTS))))
    assert (found[0].tokens == found[1].tokens).float().mean() > 0.9
    assert (found[0].logps == 0).all()


@pytest.mark.slow
def test_buffers_are_kept_for_a_shape(small_checkpoint: Path) -> None:
    """The same decoder for prompts of other lengths; another for other weights' places, policies and shapes."""
    policy, decoders = load(small_checkpoint).to(DEVICE), GraphedDecoders()

    def used(policy: JanusPolicy, texts: tuple[str, ...], group: int) -> object:
        prompt, draws = policy.tokenize(texts), noise(policy, group, len(texts)).to(DEVICE).flatten(0, 1)
        prefixes = Sampler(2.0, 1.0)._prefixes(policy, prompt, group, policy.num_image_tokens)
        with torch.no_grad():
            decoders.run(policy, prefixes, draws, 2.0, 1.0, torch.float32)
        assert decoders._kept is not None
        return decoders._kept[2]

    first = used(policy, PROMPTS[:1], 1)
    assert used(policy, PROMPTS[1:2], 1) is first
    other = used(policy, PROMPTS[:1], 2)
    assert other is not first
    attention: Any = policy.language_model.layers[0].self_attn
    weight = attention.o_proj.weight
    weight.data = weight.data.clone()
    moved = used(policy, PROMPTS[:1], 2)
    assert moved is not other
    assert used(copy.deepcopy(policy), PROMPTS[:1], 2) is not moved


def test_nothing_of_it_is_copied_or_saved(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sampler = load(small_checkpoint).to(DEVICE), Sampler(1.0, 1.0)
    graphs(monkeypatch, True)
    sampler(policy, policy.tokenize(PROMPTS[:1]), noise(policy, 1, 1))
    assert sampler._graphs
    for copied in (copy.deepcopy(sampler), copy.copy(sampler)):  # a copy goes through what a pickle holds
        assert copied == sampler and not copied._graphs
    assert sampler == Sampler(1.0, 1.0) and "graphs" not in repr(sampler)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_cuda_in_bfloat16(random_checkpoint: Path) -> None:
    """Sampled log-probabilities are those of a replay up to the rounding of bfloat16."""
    policy = load(random_checkpoint).to(DEVICE, torch.bfloat16)
    prompt = policy.tokenize(PROMPTS)
    samples = Sampler(2.0, 1.0)(policy, prompt, noise(policy, 4))
    with torch.no_grad():
        replayed = policy.score(prompt, samples.tokens, guidance_scale=2.0, temperature=1.0)
    assert (samples.logps - replayed.logps).abs().mean() < 0.1
