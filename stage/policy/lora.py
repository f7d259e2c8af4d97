"""Low-rank adapters on the language model: attached, switched off for a reference, merged for the sampler.

A linear layer W becomes W + (alpha / rank) B A, with A `[rank, in]` and B `[out, rank]`; B starts at zero, so a fresh
adapter changes nothing (arXiv 2106.09685). peft makes the layers and runs them; nothing here imports it before an
adapter is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage.policy.adapter_files import ADAPTER, check_adapter, load_adapter, read_adapter


@dataclass(frozen=True)
class NoAdapter:
    """Trains the weights of the model themselves (conf/model/adapter/none.yaml)."""

    def check(self, base: Path) -> None:
        """Nothing can be wrong."""

    def __call__(self, policy: nn.Module) -> None:
        """Leave the policy as it is."""


@dataclass(frozen=True)
class Lora:
    """Trains low-rank adapters and nothing else (conf/model/adapter/lora.yaml).

    rank: of the update of each layer. alpha: the update counts alpha / rank times. targets: names of linear layers of
    the language model. dropout: must be 0, since the sampler has none, so sampled and replayed log-probabilities
    would differ. path: folder of a saved adapter to begin from, None for a fresh one.

    Raises ValueError for other numbers.
    """

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str]
    path: str | None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"an adapter needs a rank of at least 1 and a positive alpha; got {self.rank} and {self.alpha}. "
                "Correct model.adapter."
            )
        if self.dropout != 0:
            raise ValueError(
                f"an adapter must have no dropout: sampled and replayed log-probabilities would differ; got "
                f"{self.dropout}. Set model.adapter.dropout to 0."
            )

    def check(self, base: Path) -> None:
        """Compare a saved adapter with these settings and with the model folder `base`, before weights are read.

        Raises FileNotFoundError or ValueError as `read_adapter` and `check_adapter`, and ValueError for an adapter of
        another rank, alpha or set of layers.
        """
        if self.path is None:
            return
        saved = read_adapter(Path(self.path).expanduser())
        stated = (self.rank, self.alpha, tuple(sorted(self.targets)))
        if stated != (saved.rank, saved.alpha, saved.targets):
            raise ValueError(
                f"model.adapter must be as the adapter in {self.path} was made: rank {saved.rank}, alpha "
                f"{saved.alpha}, targets {', '.join(saved.targets)}; got {stated[0]}, {stated[1]}, "
                f"{', '.join(stated[2])}."
            )
        check_adapter(saved, base)

    def __call__(self, policy: nn.Module) -> None:
        """Attach the adapter to the policy; call `check` before the policy is loaded."""
        add_lora(policy, rank=self.rank, alpha=self.alpha, targets=self.targets)
        if self.path is not None:
            load_adapter(policy, read_adapter(Path(self.path).expanduser()))


def add_lora(policy: Any, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Attach fresh adapters to the linear layers `targets` of the language model, in place.

    From then on the adapters, kept in float32, are all that is trained: with them off, the policy is the base it was
    loaded from, whatever was trained.

    Raises ImportError without peft, ValueError for targets that are no linear layers of the language model or for a
    policy that has adapters.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "model/adapter=lora needs peft; install the extra: pip install -e '.[lora]'"
        ) from error
    if has_adapters(policy):
        raise ValueError(
            "a policy can have one adapter; this one has its own. Load the base without an adapter."
        )
    linear = {name for name, module in policy.language_model.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    if not targets or set(targets) - known:
        raise ValueError(
            f"adapter targets must be linear layers of the language model, {', '.join(sorted(known))}; got "
            f"{', '.join(targets) or 'none'}. Correct model.adapter.targets."
        )
    policy.requires_grad_(False)
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    config = LoraConfig(target_modules=list(targets), init_lora_weights=True, **settings)
    inject_adapter_in_model(config, policy.language_model, ADAPTER)
    for layer in _layers(policy):
        # An optimizer's step in bfloat16 is lost in rounding; the adapter is small enough to be exact.
        layer.lora_A.float(), layer.lora_B.float()


def has_adapters(policy: nn.Module) -> bool:
    """Whether any layer of the policy has an adapter."""
    return next(_layers(policy), None) is not None


def merged_weight(module: nn.Module, read: Callable[[Tensor], Tensor] = lambda weight: weight) -> Tensor:
    """The effective weight `[out, in]` of a linear layer, in the type of its base weight.

    With an adapter that is W + (alpha / rank) B A, summed in float32 and rounded once; without one, or with adapters
    off, the layer's own weight (not a copy). `read` gives the values of a parameter, where they are sharded.
    """
    layer: Any = module
    if not hasattr(layer, "lora_A"):
        return read(layer.weight)
    weight = read(layer.base_layer.weight)
    if layer.disable_adapters:
        return weight
    first, second = (read(factor) for factor in factors(layer))
    # A product of float32 matrices, whatever autocast would make of it around us.
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), second.float(), first.float(), alpha=layer.scaling[ADAPTER]).to(
            weight.dtype
        )


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[rank, in]` and B `[out, rank]` of a layer with an adapter."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """The policy without its adapters, for the length of a `with` block; what requires a gradient stays as it was."""
    layers = [layer for layer in _layers(policy) if not layer.disable_adapters]
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


class AdaptersOff(nn.Module):
    """The base under a policy's adapters as a frozen reference, without a second model in memory.

    The policy lies outside the module tree: moving, freezing or saving the view touches no weights.
    """

    def __init__(self, policy: nn.Module) -> None:
        """Raises ValueError for a policy without adapters, whose base training would overwrite."""
        super().__init__()
        if not has_adapters(policy):
            raise ValueError(
                "a reference with the adapters off needs a policy with adapters; this one has none. "
                "Set model/adapter=lora, or keep a frozen copy of the policy."
            )
        self._policy: tuple[Any] = (policy,)

    @property
    def policy(self) -> Any:
        """The policy that is looked at."""
        return self._policy[0]

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @torch.no_grad()
    def score(self, *arguments: Any, **options: Any) -> Any:
        """What the policy's `score` gives with its adapters off, without gradient."""
        with adapters_off(self.policy):
            return self.policy.score(*arguments, **options)

    forward = score

    def last_layer(self) -> Any:
        """That of the policy, on which no adapter stands."""
        return self.policy.last_layer()


def merged_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The effective weights of all layers with an adapter, by the name that the layer's weight has in the base."""
    return {
        f"{name}.weight": merged_weight(module)
        for name, module in policy.named_modules()
        if hasattr(module, "lora_A")
    }


def _layers(policy: nn.Module) -> Iterator[Any]:
    """The layers that have an adapter."""
    return (module for module in policy.modules() if hasattr(module, "lora_A"))
