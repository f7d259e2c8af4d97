"""Images that another program made, in the layouts that people have.

    GenEval            FOLDER/00003/metadata.jsonl and FOLDER/00003/samples/0000.png
    T2I-CompBench      FOLDER/a red cup and a blue bowl_000003.png, or the same in FOLDER/samples/
    flat               FOLDER/00003.png: line 3 of the prompt file; with G images a prompt, lines 4G to 5G - 1 are
                       those of the fifth prompt
    own                FOLDER/manifest.jsonl and FOLDER/images/, as evaluate.py leaves them

Sources: djghosh13/geneval generation/diffusers_generate.py, Karine-Huang/T2I-CompBench GORS_finetune/inference_eval.py,
krennic999/STAGE src/grpo/src/infer/. Where a benchmark has several splits, or rows such as HPSv2's styles, FOLDER may
hold a folder for each. Every planned image must be there and readable, and no other; all faults are told at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from stage.benchmarks.images import MANIFEST, Planned, load_picture
from stage.types import Prompt

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NUMBER = re.compile(r"\d+")
NUMBERED = re.compile(r"(?P<prompt>.+)_(?P<number>\d+)")
SHOWN = 3  # examples in a message


@dataclass
class Found:
    """What a folder holds: pictures by (line of the prompt file, sample), and by kind of fault what is wrong."""

    pictures: dict[tuple[int, int], Path] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, kind: str, what: str) -> None:
        self.faults.setdefault(kind, []).append(what)


class OutsideFolder:
    """Images of another program on one split, all there and readable. Compare `stage.benchmarks.images.ImageFolder`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: images are missing, left over, damaged, of several sizes, or of other prompts; with counts.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        images_per_prompt: int,
        rows: Sequence[str],
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"images=FOLDER names a folder of images, {folder} is none; check the path"
            )
        self.folder = folder
        found = _look(folder, prompts, images_per_prompt, rows)
        self.sha256 = _check(folder, found, prompts, images_per_prompt)
        self.planned = tuple(
            Planned(
                file=found.pictures[index, sample].relative_to(folder).as_posix(),
                index=index,
                prompt=prompt.text,
                prompt_id=prompt.id,
                sample=sample,
                seed=-1,
                checkpoint=self.sha256,
                metadata=dict(prompt.metadata),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(images_per_prompt)
        )

    def missing(self) -> tuple[Planned, ...]:
        """None: a folder that lacks images is refused."""
        return ()

    def load(self, item: Planned) -> np.ndarray:
        """The uint8 image `[H, W, 3]`."""
        return load_picture(self.folder / item.file, "make it again with the program it comes from")

    def load_plan(self, item: Planned) -> str | None:
        """None: plans of other programs are not read."""
        return None


def _look(folder: Path, prompts: Sequence[Prompt], group: int, rows: Sequence[str]) -> Found:
    """The pictures of a folder in the first layout that it has the marks of."""
    if (folder / MANIFEST).is_file():
        return _own(folder, prompts)
    if any(path.is_dir() for path in folder.glob("[0-9]*/samples")):
        return _geneval(folder, prompts)
    names = list(dict.fromkeys(rows))
    places = {name: place for name in names if (place := _place(folder, name)) is not None}
    if len(names) > 1 and places:
        return _by_row(folder, prompts, group, rows, places)
    inner = folder / "samples" if (folder / "samples").is_dir() else folder
    pictures = _pictures(inner)
    if any(NUMBERED.fullmatch(path.stem) for path in pictures):
        return _named(pictures, prompts)
    return _flat(pictures, group)


def _place(folder: Path, row: str) -> Path | None:
    """The folder of a row: `color`, or `color_val` as T2I-CompBench names its files."""
    return next((place for name in (row, f"{row}_val") if (place := folder / name).is_dir()), None)


def _by_row(
    folder: Path, prompts: Sequence[Prompt], group: int, rows: Sequence[str], places: Mapping[str, Path]
) -> Found:
    found = Found()
    for row in dict.fromkeys(rows):
        lines = [index for index, name in enumerate(rows) if name == row]
        if row in places:
            inner = _look(places[row], [prompts[i] for i in lines], group, [])
            found.pictures |= {
                (lines[i] if i < len(lines) else len(prompts) + i, sample): path
                for (i, sample), path in inner.pictures.items()
            }
            for kind, examples in inner.faults.items():
                for example in examples:
                    found.fault(kind, f"{row}: {example}")
    return found


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def _own(folder: Path, prompts: Sequence[Prompt]) -> Found:
    found = Found()
    lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    planned = {str(line["file"]): line for line in map(json.loads, lines)}
    usual = Counter(str(line.get("checkpoint")) for line in planned.values()).most_common(1)
    for path in _pictures(folder / "images"):
        line = planned.get(f"images/{path.name}")
        if line is None:
            found.fault("not in the manifest", path.name)
        elif str(line.get("checkpoint")) != usual[0][0]:
            found.fault("of another checkpoint", f"{path.name} of {str(line.get('checkpoint'))[:8]}")
        elif line["index"] < len(prompts) and line["prompt"] != prompts[line["index"]].text:
            found.fault("of another prompt", f"{path.name} shows {line['prompt']!r}")
        else:
            found.pictures[line["index"], line["sample"]] = path
    return found


def _geneval(folder: Path, prompts: Sequence[Prompt]) -> Found:
    found, samples = Found(), list[tuple[int, int, Path]]()
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not NUMBER.fullmatch(place.name):
            found.fault("not named by a number", f"{place.name}/")
            continue
        index = int(place.name)
        if index < len(prompts):
            _compare(place, prompts[index], found)
        for path in _pictures(place / "samples") if (place / "samples").is_dir() else []:
            if NUMBER.fullmatch(path.stem):
                samples.append((index, int(path.stem), path))
            else:
                found.fault("not named by a number", f"{place.name}/samples/{path.name}")
    # Some programs count from 1; they do so in all folders, and one without 0000.png lacks it.
    first = min(min((number for _, number, _ in samples), default=0), 1)
    for index, number, path in samples:
        if (index, number - first) in found.pictures:
            found.fault("twice there", path.relative_to(folder).as_posix())
        else:
            found.pictures[index, number - first] = path
    return found


def _compare(place: Path, prompt: Prompt, found: Found) -> None:
    """The metadata beside the samples must be those of the prompt file, as far as both say something."""
    try:
        line = json.loads((place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    except (OSError, ValueError, IndexError) as error:
        found.fault("without readable metadata", f"{place.name}/metadata.jsonl ({type(error).__name__})")
        return
    ours = {**prompt.metadata, "prompt": prompt.text}
    keys = ("prompt", "tag", "include", "exclude")
    if not isinstance(line, dict) or "prompt" not in line:
        found.fault("without readable metadata", f"{place.name}/metadata.jsonl (no prompt)")
        return
    differing = [key for key in keys if key in line and key in ours and line[key] != ours[key]]
    if differing:
        key = differing[0]
        found.fault(
            "of another prompt", f"{place.name} has {key} {line.get(key)!r}, the list {ours.get(key)!r}"
        )


def _named(pictures: Sequence[Path], prompts: Sequence[Prompt]) -> Found:
    found, samples = Found(), dict[int, list[tuple[int, Path]]]()
    lines = {spelling: i for i, prompt in enumerate(prompts) for spelling in _spellings(prompt.text)}
    for path in pictures:
        parts = NUMBERED.fullmatch(path.stem)
        if parts is None or parts["prompt"] not in lines:
            found.fault("not named by a prompt of the list", path.name)
        else:
            samples.setdefault(lines[parts["prompt"]], []).append((int(parts["number"]), path))
    for index, several in samples.items():
        for sample, (_, path) in enumerate(sorted(several)):
            found.pictures[index, sample] = path
    return found


def _spellings(text: str) -> set[str]:
    """A prompt as a file name: a name holds no slash, and some programs leave the full stop out."""
    return {
        spelled
        for slash in ("/", "_", " ", "")
        for spelled in (text.replace("/", slash), text.replace("/", slash).rstrip("."))
    }


def _flat(pictures: Sequence[Path], group: int) -> Found:
    found = Found()
    for path in pictures:
        if not NUMBER.fullmatch(path.stem):
            found.fault("not named by a number", path.name)
        elif (place := divmod(int(path.stem), group)) in found.pictures:
            found.fault("twice there", path.name)
        else:
            found.pictures[place] = path
    return found


def _check(folder: Path, found: Found, prompts: Sequence[Prompt], group: int) -> str:
    """The sha256 of all pictures in order; ValueError, with counts, unless just the planned ones are there, whole."""
    held = Counter(index for index, _ in found.pictures)
    each = set(held.values())
    if len(each) == 1 and each != {group} and len(held) == len(prompts):
        raise ValueError(
            f"{folder} holds {each.pop()} images of each prompt, the benchmark has {group}; set "
            f"benchmark.images_per_prompt to what is there"
        )
    planned = [(index, sample) for index in range(len(prompts)) for sample in range(group)]
    for index, sample in planned:
        if (index, sample) not in found.pictures:
            found.fault("missing", f"image {sample} of line {index}, {prompts[index].text!r}")
    for place in sorted(set(found.pictures) - set(planned)):
        found.fault("more than planned", found.pictures[place].relative_to(folder).as_posix())
    digest, sizes = hashlib.sha256(), Counter[tuple[int, int]]()
    for place in planned:
        if place in found.pictures:
            _whole(folder, found.pictures[place], found, digest, sizes)
    if len(sizes) > 1:
        listed = ", ".join(f"{count} of {w} x {h}" for (w, h), count in sizes.most_common(SHOWN))
        found.fault("of another size", listed)
    if found.faults:
        listed = "; ".join(
            f"{len(examples)} {kind} ({', '.join(examples[:SHOWN])}{', ...' if len(examples) > SHOWN else ''})"
            for kind, examples in found.faults.items()
        )
        raise ValueError(
            f"{folder} must hold {len(planned)} images, {group} for each of {len(prompts)} prompts, and is not "
            f"complete: {listed}. Nothing was scored; repair the folder, or point the benchmark at its prompt file"
        )
    return digest.hexdigest()


def _whole(
    folder: Path, path: Path, found: Found, digest: hashlib._Hash, sizes: Counter[tuple[int, int]]
) -> None:
    """Add a picture to the digest and its size to the count; a damaged one to the faults."""
    digest.update(path.read_bytes())
    try:
        with Image.open(path) as picture:
            size = picture.size
            picture.verify() if picture.format == "PNG" else picture.load()  # only PNG has checksums to verify
    except (OSError, SyntaxError) as error:
        found.fault("damaged", f"{path.relative_to(folder).as_posix()} ({error})")
    else:
        sizes[size] += 1
