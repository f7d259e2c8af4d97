"""One line of GenEval's metadata, checked: what a picture must and must not show.

    {"tag": "position", "prompt": "a photo of a dog left of a cat",
     "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}

Everything that reads such a line (prompt files, rewards, benchmarks) reads it here, so that a line is either
scored as it is written or refused. Schema: djghosh13/geneval prompts/create_prompts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Clause:
    """One entry of `include` or `exclude`. `relation` is to the objects of include number `target`."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = -1


@dataclass(frozen=True)
class Request:
    """A metadata line that can be scored."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


def parse_request(metadata: Mapping[str, Any]) -> Request:
    """The requirements of one line: `tag`, `include`, optionally `exclude`; other keys are ignored.

    A key whose value is null counts as absent.

    Raises:
        ValueError: naming the entry, for anything that cannot be scored or would not be scored as written.
    """
    tag = metadata.get("tag")
    if not isinstance(tag, str) or not tag.strip():
        raise ValueError(f"tag must be a non-empty string, got {tag!r}; name the task, like 'two_object'")
    include = tuple(_clause(entry, i, "include") for i, entry in enumerate(_entries(metadata, "include")))
    exclude = tuple(_clause(entry, i, "exclude") for i, entry in enumerate(_entries(metadata, "exclude")))
    if not include:
        raise ValueError(
            f"include must list at least one object that the picture shows, got {metadata.get('include')!r}; "
            f"write [{{'class': 'dog', 'count': 1}}]"
        )
    for wanted in include:
        for unwanted in exclude:
            if wanted.name == unwanted.name and unwanted.count <= wanted.count:
                raise ValueError(
                    f"no picture has at least {wanted.count} and fewer than {unwanted.count} "
                    f"{wanted.name!r}; raise the count in exclude or drop the entry"
                )
    return Request(tag, include, exclude)


def _entries(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    entries = metadata.get(key)
    if entries is None:
        return ()
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ValueError(f"{key} must be a list, got {entries!r}; write [{{'class': 'dog', 'count': 1}}]")
    return entries


def _clause(entry: Any, index: int, key: str) -> Clause:
    """Entry `index` of `key`, checked."""
    where = f"{key}[{index}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be an object, got {entry!r}; write {{'class': 'dog', 'count': 1}}")
    known = ("class", "count", "color", "position") if key == "include" else ("class", "count")
    for extra in entry:
        if extra not in known:
            raise ValueError(
                f"{where} takes {', '.join(known)}, got {extra!r}, which nothing scores; remove it"
            )
    name, count, color = entry.get("class"), entry.get("count"), entry.get("color")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}.class must be a non-empty string, got {name!r}; name the object")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{where}.count must be a positive integer, got {count!r}; write how many are asked for"
        )
    if color is not None and (not isinstance(color, str) or not color.strip()):
        raise ValueError(f"{where}.color must be a non-empty string, got {color!r}; name it or drop the key")
    if entry.get("position") is None:
        return Clause(name, count, color)
    return Clause(name, count, color, *_position(entry["position"], index, where))


def _position(position: Any, index: int, where: str) -> tuple[str, int]:
    """Relation and index of the earlier include that it refers to, from `["left of", 0]`."""
    if isinstance(position, str) or not isinstance(position, Sequence) or len(position) != 2:
        raise ValueError(f"{where}.position must be a pair like ['left of', 0], got {position!r}; write one")
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{where}.position knows {', '.join(RELATIONS)}, got {relation!r}; use one of these")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < index:
        raise ValueError(
            f"{where}.position must refer to an include before this one, by its index below {index}, "
            f"got {target!r}; list the object that it refers to first"
        )
    return relation, target
