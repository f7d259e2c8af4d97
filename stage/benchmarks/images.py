"""Images on disk between the two stages of an evaluation: drawing and scoring.

    FOLDER/settings.json     what the images depend on: checkpoint hash, sampler, template, seed, ...
    FOLDER/manifest.jsonl    one planned image a line: file, prompt, prompt id, metadata, sample index, seed, checkpoint
    FOLDER/images/00003_1.png    line 3 of the prompt file, sample 1
    FOLDER/plans/00003_1.txt     with reasoning, the words that were written before it
    FOLDER/tokens/00003_1.npy    where a benchmark scores them, the L image tokens

The manifest is written before the first image, and an image appears under its name only when its bytes are
complete. So a picture that exists is finished, whatever was killed when, and any process can see what is left to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from stage.types import Prompt

SETTINGS = "settings.json"
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Planned:
    """One line of the manifest: the image `file` (relative to the folder) and everything that identifies it.

    `plan` is the file of its plan, None without reasoning; `tokens` that of its tokens, None where nobody wants them.
    """

    file: str
    index: int
    prompt: str
    prompt_id: int
    sample: int
    seed: int
    checkpoint: str
    metadata: Mapping[str, Any]
    plan: str | None = None
    tokens: str | None = None


class Images(Protocol):
    """The images of one model on one split, as scoring sees them, wherever they come from."""

    folder: Path
    planned: tuple[Planned, ...]

    def missing(self) -> tuple[Planned, ...]: ...

    def load(self, item: Planned) -> np.ndarray: ...

    def load_plan(self, item: Planned) -> str | None: ...


class ImageFolder:
    """The images of one model on one split.

    Opening compares `settings` and the plan with what is already there: where they agree the work goes on where it
    stopped. More or fewer images of a prompt are no contradiction, so a quick look with one of each can be extended.

    Args:
        folder: where settings, manifest and images lie; created when missing.
        settings: plain values the images depend on; must hold `seed` and `checkpoint`.
        prompts: the prompts of the split, in file order.
        images_per_prompt: samples 0 to images_per_prompt - 1 are planned for each prompt.
        tokens: whether the tokens of each image are kept beside it.

    Raises ValueError when the folder holds images of other settings or prompts.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        prompts: Sequence[Prompt],
        images_per_prompt: int,
        tokens: bool = False,
    ) -> None:
        self.folder = folder
        reasoning = (settings.get("sampler") or {}).get("reasoning") is not None
        self.planned = tuple(
            Planned(
                file=f"images/{index:05d}_{sample}.png",
                index=index,
                prompt=prompt.text,
                prompt_id=prompt.id,
                sample=sample,
                seed=settings["seed"],
                checkpoint=settings["checkpoint"],
                metadata=dict(prompt.metadata),
                plan=f"plans/{index:05d}_{sample}.txt" if reasoning else None,
                tokens=f"tokens/{index:05d}_{sample}.npy" if tokens else None,
            )
            for index, prompt in enumerate(prompts)
            for sample in range(images_per_prompt)
        )
        lines = {item.file: _line(item) for item in self.planned}
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if any((folder / "images").glob("*.png")):
            lines = self._agree(text, lines)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / SETTINGS, text.encode())
        write_atomic(folder / MANIFEST, "".join(lines[file] for file in sorted(lines)).encode())

    def missing(self) -> tuple[Planned, ...]:
        """Planned images that do not exist yet, in the order of the manifest."""
        return tuple(item for item in self.planned if not (self.folder / item.file).is_file())

    def save(self, item: Planned, image: np.ndarray) -> None:
        """Write one uint8 image `[H, W, 3]` under its name, complete or not at all."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomic(self.folder / item.file, buffer.getvalue())

    def save_plan(self, item: Planned, words: str) -> None:
        """Write the plan of an image; before the image, so that one that exists has its plan."""
        assert item.plan is not None
        write_atomic(self.folder / item.plan, words.encode())

    def save_tokens(self, item: Planned, tokens: np.ndarray) -> None:
        """Write the tokens `[L]` of an image; before the image, like its plan."""
        assert item.tokens is not None
        buffer = io.BytesIO()
        np.save(buffer, tokens.astype(np.int32), allow_pickle=False)
        write_atomic(self.folder / item.tokens, buffer.getvalue())

    def load_tokens(self, item: Planned) -> np.ndarray:
        """The tokens int64 `[L]` of an image. Raises ValueError where their file is gone or damaged."""
        assert item.tokens is not None
        path = self.folder / item.tokens
        try:
            return np.load(path, allow_pickle=False).astype(np.int64)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"every image must have its tokens, but {path} cannot be read ({error}); delete "
                f"{self.folder / item.file} and run the same command again to draw it anew"
            ) from error

    def load_plan(self, item: Planned) -> str | None:
        """The plan of an image, None without reasoning. Raises FileNotFoundError where its file is gone."""
        return None if item.plan is None else (self.folder / item.plan).read_text(encoding="utf-8")

    def load(self, item: Planned) -> np.ndarray:
        """The uint8 image `[H, W, 3]`. Raises ValueError for a missing or unreadable file."""
        return load_picture(
            self.folder / item.file, "delete it and run the same command again to draw it anew"
        )

    def _agree(self, settings: str, lines: Mapping[str, str]) -> dict[str, str]:
        """The lines of the old manifest and of the new plan, by file; ValueError where they contradict each other."""
        found = self._read(SETTINGS)
        if _read_settings(found) != stated(json.loads(settings)):
            self._same(SETTINGS, found, settings)
        old = {}
        for number, line in enumerate(self._read(MANIFEST).splitlines(keepends=True), start=1):
            try:
                old[str(json.loads(line)["file"])] = line
            except (ValueError, KeyError, TypeError) as error:
                raise self._other(f"{MANIFEST}:{number} is no line of a manifest") from error
        for file, line in lines.items():
            self._same(MANIFEST, old.get(file, line), line)
        there = sorted((self.folder / "images").glob("*.png"))
        unknown = [path.name for path in there if f"images/{path.name}" not in old]
        if unknown:
            others = f" and {len(unknown) - 1} others are" if len(unknown) > 1 else " is"
            raise self._other(f"{MANIFEST} does not say what {unknown[0]}{others}, of {len(there)} images")
        return {**old, **lines}

    def _same(self, name: str, there: str, wanted: str) -> None:
        if there != wanted:
            raise self._other(f"{name}: {_difference(there, wanted)}")

    def _read(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            raise self._other(f"there is no {name} that says what they are")
        return path.read_text(encoding="utf-8")

    def _other(self, reason: str) -> ValueError:
        count = len(list((self.folder / "images").glob("*.png")))
        return ValueError(
            f"{self.folder} holds {count} images of another evaluation ({reason}); give another folder with "
            "output=FOLDER, or remove this one"
        )


def sound(images: Images, items: Sequence[Planned]) -> dict[str, str]:
    """The sha256 of each image by its file.

    Raises ValueError, with counts, where some are missing, damaged, or of another size than most.
    """
    faults: dict[str, list[str]] = {}
    found, sizes = dict[str, str](), dict[str, tuple[int, int]]()
    for item in items:
        try:
            content = (images.folder / item.file).read_bytes()
            with Image.open(io.BytesIO(content)) as picture:
                picture.load()
                sizes[item.file] = picture.size
            found[item.file] = hashlib.sha256(content).hexdigest()
        except FileNotFoundError:
            faults.setdefault("missing", []).append(item.file)
        except (OSError, SyntaxError):  # Pillow reports a broken PNG as either
            faults.setdefault("damaged", []).append(item.file)
    usual = Counter(sizes.values()).most_common(1)
    odd = [file for file, size in sizes.items() if size != usual[0][0]]
    faults |= {"of another size": odd} if odd else {}
    if faults:
        listed = "; ".join(
            f"{len(files)} {kind} ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})"
            for kind, files in faults.items()
        )
        raise ValueError(
            f"{images.folder} must hold {len(items)} readable images of one size, got {listed}. Nothing was scored; "
            "delete what is damaged and run the same command again to draw it anew"
        )
    return found


def load_picture(path: Path, remedy: str) -> np.ndarray:
    """A uint8 image `[H, W, 3]`. Raises ValueError, which ends in `remedy`, for a missing or unreadable file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow reports a broken PNG as either
        raise ValueError(
            f"every planned image must be readable, but {path} is not ({error}); {remedy}"
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _line(item: Planned) -> str:
    optional = ("plan", "tokens")
    known = {name: value for name, value in asdict(item).items() if name not in optional or value is not None}
    return json.dumps(known, ensure_ascii=False) + "\n"


def stated(settings: Any) -> Any:
    """Settings without those that are null: a part that is off is one that an older version did not know."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: stated(value) for name, value in settings.items() if value is not None}


def _read_settings(text: str) -> Any:
    try:
        return stated(json.loads(text))
    except ValueError:  # damaged, so not the same
        return None


def _difference(there: str, wanted: str) -> str:
    """The first line that differs, in words for an error message."""
    pairs = zip_longest(there.splitlines(), wanted.splitlines(), fillvalue="nothing")
    left, right = next((left, right) for left, right in pairs if left != right)
    return f"{left.strip(' ,')[:160]}, this evaluation has {right.strip(' ,')[:160]}"
