"""Prompt templates: the words put around a prompt before the image start token."""

from __future__ import annotations

import string
from dataclasses import dataclass, field

from stage.policy.padding import LeftPadding, ReleasedPadding


@dataclass(frozen=True)
class Template:
    """Text placed before and after a prompt; `name` is what logs and reports call it.

    Janus-Pro's chat template for images is prefix `<|User|>: ` and suffix `\\n\\n<|Assistant|>:`
    (deepseek-ai/Janus: generation_inference.py); the published STAGE code has `User: ` and `\\n\\nAssistant:`
    (krennic999/STAGE: grpo_trainer.py); the plain template has both empty.

    `instruction` is what the model is asked when it plans the image in words first: text with `{prompt}` where the
    prompt goes, placed between the same prefix and suffix. None where the template has none. `padding` says how
    prompts of different lengths share a batch.

    Raises ValueError for an instruction that does not name `{prompt}` and nothing else.
    """

    name: str
    prefix: str
    suffix: str
    instruction: str | None = None
    padding: LeftPadding | ReleasedPadding = field(default_factory=LeftPadding)

    def __post_init__(self) -> None:
        if self.instruction is not None and _fields(self.instruction) != {"prompt"}:
            raise ValueError(
                "a template's instruction must hold {prompt} and no other field in braces; got "
                f"{self.instruction!r}. Write {{{{ and }}}} for braces of the text."
            )

    def render(self, prompt: str, image_start: str) -> str:
        """The text that is tokenized for one image.

        The prompt is stripped, as Janus-Pro's conversation template strips it, and the image start token comes
        last, where transformers' JanusProcessor puts it with `generation_mode="image"`.

        Raises ValueError for a prompt without text: its image would be unconditional without anyone knowing.
        """
        return f"{self.prefix}{_words(prompt)}{self.suffix}{image_start}"

    def render_instruction(self, prompt: str) -> str:
        """The text before a plan. Raises ValueError for a prompt without text, or a template without instruction."""
        if self.instruction is None:
            raise ValueError(
                f"sampler.reasoning=text needs the template's instruction; template {self.name!r} has none. "
                "Set model.template.instruction to words with {prompt} in them."
            )
        return f"{self.prefix}{self.instruction.format(prompt=_words(prompt))}{self.suffix}"


def _words(prompt: str) -> str:
    words = prompt.strip()
    if not words:
        raise ValueError(
            f"a prompt must contain text; got {prompt!r}. Remove the empty line from the prompt file."
        )
    return words


def _fields(text: str) -> set[str | None]:
    """Names in braces; an unbalanced brace counts as a field without a name."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return {None}
