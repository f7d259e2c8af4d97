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


def test_release_is_what_its_conversation_makes(root: Path) -> None:
    """Janus's DeepSeek conversation of the roles User and Assistant, an empty answer, and no system prompt."""
    expected = "User: a red circle\n\nAssistant:<begin_of_image>"
    for name in ("release", "release_padded"):
        assert from_yaml(root, name).render(" a red circle ", "<begin_of_image>") == expected


def test_an_instruction_stands_where_the_prompt_would(root: Path) -> None:
    assert from_yaml(root, "plain").render_instruction(" a red circle\n") == "a red circle plan :"
    asked = from_yaml(root, "janus_pro").render_instruction("a {red} circle")
    assert asked.startswith("<|User|>: ") and asked.endswith("\n\n<|Assistant|>:")
    assert "a {red} circle\n" in asked  # braces of a prompt are left alone
    with pytest.raises(ValueError, match="template 'plain' has none"):
        PLAIN.render_instruction("a red circle")


@pytest.mark.parametrize("words", ["plan it", "{prompt} {style}", "{}", "{prompt", "plan {0}"])
def test_an_instruction_needs_the_prompt_and_no_other_field(words: str) -> None:
    with pytest.raises(ValueError, match="and no other field in braces"):
        Template("a", "", "", words)
    assert Template("a", "", "", "{prompt}{prompt} {{x}}").render_instruction("b") == "bb {x}"


def test_a_prompt_without_text_raises() -> None:
    for render in (PLAIN.render, lambda text, _: Template("a", "", "", "{prompt}").render_instruction(text)):
        with pytest.raises(ValueError, match="must contain text"):
            render(" \n", "<begin_of_image>")


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
