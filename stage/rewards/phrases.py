"""The noun phrases of a prompt, about which T2I-CompBench asks BLIP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What stands between the phrases of a prompt made from a template.
BETWEEN = re.compile(r"\s*(?:,\s*and|,|\band\b)\s*", re.IGNORECASE)


class SpacyPhrases:
    """The noun chunks of spaCy, as T2I-CompBench's BLIPvqa_eval/BLIP_vqa.py has them.

    Args:
        model: name of an installed pipeline (T2I-CompBench: en_core_web_sm).

    Raises:
        ImportError: spaCy or the pipeline is not installed; says how to install them.
    """

    def __init__(self, model: str) -> None:
        try:
            import spacy

            self.pipeline: Any = spacy.load(model)
        except (ImportError, OSError) as error:
            raise ImportError(
                f"noun phrases come from spaCy's {model}: install the extra `compbench`, run "
                f"`python -m spacy download {model}`, or set phrases._target_ to "
                f"stage.rewards.phrases.TemplatePhrases for prompts like 'a red cup and a blue bowl' ({error})"
            ) from error

    def __call__(self, text: str) -> Sequence[str]:
        return [str(chunk) for chunk in self.pipeline(text).noun_chunks]


class TemplatePhrases:
    """The parts of a prompt that commas and `and` separate: `a red cup and a blue bowl`.

    This is no parser. On prompts made from T2I-CompBench's templates it finds what the parser finds; a sentence with
    verbs or prepositions stays whole, and its score is not that of the benchmark.
    """

    def __call__(self, text: str) -> Sequence[str]:
        return [part for part in BETWEEN.split(text.strip().rstrip(".")) if part]
