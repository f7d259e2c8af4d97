"""T2I-CompBench's prompt lists with what its measures need to know: category, line, objects, relation, numbers.

The lists are plain text (Karine-Huang/T2I-CompBench examples/dataset). Relations and numbers are read from the words,
as UniDet_eval/2D_spatial_eval.py and UniDet_eval/numeracy_eval.py do, and written in the schema of
`stage.prompt_files`, so that any scorer can use them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stage.benchmarks.lists import read_list
from stage.paths import resolve
from stage.types import Prompt

CATEGORY, LINE = "category", "line"
SPATIAL, NUMERACY = "2d_spatial", "numeracy"  # how the categories are called whose words are read
LOCALITIES = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
)
NUMBERS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
}
ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)


def read_compbench(paths: Mapping[str, str], objects: str) -> tuple[Prompt, ...]:
    """The prompts of several categories; each knows its `category` and its `line` in the file, counted from 0.

    Args:
        paths: category to file; a category whose name begins with `2d_spatial` or `numeracy` gets relations or numbers.
        objects: file with `singular - plural` of each object that numeracy prompts count.

    Raises:
        FileNotFoundError: a file is not there; says how to fetch it.
        ValueError: a relation or number cannot be read from a prompt.
    """
    plurals = _plurals(objects) if any(name.startswith(NUMERACY) for name in paths) else {}
    found = []
    for category, path in paths.items():
        for line, prompt in enumerate(read_list(path, "t2i_compbench")):
            extra: dict[str, Any] = {CATEGORY: category, LINE: line}
            if category.startswith(SPATIAL):
                extra |= spatial(prompt.text)
            elif category.startswith(NUMERACY):
                extra |= numeracy(prompt.text, plurals)
            found.append(replace(prompt, metadata={**prompt.metadata, **extra}))
    return tuple(found)


def spatial(text: str) -> dict[str, Any]:
    """`a giraffe next to a lamp` as two nouns and their relation. ValueError where there is no known relation."""
    plain = text.strip().rstrip(".")
    for locality in LOCALITIES:
        first, word, second = plain.partition(f" {locality} ")
        if word:
            nouns = [ARTICLE.sub("", side.strip()) for side in (first, second)]
            info = {"obj1": nouns[0], "obj2": nouns[1], "locality": locality}
            return {"task_type": "spatial", "nouns": nouns, "spatial_info": info}
    raise ValueError(
        f"a spatial prompt names one of {', '.join(LOCALITIES)}, {text!r} does not; leave it out"
    )


def numeracy(text: str, plurals: Mapping[str, str]) -> dict[str, Any]:
    """`four lamps and a dog` as nouns with numbers. ValueError where no known object is counted.

    Args:
        plurals: singular and plural of each object to its singular.
    """
    words = re.findall(r"[a-z]+", text.lower())
    counts: dict[str, int] = {}
    for place, word in enumerate(words):
        if word in NUMBERS:
            pair, single = " ".join(words[place + 1 : place + 3]), " ".join(words[place + 1 : place + 2])
            name = plurals.get(pair) or plurals.get(single)
            if name is not None:
                counts.setdefault(name, NUMBERS[word])
    if not counts:
        raise ValueError(f"a numeracy prompt counts objects of the list, {text!r} counts none; leave it out")
    entries = [{"obj_name": name, "num": number} for name, number in counts.items()]
    return {"task_type": "numeracy", "nouns": list(counts), "numeracy_info": entries}


def _plurals(path: str) -> dict[str, str]:
    if not resolve(path).is_file():
        raise FileNotFoundError(
            f"numeracy prompts count objects whose plurals are listed, at {path!r} there is no file; fetch it with "
            "`python -m stage.benchmarks.fetch t2i_compbench`, or point datasets=FOLDER at a copy"
        )
    lines = [
        line.split(" - ") for line in resolve(path).read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return {form.strip().lower(): line[0].strip().lower() for line in lines for form in line}
