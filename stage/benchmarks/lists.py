"""The prompt lists of benchmarks, which are fetched or pointed at: `python -m stage.benchmarks.fetch NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stage.paths import resolve
from stage.prompt_files import read_prompts
from stage.types import Prompt


def read_list(path: str, name: str) -> tuple[Prompt, ...]:
    """The prompts of a file, see `stage.prompt_files.read_prompts`.

    Args:
        name: of the data set, for the command that fetches it.

    Raises:
        FileNotFoundError: the file is not there; says how to get it.
    """
    if not resolve(path).is_file():
        raise FileNotFoundError(
            f"the prompts of {name} must be at {path!r}, where there is no file; fetch them with "
            f"`python -m stage.benchmarks.fetch {name}`, or point datasets=FOLDER or the path itself at a copy"
        )
    return read_prompts(path)


def read_lists(paths: Mapping[str, str], key: str, name: str) -> tuple[Prompt, ...]:
    """The prompts of several files one after the other; each gets the name of its file under `key` of its metadata."""
    return tuple(
        replace(prompt, metadata={**prompt.metadata, key: category})
        for category, path in paths.items()
        for prompt in read_list(path, name)
    )
