"""Which attention kernels this machine can run, asked before any weights are read."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import import_utils

PLAIN = ("sdpa", "eager")  # of torch alone, on every device
# Kernels of transformers with their packages; each wants a CUDA device and a type of 16 bits.
FLASH = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def check_attention(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the language model can run with this kernel, here and in this type.

    Nothing is downloaded: transformers would fetch and run a kernel in place of a package that is missing.
    """
    if name in PLAIN:
        return
    missing = "is not known" if name not in FLASH else _missing(name, dtype)
    if missing is not None:
        raise ValueError(
            f"model.attention must be a kernel that can run here, one of {', '.join((*PLAIN, *FLASH))}; {name!r} "
            f"{missing}. Set model.attention=sdpa."
        )


def set_attention(language_model: Any, name: str) -> None:
    """Run the language model with this kernel from now on."""
    language_model.set_attn_implementation(name)


def _missing(name: str, dtype: torch.dtype) -> str | None:
    """What a flash kernel lacks here, None where it can run."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    if dtype.itemsize != 2:
        return f"computes in bfloat16 or float16, and model.dtype is {str(dtype).removeprefix('torch.')}"
    installed = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", None)
    if installed is None or not installed():
        return f"needs the package {FLASH[name]} and a transformers that knows it"
    return None
