"""Adapters on disk in peft's format: adapter_config.json and adapter_model.safetensors.

The names are those that peft gives an adapter of transformers' JanusForConditionalGeneration, so that
`PeftModel.from_pretrained(model, folder)` loads it. The header of the tensors also records which base weights the
adapter belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from stage.policy.layout import open_folder
from stage.policy.names import Shape
from stage.policy.weights import read_json, require, save_tensors
from stage.training_checkpoint import weights_sha256

ADAPTER = "default"  # the name that peft gives an adapter, part of its parameters' names
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name in the model
_OURS = "model."  # before the name in a policy, which has the model as an attribute


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter on disk: its settings, the shapes of its tensors by peft's name, and the base it belongs to.

    `base_path` and `base_sha256` are None where the file does not say.
    """

    folder: Path
    rank: int
    alpha: float
    shapes: Mapping[str, Shape]
    base_path: str | None
    base_sha256: str | None

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the layers that have an adapter, sorted."""
        return tuple(sorted({name.split(".")[-3] for name in self.shapes}))


def save_adapter(policy: nn.Module, folder: Path, base: Mapping[str, str]) -> None:
    """Write the policy's adapter into `folder`, which is made; `base` is {"path", "sha256"} of the weights under it.

    Raises ValueError for a policy without one.
    """
    from peft import LoraConfig

    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "lora_A")]
    if not layers:
        raise ValueError("only a policy with an adapter can save one; this one has none. Save it merged.")
    tensors = {
        peft_name(name): tensor.detach().cpu().contiguous()
        for name, tensor in policy.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    targets = "|".join(sorted({name.split(".")[-3] for name in tensors}))
    settings: dict[str, Any] = {"r": layers[0].r[ADAPTER], "lora_alpha": layers[0].lora_alpha[ADAPTER]}
    config = LoraConfig(
        base_model_name_or_path=base["path"],
        # The vision tower has layers of the same names.
        target_modules=rf"model\.language_model\..*\.({targets})",
        lora_dropout=0.0,
        inference_mode=True,
        **settings,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_tensors(
        tensors,
        folder / TENSORS,
        {"format": "pt", **{f"base_{key}": base[key] for key in ("path", "sha256")}},
    )


def peft_name(name: str) -> str:
    """peft's name in files for a parameter of a policy's adapter."""
    return PREFIX + name.removeprefix(_OURS).replace(f".{ADAPTER}.", ".")


def read_adapter(folder: Path) -> SavedAdapter:
    """What is in an adapter's folder, without its numbers.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or an adapter that is not plain LoRA.
    """
    config, file = read_json(require(folder, CONFIG)), require(folder, TENSORS)
    if not {"r", "lora_alpha"} <= config.keys() and config.get("peft_type") == "LORA":
        raise ValueError(
            f"an adapter must state r and lora_alpha; {folder / CONFIG} does not. Copy it again."
        )
    odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"an adapter must be plain LoRA; {folder} has {config.get('peft_type')} {' '.join(odd)}. "
            "Merge it into its base with peft, and use the merged model."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            noted = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Copy it again.") from error
    path = noted.get("base_path") or config.get("base_model_name_or_path")
    return SavedAdapter(folder, config["r"], config["lora_alpha"], shapes, path, noted.get("base_sha256"))


def check_adapter(adapter: SavedAdapter, base: Path) -> None:
    """Raise ValueError unless the adapter belongs to the model in folder `base`; only headers and a hash are read."""
    layers = open_folder(base).shapes
    for name, shape in adapter.shapes.items():
        layer, _, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        weight = layers.get(f"{layer}.weight")
        wanted = weight and {"lora_A": (adapter.rank, weight[1]), "lora_B": (weight[0], adapter.rank)}.get(
            side
        )
        if shape != wanted:
            raise ValueError(
                f"the adapter in {adapter.folder} belongs to another base{_named(adapter)}: its {name} is "
                f"{list(shape)}, and {base} has {'no such layer' if weight is None else list(weight)} there. "
                "Set model.path to the base it was trained on."
            )
    if adapter.base_sha256 is not None:
        found = weights_sha256(base)
        if found != adapter.base_sha256:
            raise ValueError(
                f"the adapter in {adapter.folder} belongs to another base{_named(adapter)}, with sha256 "
                f"{adapter.base_sha256[:12]}; {base} has {found[:12]}. Set model.path to the base it was trained on, "
                "in the files it had then: a conversion or new shards of the same weights have another sha256."
            )


def load_adapter(policy: nn.Module, adapter: SavedAdapter) -> None:
    """Put a saved adapter's numbers into a policy that has fresh adapters of the same settings.

    Raises ValueError where their layers differ.
    """
    stored = load_file(adapter.folder / TENSORS)
    own = {peft_name(name): tensor for name, tensor in policy.state_dict().items() if ".lora_" in name}
    if own.keys() != stored.keys():
        odd = sorted(own.keys() ^ stored.keys())
        raise ValueError(
            f"the adapter in {adapter.folder} must have the layers of this policy; {len(odd)} differ, first {odd[0]}. "
            "Set model.adapter.targets as the adapter was made."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _named(adapter: SavedAdapter) -> str:
    return f" ({adapter.base_path})" if adapter.base_path else ""
