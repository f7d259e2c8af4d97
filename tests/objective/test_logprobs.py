from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stage.objective.logprobs import linear_token_scores, token_scores


def test_by_hand() -> None:
    # softmax of log 1, log 1, log 2 is 1/4, 1/4, 1/2; entropy 2 * (1/4) log 4 + (1/2) log 2 = 1.5 log 2
    logits = torch.log(torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], dtype=torch.float64))
    found = token_scores(logits, torch.tensor([0, 2]), temperature=1.0)
    expected = torch.tensor([-math.log(4), -math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(found.logps, expected, atol=1e-15, rtol=0)
    entropy = torch.full((2,), 1.5 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-15, rtol=0)


def test_temperature_by_hand() -> None:
    # at temperature 1/2 the odds 1 : 2 become 1 : 4
    logits = torch.log(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    found = token_scores(logits, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(
        found.logps.exp(), torch.tensor([0.8], dtype=torch.float64), atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_equals_log_softmax_for_any_chunk(rows: int) -> None:
    logits = torch.randn(2, 3, 5, 17, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 17, (2, 3, 5))
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = (logits / 1.7).log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    expected = expected.gather(-1, tokens[..., None])[..., 0]
    found = token_scores(logits, tokens, temperature=1.7, rows=rows)
    torch.testing.assert_close(found.logps, expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-14, rtol=0)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    (gradient,) = torch.autograd.grad((weights * found.logps).sum(), logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-14, rtol=0)


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 5, 5])
    assert torch.autograd.gradcheck(
        lambda x: token_scores(x, tokens, temperature=0.8, rows=3).logps, (logits,)
    )
    assert torch.autograd.gradcheck(
        lambda x: token_scores(x, tokens, temperature=0.8, rows=3).entropy, (logits,)
    )


def test_gradient_of_the_entropy_by_hand() -> None:
    # p = 1/4, 1/4, 1/2, H = 1.5 log 2: dH/dz = -p (log p + H) = 1/4 (1/2) log 2, the same, -1/2 (1/2) log 2
    logits = torch.tensor([[0.0, 0.0, math.log(2)]], dtype=torch.float64, requires_grad=True)
    found = token_scores(logits, torch.tensor([0]), temperature=1.0)
    (gradient,) = torch.autograd.grad(found.entropy.sum(), logits)
    expected = torch.tensor([[0.125, 0.125, -0.25]], dtype=torch.float64) * math.log(2)
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)


def test_a_token_without_probability_leaves_the_gradient_of_the_entropy_finite() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    found = token_scores(logits, torch.tensor([0]), temperature=1.0)
    (gradient,) = torch.autograd.grad(found.entropy.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 2] == 0


def test_bfloat16_is_accumulated_in_float32() -> None:
    # 16384 equal logits: log V = 9.704061 nats; a bfloat16 sum of ones stops growing at 256
    logits = torch.full((2, 16384), 3.0, dtype=torch.bfloat16, requires_grad=True)
    found = token_scores(logits, torch.tensor([0, 5]), temperature=1.0)
    assert found.logps.dtype == found.entropy.dtype == torch.float32
    expected = torch.full((2,), math.log(16384))
    torch.testing.assert_close(-found.logps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy, expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(found.logps.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_a_masked_token_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = token_scores(logits, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2)]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found.logps.sum(), logits)
    assert gradient.isfinite().all()


def test_unfit_arguments_raise() -> None:
    logits, tokens = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="shape of the logits without the vocabulary"):
        token_scores(logits, tokens[:1], temperature=1.0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            token_scores(logits, tokens, temperature=temperature)


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features `[2, 15, 8]`, a last layer from 8 to 40 with its bias, and tokens `[2, 15]`."""
    shapes = ((2, 15, 8), (40, 8), (40,))
    features, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return features, weight, bias, torch.randint(0, 40, (2, 15))


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_a_layer_in_chunks_equals_its_logits_at_once(rows: int, dtype: torch.dtype, bound: float) -> None:
    """Values and the gradients of features, weight and bias, against log_softmax of all logits."""
    features, weight, bias, tokens = layer(dtype)
    weights = torch.rand(2, 15, dtype=dtype)
    expected = ((features @ weight.T + bias) / 1.7).log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    expected = expected.gather(-1, tokens[..., None])[..., 0]
    found = linear_token_scores(features, weight, bias, tokens, temperature=1.7, rows=rows)
    torch.testing.assert_close(found.logps, expected, atol=bound, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=bound, rtol=0)
    for mine, theirs in (
        (found.logps, expected),
        (found.entropy, entropy),
        (found.logps + found.entropy, expected + entropy),
    ):
        wanted = torch.autograd.grad((weights * theirs).sum(), (features, weight, bias), retain_graph=True)
        gradients = torch.autograd.grad((weights * mine).sum(), (features, weight, bias), retain_graph=True)
        for one, two in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, two, atol=10 * bound, rtol=0)


def test_gradient_of_a_layer_by_finite_differences() -> None:
    features, weight, bias, tokens = layer()

    def logps(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return linear_token_scores(x, w, b, tokens, temperature=0.8, rows=4).logps

    assert torch.autograd.gradcheck(logps, (features, weight, bias))
    assert torch.autograd.gradcheck(lambda x: logps(x, weight.detach(), None), (features,))


def test_a_frozen_layer_gets_no_gradient() -> None:
    features, weight, bias, tokens = layer()
    weight.requires_grad_(False)
    found = linear_token_scores(features, weight, bias.detach(), tokens, temperature=1.0)
    found.logps.sum().backward()
    assert features.grad is not None and weight.grad is None


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_logits_of_all_positions_never_exist() -> None:
    """600 positions of 50 codes are 30,000 logits: kept are the 4,800 features, and made are 20 x 50 at a time."""
    features = torch.randn(600, 8, requires_grad=True)
    weight, tokens = torch.randn(50, 8), torch.randint(0, 50, (600,))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as made:
        found = linear_token_scores(features, weight, None, tokens, temperature=1.0, rows=20)
        found.logps.sum().backward()
    assert sum(tensor.nbytes for tensor in kept) == features.nbytes + weight.nbytes + tokens.nbytes
    assert made.numbers == features.numel()


def test_logits_of_bfloat16_are_not_rounded() -> None:
    """Logits near 200 are whole numbers in bfloat16; here they are those of the rounded inputs in float64."""
    features = (torch.randn(6, 64) + 2).bfloat16()
    weight = (torch.randn(40, 64) * 0.1 + 1.5).bfloat16()
    tokens = torch.arange(6)
    expected = (features.double() @ weight.double().T).log_softmax(-1)
    found = linear_token_scores(features, weight, None, tokens, temperature=1.0)
    assert found.logps.dtype == torch.float32
    torch.testing.assert_close(found.logps.double(), expected[tokens, tokens], atol=1e-4, rtol=0)
    rounded = token_scores(features @ weight.T, tokens, temperature=1.0)
    assert (rounded.logps.double() - expected[tokens, tokens]).abs().max() > 0.1


def test_autocast_narrows_the_inputs_and_nothing_else() -> None:
    features, weight, bias, tokens = layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_scores(features, weight, bias, tokens, temperature=1.0)
        found.logps.sum().backward()
    one, two, three = (part.detach().bfloat16() for part in (features, weight, bias))
    expected = linear_token_scores(one, two, three, tokens, temperature=1.0)
    assert torch.equal(found.logps, expected.logps)
    assert features.grad is not None and features.grad.dtype == torch.float32


def test_a_layer_of_another_width_raises() -> None:
    features, weight, bias, tokens = layer()
    for wrong in (features[:, :3], features[..., :3]):
        with pytest.raises(ValueError, match="features must be tokens with the width of the layer"):
            linear_token_scores(wrong, weight, bias, tokens, temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        linear_token_scores(features, weight, bias, tokens, temperature=0.0)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the matrix units of a CUDA device are asked for here"
)
def test_a_layer_in_bfloat16_on_a_gpu() -> None:
    """Against float64 on the same rounded inputs: log-probabilities to 1e-3 and gradients to bfloat16."""
    features, weight = torch.randn(2000, 512).bfloat16(), torch.randn(4096, 512).bfloat16() / 8
    tokens, grad = torch.randint(4096, (2000,)), torch.rand(2000)
    exact = [features.double().requires_grad_(), weight.double().requires_grad_()]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    (expected * grad).sum().backward()
    inputs = [part.cuda().requires_grad_() for part in (features, weight)]
    found = linear_token_scores(inputs[0], inputs[1], None, tokens.cuda(), temperature=1.0)
    (found.logps * grad.cuda()).sum().backward()
    torch.testing.assert_close(found.logps.detach().cpu().double(), expected.detach(), atol=1e-3, rtol=0)
    for one, two in zip(inputs, exact, strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad.cpu().double() - two.grad).norm() <= 5e-3 * two.grad.norm()
