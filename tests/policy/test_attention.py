"""Kernels give the same scores, and one that cannot run is named before the weights are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage.policy.attention import FLASH, check_attention
from stage.policy.janus import load_policy
from tests.policy.conftest import PLAIN, PROMPTS


def test_kernels_agree(random_checkpoint: Path) -> None:
    found = {}
    for name in ("sdpa", "eager"):
        policy = load_policy(str(random_checkpoint), PLAIN, "float32", (), False, attention=name)
        assert policy.language_model.config._attn_implementation == name
        tokens = torch.arange(4 * 2 * 16).view(4, 2, 16) % policy.codebook_size
        with torch.no_grad():
            prompt = policy.tokenize(PROMPTS)
            found[name] = policy.score(prompt, tokens, guidance_scale=3.0, temperature=1.0).logps
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["flash", "paged|eager", "some/kernel", ""])
def test_an_unknown_kernel_is_named_before_the_path(name: str) -> None:
    """The folder does not exist either, and would be complained about next."""
    with pytest.raises(
        ValueError, match=r"model.attention must be .* is not known. Set model.attention=sdpa"
    ):
        load_policy("nowhere", PLAIN, "float32", (), False, attention=name)


@pytest.mark.parametrize("name", sorted(FLASH))
def test_what_a_flash_kernel_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, and torch sees none"):
        check_attention(name, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"bfloat16 or float16, and model\.dtype is float32"):
        check_attention(name, torch.float32)
    known = f"transformers.utils.import_utils.is_flash_attn_{name[-1]}_available"
    monkeypatch.setattr(known, lambda: False, raising=False)
    with pytest.raises(ValueError, match=f"needs the package {FLASH[name]} and"):
        check_attention(name, torch.bfloat16)
    monkeypatch.setattr(known, lambda: True)
    check_attention(name, torch.bfloat16)
