"""Templates put the right words around a prompt, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoProcessor

from stage.policy.template import Template
from tests.policy.conftest import PLAIN, load


def from_yaml(root: Path, name: str) -> Template:
    return instantiate(OmegaConf.load(root / "conf" / "model" / "template" / f"{name}.yaml"))


def test_plain_is_the_prompt_and_the_start_token(root: Path) -> None:
    assert from_yaml(root, "plain") == replace(PLAIN, instruction="{prompt} plan :")
    assert PLAIN.render("a red circle", "<begin_of_image>") == "a red circle<begin_of_image>"


def test_janus_pro_is_its_chat_template(root: Path) -> None:
    # The string that generation_inference.py of deepseek-ai/Janus builds for one user turn.
    expected = "<|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>"
    assert from_yaml(root, "janus_pro").render("  a red circle\n", "<begin_of_image>") == expected


def test_a_prompt_without_text_raises() -> None:
    with pytest.raises(ValueError, match="must contain text"):
        PLAIN.render(" \n", "<begin_of_image>")


def test_tokens_are_those_of_the_processor(root: Path, checkpoint: Path) -> None:
    """JanusProcessor with generation_mode="image", handed the text that the template makes."""
    policy, processor = load(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    policy.template = from_yaml(root, "janus_pro")
    texts = ["a red circle", "a photo of two green square and a blue triangle"]
    got = policy.tokenize(texts)
    chats = [f"<|User|>: {text}\n\n<|Assistant|>:" for text in texts]
    wanted = processor(text=chats, generation_mode="image", padding=True, return_tensors="pt")
    assert got.ids.tolist() == wanted["input_ids"].tolist()
    assert got.mask.tolist() == wanted["attention_mask"].tolist()
    assert got.mask[0, 0] == 0 and got.mask[:, -1].all()  # the shorter prompt is padded on the left
