"""Reading a checkpoint of mmdet without running code of it, and its names in the spelling of mmdet 3.3.

Checkpoints of mmdet are pickles that hold, beside tensors, records of the training run: arrays of numpy, objects of
mmengine. `torch.load(weights_only=True)` refuses those. Here each foreign class or function is replaced by `Inert`,
which does nothing and keeps nothing, so that the tensors can be read and no foreign code runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

# mmdet 2 numbers the attentions of a layer in the order in which they run. In Mask2Former's decoder the masked
# cross-attention comes first. Source: open-mmlab/mmdetection v2.28 configs/mask2former, `operation_order`.
RENAMED = (
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
)

# Pickles of protocol 2, which torch writes, name two modules as Python 2 did.
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Inert:
    """Stands where a checkpoint names a class or function that is not of torch."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_checkpoint(file: Path, accept: Callable[[Any, Path], None] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint of mmdet 2 or 3, on the CPU, by the names of mmdet 3.3.

    Args:
        file: holds a mapping with `state_dict`, or the state dict itself.
        accept: is shown what the file has as `meta`, None for nothing, and the file; raises to refuse them.

    Raises:
        ValueError: the file is no such checkpoint, or its records cannot be skipped safely.
    """
    try:
        content = _load(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"a checkpoint is a file that torch.load reads with weights_only, {file} ({file.stat().st_size} bytes) "
            f"is not: {error}. Download it again; if it is whole, load it where you trust it and save "
            f"torch.save({{'state_dict': checkpoint['state_dict']}}, path)"
        ) from error
    if accept is not None:
        accept(content.get("meta") if isinstance(content, Mapping) else None, file)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(
            f"a checkpoint maps names to tensors, {file} holds {type(state).__name__}; give another"
        )
    foreign = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"a state dict holds tensors alone, that of {file} holds {len(foreign)} other values, first "
            f"{foreign[0]}; give the detector's weights"
        )
    return modern_names({str(name): tensor for name, tensor in state.items()})


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` by the names of mmdet 3.3. Raises ValueError where both names of a tensor are there."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        modern = name
        for pattern, replacement in RENAMED:
            modern = re.sub(pattern, replacement, modern)
        if modern in found:
            raise ValueError(
                f"a checkpoint is in the layout of mmdet 2 or of mmdet 3, this one has {modern} and its name in "
                f"mmdet 2, {name}; keep one of them"
            )
        found[modern] = tensor
    return found


def _load(file: Path) -> Any:
    """What the file holds, foreign objects replaced by `Inert`."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch 2.1, in mmdet's own environment
        return torch.load(file, map_location="cpu", weights_only=True)
    # Names that torch allows by itself keep their meaning.
    with torch.serialization.safe_globals([(Inert, name) for name in _globals(file)]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _globals(file: Path) -> set[str]:
    """Dotted names of the classes and functions that the pickles in a checkpoint name."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            records = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return set().union(*(_named(io.BytesIO(archive.read(name))) for name in records))
    with file.open(
        "rb"
    ) as stream:  # before torch 1.6, and as mmdet publishes: four pickles, then the numbers
        return set().union(*(_named(stream) for _ in range(4)))


def _named(stream: IO[bytes]) -> set[str]:
    """The names in one pickle, which is read through without being carried out."""
    names = (
        str(argument).split(" ", 1)
        for code, argument, _ in pickletools.genops(stream)
        if code.name == "GLOBAL"
    )
    return {f"{PYTHON_2.get(module, module)}.{name}" for module, name in names}
