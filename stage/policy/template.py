"""Prompt templates: the words put around a prompt before the image start token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """Text placed before and after a prompt; `name` is what logs and reports call it.

    Janus-Pro's chat template for images is prefix `<|User|>: ` and suffix `\\n\\n<|Assistant|>:`
    (deepseek-ai/Janus: generation_inference.py); the plain template has both empty.
    """

    name: str
    prefix: str
    suffix: str

    def render(self, prompt: str, image_start: str) -> str:
        """The text that is tokenized for one image.

        The prompt is stripped, as Janus-Pro's conversation template strips it, and the image start token comes
        last, where transformers' JanusProcessor puts it with `generation_mode="image"`.

        Raises ValueError for a prompt without text: its image would be unconditional without anyone knowing.
        """
        words = prompt.strip()
        if not words:
            raise ValueError(
                f"a prompt must contain text; got {prompt!r}. Remove the empty line from the prompt file."
            )
        return f"{self.prefix}{words}{self.suffix}{image_start}"
