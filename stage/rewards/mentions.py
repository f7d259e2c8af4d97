"""What the metadata of a prompt says it mentions: nouns, their attributes, a relation, counts.

Two shapes of metadata are read. The mixed list of T2I-R1:

    {"prompt": "a photo of four coasters", "task_type": "numeracy", "nouns": ["coaster"],
     "numeracy_info": [{"obj_name": "coaster", "num": 4}]}

with `attr_nouns` ("purple elephant") and `spatial_info` (`obj1`, `obj2`, `locality`) where they apply; and GenEval's
(`tag`, `include`), whose classes are the nouns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage.request import Request, parse_request
from stage.types import Prompt


@dataclass(frozen=True)
class Relation:
    """`first` is to be found `locality` ("left of", "near", ...) `second`."""

    first: str
    second: str
    locality: str


@dataclass(frozen=True)
class Mentions:
    """What a prompt mentions. `attributes` is None where the metadata names none; `counts` are (noun, number)."""

    task: str
    nouns: tuple[str, ...]
    attributes: tuple[str, ...] | None
    relation: Relation | None
    counts: tuple[tuple[str, int], ...]


def read_mentions(prompt: Prompt) -> Mentions:
    """The mentions of one prompt; keys whose value is null count as absent.

    Raises:
        ValueError: the metadata has neither shape, or names something that it does not list among the nouns.
    """
    try:
        if prompt.metadata.get("include") is not None:
            return _from_request(parse_request(prompt.metadata))
        return _from_fields(prompt.metadata)
    except ValueError as error:
        raise ValueError(
            f"the prompt {prompt.text!r} (number {prompt.id}) cannot be scored: {error}"
        ) from error


def _from_request(request: Request) -> Mentions:
    """GenEval's lines; a task is named as in the other shape, so that scorers treat both alike."""
    nouns = tuple(clause.name for clause in request.include)
    colored = any(clause.color is not None for clause in request.include)
    attributes = tuple(
        f"{clause.color} {clause.name}" if clause.color else clause.name for clause in request.include
    )
    related = [clause for clause in request.include if clause.relation is not None]
    relation = None
    if related:
        clause = related[0]
        relation = Relation(clause.name, nouns[clause.target], str(clause.relation))
    task = {"counting": "numeracy", "position": "spatial"}.get(request.tag, request.tag)
    return Mentions(
        task=task,
        nouns=nouns,
        attributes=attributes if colored else None,
        relation=relation,
        counts=tuple((clause.name, clause.count) for clause in request.include) if task == "numeracy" else (),
    )


def _from_fields(metadata: Mapping[str, Any]) -> Mentions:
    nouns = _words(metadata, "nouns")
    if nouns is None:
        raise ValueError(
            "its metadata must list the nouns, as nouns or in GenEval's include; got the keys "
            f"{sorted(metadata)}; add them, or [] for a prompt without any"
        )
    spatial, numeracy = metadata.get("spatial_info"), metadata.get("numeracy_info")
    mentions = Mentions(
        task=str(metadata.get("task_type") or ""),
        nouns=nouns,
        attributes=_words(metadata, "attr_nouns"),
        relation=None if spatial is None else _relation(spatial),
        counts=() if numeracy is None else tuple(_count(entry) for entry in _listed(numeracy)),
    )
    named = [noun for noun, _ in mentions.counts]
    if mentions.relation is not None:
        named += [mentions.relation.first, mentions.relation.second]
    for noun in named:
        if noun not in nouns:
            raise ValueError(
                f"what is related or counted is one of the nouns {list(nouns)}, got {noun!r}; add it"
            )
    if mentions.task == "spatial" and mentions.relation is None:
        raise ValueError("a spatial prompt has spatial_info with obj1, obj2 and locality, got none; add it")
    if mentions.task == "numeracy" and not mentions.counts:
        raise ValueError("a numeracy prompt has numeracy_info with obj_name and num, got none; add it")
    return mentions


def _words(metadata: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    found = metadata.get(key)
    if found is None:
        return None
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"{key} is a list of strings, got {found!r}; write it as one")
    if not all(isinstance(word, str) and word.strip() and "." not in word for word in found):
        raise ValueError(f"{key} are non-empty strings without full stops, got {list(found)!r}; repair them")
    return tuple(" ".join(word.split()) for word in found)


def _listed(found: Any) -> Sequence[Any]:
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"numeracy_info is a list of entries, got {found!r}; write it as one")
    return found


def _relation(found: Any) -> Relation:
    if not isinstance(found, Mapping) or not all(
        isinstance(found.get(key), str) for key in ("obj1", "obj2", "locality")
    ):
        raise ValueError(
            f"spatial_info has the strings obj1, obj2 and locality, got {found!r}; write all three"
        )
    first, second = (" ".join(found[key].split()) for key in ("obj1", "obj2"))
    return Relation(first, second, " ".join(found["locality"].split()))


def _count(entry: Any) -> tuple[str, int]:
    name = entry.get("obj_name") if isinstance(entry, Mapping) else None
    number = entry.get("num") if isinstance(entry, Mapping) else None
    if isinstance(number, str) and number.strip().isdecimal():
        number = int(number)
    if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(
            f"an entry of numeracy_info has obj_name and a num of at least 1, got {entry!r}; write both"
        )
    return " ".join(name.split()), number
