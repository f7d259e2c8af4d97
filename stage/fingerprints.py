"""Fingerprints of prompts: they tell whether a list holds a prompt, or one for the same picture, without the list.

    python -m stage.fingerprints evaluation_metadata.jsonl --output stage/assets/geneval_evaluation.txt

GenEval's 553 evaluation prompts are not part of this repository; what that command made of them is, so that a training
list leaves them out (`stage.prompts`). A fingerprint is `text` or `picture` and the first 16 hexadecimal digits of a
SHA-256: of 600,000 prompts one is taken for another of 1,105 by chance with a probability below 1e-10.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage.paths import resolve, sha256
from stage.prompt_files import read_prompts
from stage.request import Request, parse_request
from stage.types import Prompt

DIGITS = 16
OPPOSITE = {"right of": "left of", "below": "above"}


def meaning(request: Request) -> Any:
    """Equal for two requests that ask for the same picture: the order of objects and the side it is told from."""
    include, relations = list(request.include), []
    for clause in include:
        if clause.relation is not None:
            ends = (clause.name, include[clause.target].name)
            relation = OPPOSITE.get(clause.relation, clause.relation)
            relations.append((relation, ends[::-1] if clause.relation in OPPOSITE else ends))
    objects = sorted((clause.name, clause.count, clause.color or "") for clause in include)
    return tuple(objects), tuple(sorted(relations))


def words(text: str) -> str:
    """A prompt as it is compared: small letters, one space between words, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")


def of_text(text: str) -> str:
    """The fingerprint of the words of a prompt."""
    return _fingerprint("text", words(text))


def of_picture(request: Request) -> str:
    """The fingerprint of what a prompt asks for: classes, counts, colours and positions, in any order of its words."""
    return _fingerprint("picture", json.dumps(meaning(request)))


def of_prompt(prompt: Prompt) -> set[str]:
    """The fingerprints of a prompt in GenEval's schema. Raises ValueError for another one."""
    return {of_text(prompt.text), of_picture(parse_request(prompt.metadata))}


def of_list(path: str | Path) -> set[str]:
    """The fingerprints of all prompts of a list in GenEval's schema. Raises as `stage.prompt_files.read_prompts`."""
    return set().union(*(of_prompt(prompt) for prompt in read_prompts(path)))


def read(path: str | Path) -> set[str]:
    """The fingerprints in a file that `write` made.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"fingerprints are a file that `python -m stage.fingerprints LIST --output FILE` made, got {str(path)!r}, "
            "which is none; check the path"
        )
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for number, line in enumerate(lines):
        kind, _, digits = line.partition(" ")
        if kind not in ("text", "picture") or len(digits) != DIGITS or set(digits) - set("0123456789abcdef"):
            raise ValueError(
                f"a line of {file} is text or picture and {DIGITS} hexadecimal digits, number {number + 1} is "
                f"{line!r}; make the file anew"
            )
    return set(lines)


def write(source: Path, output: Path) -> int:
    """Writes the fingerprints of a list, sorted, below a line that names its sha256; returns how many there are."""
    found = sorted(of_list(source))
    head = f"# stage.fingerprints of {source.name}, sha256 {sha256(source)}"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([head, *found]) + "\n", encoding="utf-8")
    return len(found)


def _fingerprint(kind: str, content: str) -> str:
    return f"{kind} {hashlib.sha256(content.encode('utf-8')).hexdigest()[:DIGITS]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stage.fingerprints", description=__doc__)
    parser.add_argument("source", type=Path, help="a list in GenEval's schema")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args(arguments)
    try:
        print(f"{write(asked.source, asked.output)} fingerprints in {asked.output}")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
