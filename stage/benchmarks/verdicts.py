"""Verdicts on disk, a file for each prompt, so that scoring goes on where it was stopped and processes share it.

    FOLDER/verdicts/1a2b3c4d/00003.json    line 3 of the prompt file: sha256 and verdict of each of its images

The folder is named by everything a verdict depends on beside the image: the scorer with its settings and weights, the
program's code, versions. A verdict counts for the bytes that were judged: an image that was replaced is judged again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from stage.benchmarks.benchmark import Benchmark, Verdict
from stage.benchmarks.images import write_atomic
from stage.benchmarks.provenance import prompts_sha256, versions
from stage.provenance import scorer_record

SOURCE = Path(__file__).resolve().parents[1]


class Verdicts:
    """The verdicts of one scorer on one split.

    Args:
        folder: of the split; `verdicts` is made in it.
        identity: as `scoring_identity` makes it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = folder / "verdicts" / hashlib.sha256(text.encode()).hexdigest()[:8]

    def save(self, index: int, images: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        """Write the verdicts on the images of line `index`, whose sha256 are `images`."""
        found = {"images": list(images), "verdicts": [asdict(verdict) for verdict in verdicts]}
        write_atomic(self._file(index), json.dumps(found).encode())

    def load(self, index: int, images: Sequence[str]) -> list[Verdict] | None:
        """The verdicts on just these images, None where there are none, or of other images."""
        try:
            found = json.loads(self._file(index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self._file(index)} is no file of verdicts ({error}); delete it to score these images again"
            ) from error
        if found["images"] != list(images):
            return None
        return [Verdict(verdict["parts"], verdict["reason"]) for verdict in found["verdicts"]]

    def forget(self) -> None:
        """Delete all verdicts of this scorer, so that the next `load` finds none."""
        for file in self.folder.glob("*.json"):
            file.unlink()

    def has(self, index: int) -> bool:
        """Whether line `index` was judged, whatever its images were."""
        return self._file(index).is_file()

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"


def scoring_identity(benchmark: Benchmark, split: str, checkpoint: str, settings: Any) -> dict[str, Any]:
    """What verdicts depend on beside images: prompts; class, weights and `settings` of the scorer; code and versions.

    `checkpoint` keeps images of two models apart whose verdicts lie in one folder.
    """
    module = inspect.getmodule(type(benchmark.scorer))
    file = None if module is None else getattr(module, "__file__", None)
    return {
        "checkpoint": checkpoint,
        "prompts": prompts_sha256(benchmark.prompts(split)),
        "judge": scorer_record(benchmark.scorer),
        "settings": settings,
        "code": [
            code_sha256(),
            None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        ],
        "versions": versions(),
    }


@cache
def code_sha256() -> str:
    """Of all Python files of the package, by name: another commit may judge otherwise."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        digest.update(file.relative_to(SOURCE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
