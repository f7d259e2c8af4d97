"""The stages of pretraining run, resume exactly, and export a whole Janus; the shipped one keeps its size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration, JanusProcessor

import stage.shapes
from stage.shapes.pretrain import main
from stage.shapes.steps import resumable

ASSETS = Path(stage.shapes.__file__).parent / "assets"
STEPS = "--vq-steps 7 --detector-steps 3 --language-steps 3 --bank 64"
BATCHES = "--vq-batch 2 --detector-batch 2 --language-batch 4"


def train(folder: Path, steps: int, stop: int) -> torch.nn.Linear:
    """A small model for `steps` steps, killed before step `stop`."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)

    def step(i: int) -> dict[str, torch.Tensor]:
        if i == stop:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        value = model(torch.randn(8, 3, generator=generator)).square().mean()
        value.backward()
        optimizer.step()
        return {"loss": value.detach()}

    resumable(
        "toy", folder, steps, {"model": model, "optimizer": optimizer}, generator, step, "model", every=4
    )
    return model


def test_a_killed_stage_continues_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(tmp_path / "a", 11, stop=-1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 11, stop=6)
    resumed = train(tmp_path / "b", 11, stop=-1)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(train(tmp_path / "b", 11, stop=0).weight, whole.weight)  # done: no step is taken


@pytest.mark.slow
def test_all_stages_make_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage.shapes.language.CHUNK", 64)
    monkeypatch.setattr(
        sys,
        "argv",
        ["pretrain", str(tmp_path / "work"), "--assets", str(tmp_path), *STEPS.split(), *BATCHES.split()],
    )
    main()
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "tiny_janus", dtype=torch.float32)
    processor = JanusProcessor.from_pretrained(tmp_path / "tiny_janus")
    inputs = processor(text=["a photo of a red circle"], generation_mode="image", return_tensors="pt")
    tokens = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=5)
    assert tokens.shape == (1, 36)
    assert torch.isfinite(load_file(tmp_path / "detector.safetensors")["head.weight"]).all()


@pytest.mark.parametrize("name", ["tiny_janus", "tiny_text"])
def test_shipped_checkpoints_are_whole_small_januses(name: str) -> None:
    model = JanusForConditionalGeneration.from_pretrained(ASSETS / name, dtype=torch.float16)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 9_000_000
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 15 * 2**20
    assert sum(path.stat().st_size for path in files) < 21 * 10**6
    codes = model.model.vqmodel.quantize.embedding.weight.float()
    # With unit codes transformers' own encoder, which does not normalise, finds the decoder's nearest code.
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)), atol=2e-3)
