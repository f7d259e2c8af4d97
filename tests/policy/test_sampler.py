"""The sampler draws from the distribution it says, exactly, whatever else is in the batch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.stats import chisquare
from torch import Tensor
from transformers import StaticCache

from stage.paths import PACKAGE, resolve
from stage.policy import decoder
from stage.policy import sampler as sampler_module
from stage.policy.draws import inverse_cdf
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.sampler import Sampler, uniforms
from stage.types import PromptTokens
from tests.policy.conftest import PLAIN, PROMPTS, SHIPPED, load
from tests.policy.reference import guided_logits, tolerance
from tests.policy.tiny_model import build_tiny_janus

NEAR_TIE = 1e-4  # two logits closer than this may come in either order


@pytest.fixture(params=["compiled", "plain torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tests with this fixture run twice: compiled is what a small model gets on a CPU, plain torch what others get."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(sampler_module, "_has_compiled", lambda *_: False)
    return request.param


def noise(policy: JanusPolicy, group: int, prompts: int = len(PROMPTS)) -> Tensor:
    return uniforms(7, 0, range(prompts), group, policy.num_image_tokens)


def generate(
    policy: JanusPolicy, prompt: PromptTokens, scale: float, group: int = 1, **options: Any
) -> Tensor:
    """Tokens `[P * group, L]` of transformers' own generate, greedy unless `options` say otherwise."""
    model: Any = policy.model
    ids, mask = (part.repeat_interleave(group, 0) for part in (prompt.ids, prompt.mask))
    # Handed a cache, since generate of transformers 5.17 fails to make its own.
    room = ids.shape[1] + policy.num_image_tokens
    cache = StaticCache(config=model.config.text_config, max_cache_len=room)
    options = {"do_sample": False, "generation_mode": "image", "past_key_values": cache, **options}
    return model.generate(ids, attention_mask=mask, guidance_scale=scale, **options)


def check_greedy(policy: JanusPolicy, got: Tensor, wanted: Tensor, scale: float) -> None:
    """Greedy `got` is `wanted`, both `[P, L]`, up to where two logits nearly tie; `wanted` may have no such place."""
    compared = 0
    for row, text in enumerate(PROMPTS):
        logits = guided_logits(policy, text, wanted[row, :-1], scale)
        best = logits.topk(2, -1).values
        ties = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
        end = int(ties[0]) if len(ties) else policy.num_image_tokens
        assert got[row, :end].tolist() == wanted[row, :end].tolist()
        compared += end
    assert compared >= 0.75 * wanted.numel()
    assert len(wanted.unique()) > 4  # a constant image would prove little


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_greedy_tokens_are_those_of_generate(shared_policy: JanusPolicy, scale: float, path: str) -> None:
    """Prompts of four lengths in one padded batch, three samples each."""
    prompt = shared_policy.tokenize(PROMPTS)
    got = Sampler(scale, 0.0)(shared_policy, prompt, noise(shared_policy, 3))
    assert (got.tokens == got.tokens[:, :1]).all() and (got.logps == 0).all()
    with torch.no_grad():
        check_greedy(shared_policy, got.tokens[:, 0], generate(shared_policy, prompt, scale), scale)


def test_greedy_tokens_without_guidance(shared_policy: JanusPolicy) -> None:
    """transformers' generate cannot run at scale 1: here is an uncached loop of conditional forwards."""
    got = Sampler(1.0, 0.0)(shared_policy, shared_policy.tokenize(PROMPTS), noise(shared_policy, 1)).tokens[
        :, 0
    ]
    wanted = torch.empty_like(got)
    with torch.no_grad():
        for row, text in enumerate(PROMPTS):
            for position in range(shared_policy.num_image_tokens):
                logits = guided_logits(shared_policy, text, wanted[row, :position], 1.0)[-1]
                wanted[row, position] = logits.argmax()
        check_greedy(shared_policy, got, wanted, 1.0)


LINEAR_ROPE = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1, "layers": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope alone": {"rope_parameters": LINEAR_ROPE},
    "other heads and rope": {"head_dim": 24, "rope_parameters": LINEAR_ROPE, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_llamas(variant: str, tmp_path: Path, path: str) -> None:
    policy = load(build_tiny_janus(tmp_path, **VARIANTS[variant]))
    prompt = policy.tokenize(PROMPTS)
    greedy = Sampler(2.0, 0.0)(policy, prompt, noise(policy, 1)).tokens[:, 0]
    with torch.no_grad():
        check_greedy(policy, greedy, generate(policy, prompt, 2.0), 2.0)
        samples = Sampler(2.0, 1.0)(policy, prompt, noise(policy, 2))
        replayed = policy.score(prompt, samples.tokens, guidance_scale=2.0, temperature=1.0)
    torch.testing.assert_close(samples.logps, replayed.logps, **tolerance(2.0))


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_score(
    shared_policy: JanusPolicy, scale: float, temperature: float, path: str
) -> None:
    prompt = shared_policy.tokenize(PROMPTS)
    samples = Sampler(scale, temperature)(shared_policy, prompt, noise(shared_policy, 4))
    with torch.no_grad():
        replayed = shared_policy.score(prompt, samples.tokens, guidance_scale=scale, temperature=temperature)
    torch.testing.assert_close(samples.logps, replayed.logps, **tolerance(scale, temperature))
    assert samples.logps.std() > 0.1 and samples.tokens.dtype == torch.int64


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_sample_does_not_depend_on_its_batch(shared_policy: JanusPolicy, scale: float, path: str) -> None:
    """The same prompts one by one, in another order, and in a smaller group."""
    sampler, length = Sampler(scale, 1.0), shared_policy.num_image_tokens
    ids = (11, 22, 33, 44)
    whole = sampler(shared_policy, shared_policy.tokenize(PROMPTS), uniforms(7, 3, ids, 4, length))
    for order, group in (((2,), 4), ((0,), 1), ((3, 1), 2)):
        prompt = shared_policy.tokenize([PROMPTS[p] for p in order])
        part = sampler(shared_policy, prompt, uniforms(7, 3, [ids[p] for p in order], group, length))
        for row, p in enumerate(order):
            assert torch.equal(part.tokens[row], whole.tokens[p, :group])
            torch.testing.assert_close(part.logps[row], whole.logps[p, :group], **tolerance(scale))
    other = sampler(shared_policy, shared_policy.tokenize(PROMPTS), uniforms(7, 4, ids, 4, length))
    assert not torch.equal(other.tokens, whole.tokens)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_first_tokens_follow_the_softmax(policy: JanusPolicy, scale: float) -> None:
    """Chi-square of 6000 independent first tokens of one prompt; the p-value of a right sampler is uniform."""
    draws, text = 6000, PROMPTS[1]
    policy.num_image_tokens = 1  # an image is over after its first token
    samples = Sampler(scale, 1.5)(policy, policy.tokenize([text]), uniforms(5, 0, [0], draws, 1))
    with torch.no_grad():
        logits = guided_logits(policy, text, torch.empty(0, dtype=torch.long), scale)[0]
    expected = ((logits / 1.5).softmax(-1) * draws).sort().values
    counts = torch.bincount(samples.tokens.flatten(), minlength=policy.codebook_size).double()
    counts = counts[(logits / 1.5).softmax(-1).argsort()]
    # Tokens expected fewer than 5 times share a bin with the next ones, as the test asks for.
    first = int((expected.cumsum(0) < 5).sum()) + 1
    observed = torch.cat([counts[:first].sum()[None], counts[first:]])
    wanted = torch.cat([expected[:first].sum()[None], expected[first:]])
    assert len(wanted) > 20
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_inverse_cdf_by_hand() -> None:
    """Probabilities 0, 1/2, 1/4, 1/4, 0 end at 0, 0.5, 0.75, 1, 1; a token is the first whose end exceeds u."""
    logits = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0]).log().expand(6, 5)
    draws = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = inverse_cdf(logits, draws, 1.0)
    assert tokens.tolist() == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(logps.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]))
    # At temperature 1/2 probabilities are squared: 1/4, 1/16, 1/16 of 3/8, so 2/3, 1/6, 1/6.
    tokens, logps = inverse_cdf(logits, torch.full((6,), 0.66, dtype=torch.float64), 0.5)
    assert tokens.tolist() == [1] * 6
    torch.testing.assert_close(logps.exp(), torch.full((6,), 2 / 3))


def test_weights_of_the_moment_are_used(policy: JanusPolicy) -> None:
    """Two samplings with an optimizer step between: each is replayed exactly by the weights of its time."""
    sampler, prompt = Sampler(3.0, 1.0), policy.tokenize(PROMPTS)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    seen = []
    for _ in range(2):
        samples = sampler(policy, prompt, noise(policy, 2))
        scores = policy.score(prompt, samples.tokens, guidance_scale=3.0, temperature=1.0)
        torch.testing.assert_close(samples.logps, scores.logps.detach(), **tolerance(3.0))
        scores.logps.mean().backward()
        optimizer.step()
        seen.append(samples)
    assert (seen[0].logps - seen[1].logps).abs().max() > 1e-2


def test_nothing_stays_behind(policy: JanusPolicy) -> None:
    """No gradient, no buffer, no module: a checkpoint after sampling is the checkpoint before."""
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    buffers, modules = len(list(policy.buffers())), len(list(policy.modules()))
    samples = Sampler(2.0, 1.0)(policy, policy.tokenize(PROMPTS), noise(policy, 2))
    assert not samples.logps.requires_grad and not samples.logps.is_inference()
    assert (len(list(policy.buffers())), len(list(policy.modules()))) == (buffers, modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_policy_raises(policy: JanusPolicy, temperature: float, path: str) -> None:
    with torch.no_grad():
        policy.model.model.generation_head.vision_head.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not for 8 of 8 images"):
        Sampler(2.0, temperature)(policy, policy.tokenize(PROMPTS), noise(policy, 2))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (2.0, 2)])
def test_rows_that_are_run(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch, scale: float, rows: int, path: str
) -> None:
    """Each different prompt row once, then P * G rows a token; twice as many under guidance. Compiled code runs the
    latter by itself."""
    seen: list[int] = []
    run_layers = decoder.run_layers

    def spy(weights: Any, hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(len(hidden))
        return run_layers(weights, hidden, *rest)

    monkeypatch.setattr(decoder, "run_layers", spy)
    prompt = policy.tokenize(PROMPTS)
    Sampler(scale, 1.0)(policy, prompt, noise(policy, 3))
    steps = [rows * 4 * 3] * (policy.num_image_tokens - 1) if path == "plain torch" else []
    different = (
        4 if rows == 1 else 4 + 3
    )  # two prompts are of one length: their unconditional rows are the same
    assert seen == [different * prompt.ids.shape[1], *steps]
    # Six prompts of one length, three of them different: one unconditional row serves them all.
    seen.clear()
    prompt = policy.tokenize([f"a {color} circle" for color in ("red", "green", "blue")] * 2)
    Sampler(scale, 1.0)(policy, prompt, noise(policy, 2, 6))
    assert seen[0] == (3 if rows == 1 else 4) * prompt.ids.shape[1]
    assert set(seen[1:]) == ({rows * 12} if path == "plain torch" else set())


def test_bfloat16(random_checkpoint: Path) -> None:
    policy = load_policy(str(random_checkpoint), PLAIN, "bfloat16", (), False)
    prompt = policy.tokenize(PROMPTS)
    samples = Sampler(2.0, 1.0)(policy, prompt, noise(policy, 2))
    replayed = policy.score(prompt, samples.tokens, guidance_scale=2.0, temperature=1.0)
    assert samples.logps.dtype == torch.float32
    # bfloat16 has 8 bits: logits around 8 are known to 1/32, and the order of sums differs.
    assert (samples.logps - replayed.logps).abs().mean() < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint).cuda()
    prompt = policy.tokenize(PROMPTS)
    greedy = Sampler(2.0, 0.0)(policy, prompt, noise(policy, 1)).tokens[:, 0]
    check_greedy(policy.cpu(), greedy.cpu(), generate(policy, policy.tokenize(PROMPTS), 2.0), 2.0)
    samples = Sampler(2.0, 1.0)(policy.cuda(), prompt, noise(policy, 2))
    replayed = policy.score(prompt, samples.tokens, guidance_scale=2.0, temperature=1.0)
    torch.testing.assert_close(samples.logps, replayed.logps.detach(), **tolerance(5.0))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0, 5.0])
@pytest.mark.parametrize("prompts", ["training", "padded"])
def test_at_least_twice_as_fast_as_generate(prompts: str, scale: float) -> None:
    """64 images of the shipped model on two threads, as a training step draws them and for prompts of other lengths.

    The best of several runs each, in turns, so that both meet the same load.
    """
    policy, train = load(resolve(SHIPPED)), resolve(f"{PACKAGE}stage/shapes/assets/train.jsonl")
    texts = [json.loads(line)["prompt"] for line in train.read_text(encoding="utf-8").splitlines()[:400:50]]
    prompt = policy.tokenize(PROMPTS * 2 if prompts == "padded" else texts)
    draws = noise(policy, 8, 8)
    runs = (
        lambda: Sampler(scale, 1.0)(policy, prompt, draws),
        lambda: generate(policy, prompt, scale, group=8, do_sample=True),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs[0]()  # compiles, where this is the first run on a machine
        ours, theirs = zip(*([seconds(run) for run in runs] for _ in range(6)), strict=True)
    finally:
        torch.set_num_threads(threads)
    assert min(theirs) / min(ours) >= 2, f"{min(theirs):.3f} s against {min(ours):.3f} s"


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_configs(root: Path, name: str) -> None:
    sampler = instantiate(OmegaConf.load(root / "conf" / "sampler" / f"{name}.yaml"))
    assert sampler == Sampler({"plain": 1.0, "guided": 5.0}[name], 1.0, None, 1.0, 64, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.5, 1.0), "guidance_scale must be at least 1"),
        ((float("nan"), 1.0), "guidance_scale must be at least 1"),
        ((1.0, -0.1), "temperature must not be negative"),
        ((1.0, float("nan")), "temperature must not be negative"),
    ],
)
def test_bad_settings(arguments: tuple[float, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(*arguments)


@pytest.mark.parametrize("change", [lambda u: u[1:], lambda u: u[..., 1:], lambda u: torch.cat([u, u[:1]])])
def test_uniforms_of_another_batch(shared_policy: JanusPolicy, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="uniforms must be"):
        Sampler(1.0, 1.0)(shared_policy, shared_policy.tokenize(PROMPTS), change(noise(shared_policy, 2)))


def test_uniforms_are_keyed() -> None:
    """A row is a function of (seed, update, prompt id, sample), and changes with each of the four."""
    whole = uniforms(1, 2, [30, 40], 3, 5)
    assert whole.shape == (2, 3, 5) and whole.dtype == torch.float64
    assert torch.equal(uniforms(1, 2, [40], 2, 5)[0], whole[1, :2])
    rows = [whole.flatten(0, 1), *(uniforms(*key, 1, 5)[0] for key in ((2, 2, [30]), (1, 3, [30])))]
    assert len(torch.cat(rows).unique(dim=0)) == 8  # 6 rows, another seed, another update
    # The first of 2**32 and of (0, 1): a key is not the list of the digits of its numbers.
    assert not torch.equal(uniforms(2**32, 0, [0], 1, 5), uniforms(0, 1, [0], 1, 5))


def test_uniforms_are_uniform_and_stay_the_same() -> None:
    many = uniforms(0, 0, range(50), 8, 100)
    assert many.min() >= 0 and many.max() < 1
    # 40000 draws: the mean's standard deviation is 1 / sqrt(12 * 40000) = 0.0014, and 5 of them are 0.0072.
    assert abs(many.mean() - 0.5) < 0.0072
    assert chisquare(torch.histc(many, 20, 0, 1).numpy()).pvalue > 1e-3
    # Written down once: another stream would make old runs irreproducible.
    recorded = torch.tensor(
        [[0.46578906145975263, 0.1456781111056401], [0.6004659678140695, 0.9512975255739237]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(uniforms(1, 2, [3], 2, 2)[0], recorded, rtol=0, atol=0)


@pytest.mark.parametrize("key", [(-1, 0, [0]), (0, -1, [0]), (0, 0, [-1]), (2**64, 0, [0])])
def test_keys_out_of_range(key: tuple[int, int, list[int]]) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*64\)"):
        uniforms(*key, 1, 2)
