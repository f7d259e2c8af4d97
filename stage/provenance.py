"""What a scorer is made of, for the record of a run: its class, and the weights it read.

A scorer that reads files has an attribute `provenance`: a mapping with `path`, `revision` and `sha256` (file name to
hash), or with such mappings inside, as a combination has them by the names of its scorers and a remote reward has
them from its servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def scorer_record(scorer: Any) -> dict[str, Any]:
    """`{"class": dotted name, "weights": its provenance}` as plain JSON; `weights` is empty where it names none."""
    kind = type(scorer)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "weights": weights_of(scorer)}


def weights_of(part: Any) -> dict[str, Any]:
    """The provenance of a scorer, detector or reader as plain JSON, empty where it names none.

    Raises ValueError for a provenance that is no mapping.
    """
    found = getattr(part, "provenance", None)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"provenance is a mapping with path, revision and sha256, {type(part).__name__} has {found!r}; make it one"
        )
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
    return plain


def hashes(record: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted place, sha256) of every file of a record, those of towers, tokenizers and inner scorers too."""
    for key, value in record.items():
        if key == "sha256" and isinstance(value, Mapping):
            yield from ((f"{name}{file}", str(digest)) for file, digest in value.items())
        elif isinstance(value, Mapping):
            yield from hashes(value, f"{name}{key}.")


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the weight files that differ between two records, are new or are gone."""
    old, new = dict(hashes(before)), dict(hashes(now))
    return sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
