"""A checkpoint written in another layout, tensor by tensor, so that memory holds one shard and not the model.

What the layout of the result has no place for goes into a folder inside of it, which a conversion back takes up again:
`multi_modality/` holds the original's configuration and the tensors that no forward pass reads, so that there and back
gives every tensor bit for bit. Without such a folder those tensors are written as zeros.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from stage.policy.architecture import original_config
from stage.policy.forms import MULTI_MODALITY, SHARD_BYTES, TRANSFORMERS
from stage.policy.layout import (
    EMBEDDING,
    HEAD,
    Faults,
    ModelFolder,
    open_folder,
)
from stage.policy.names import Shape, join, original_shapes, to_transformers, unread_shapes
from stage.policy.text import TOKENIZER_FILES, write_for_the_original, write_for_transformers
from stage.policy.weights import (
    Weights,
    plan_shards,
    write_index,
    write_json,
    write_shard,
)

UNFINISHED = ".unfinished"  # ends the names of folders that are being written
KEPT = ("config.json", "meta.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES[1:])


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name, shape and type, and how to get its numbers."""

    name: str
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def convert(
    source: Path, destination: Path, to: str, *, words: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the checkpoint in folder `source` into the new folder `destination`, in the layout `to`.

    Args:
        words: folder of tokenizer and processor files; None is `source`.
        shard_bytes: largest file of weights; memory stays near twice this.

    Raises FileExistsError if `destination` exists, and ValueError, with every name, for tensors that are missing, too
    many, or of another shape. Nothing is left behind by a failure.
    """
    opened = open_folder(source)
    faults = opened.faults()
    if faults != Faults():
        raise ValueError(f"every tensor of {source} must have its place:\n" + "\n".join(faults.lines()))
    with new_folder(destination) as folder:
        write_checkpoint(opened, folder, to, words=words or source, shard_bytes=shard_bytes)


def write_checkpoint(
    opened: ModelFolder,
    folder: Path,
    to: str,
    *,
    words: Path,
    shard_bytes: int = SHARD_BYTES,
    changed: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """All files of a checkpoint in the layout `to`, into an existing folder.

    `changed` are tensors, by transformers' name, that replace those of the source; a tied head follows its embedding.
    `dtype` is the type of what transformers reads, None that of each tensor in the source.
    """
    if dtype is not None:
        opened.config.dtype = dtype
    if to == TRANSFORMERS:
        _text_for_transformers(opened, words, folder)
        outputs = _transformers_outputs(opened, changed or {}, dtype)
        keep_unread(opened, folder)
    else:
        _text_for_the_original(opened, words, folder)
        outputs = _original_outputs(opened, changed or {}, dtype)
    write_tensors(folder, outputs, shard_bytes, opened.weights.release)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it when the block ends well, and is removed otherwise."""
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(
            f"{destination} exists, and nothing is overwritten; name a folder that does not."
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    first = f".{destination.name}."
    beside = (found for found in destination.parent.iterdir() if found.name.startswith(first))
    left = sorted(str(found) for found in beside if found.suffix == UNFINISHED)
    if left:
        names = ", ".join(left)
        sys.stderr.write(
            f"left by another process that is at work, or was killed and can be deleted: {names}\n"
        )
    # Not named after the process: in a container the next one may have the same number.
    temporary = destination.with_name(f"{first}{secrets.token_hex(4)}{UNFINISHED}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(folder: Path, outputs: list[Output], shard_bytes: int, release: Callable[[], None]) -> None:
    """The tensors in shards, one shard in memory at a time, with a progress bar in bytes and time left on stderr."""
    by_name = {output.name: output for output in outputs}
    shards = plan_shards({name: output.size for name, output in by_name.items()}, shard_bytes)
    total = sum(output.size for output in outputs)
    free = shutil.disk_usage(folder).free
    if total > free:
        words = f"{total / 1e6:,.0f} MB of weights must fit on the disk, which has {free / 1e6:,.0f} MB left"
        raise OSError(errno.ENOSPC, words, str(folder.parent))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing", total=total)
        for file, names in shards.items():
            tensors = {}
            for name in names:
                tensors[name] = _checked(by_name[name])
                progress.advance(task, by_name[name].size)
            write_shard(folder / file, tensors)
            tensors.clear()
            release()
    write_index(folder, shards, total)


def keep_unread(opened: ModelFolder, folder: Path) -> None:
    """The tensors and files of the original that transformers has no place for, in a folder of their own."""
    kept = folder / MULTI_MODALITY
    if opened.layout == TRANSFORMERS:
        if (opened.folder / MULTI_MODALITY).is_dir():
            shutil.copytree(opened.folder / MULTI_MODALITY, kept)
        return
    kept.mkdir()
    for name in KEPT:
        if (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, kept / name)
    write_shard(kept / "model.safetensors", {name: opened.weights.read(name) for name in opened.unread})


def _transformers_outputs(
    opened: ModelFolder, changed: Mapping[str, Tensor], dtype: torch.dtype | None
) -> list[Output]:
    tied = bool(opened.config.tie_word_embeddings)
    names = [name for name in opened.tensors if not (tied and name == HEAD)]
    return [_output(opened, name, changed, dtype) for name in names]


def _original_outputs(
    opened: ModelFolder, changed: Mapping[str, Tensor], dtype: torch.dtype | None
) -> list[Output]:
    shapes = opened.shapes
    if HEAD not in shapes:
        shapes[HEAD] = shapes[EMBEDDING]  # the original always stores its head
    unread = _unread(opened)
    outputs = []
    for original, shape in original_shapes(shapes).items():
        if original in unread:
            continue
        names = [EMBEDDING if name not in opened.tensors else name for name in to_transformers(original)]
        parts = [_output(opened, name, changed, dtype) for name in names]
        outputs.append(Output(original, shape, parts[0].dtype, partial(_joined, original, parts)))
    return outputs + list(unread.values())


def _joined(original: str, parts: list[Output]) -> Tensor:
    return join(original, [part.read() for part in parts])


def _unread(opened: ModelFolder) -> dict[str, Output]:
    """The tensors of the original that no forward pass reads: as they came, or zeros."""
    kept = opened.folder / MULTI_MODALITY
    if opened.layout == MULTI_MODALITY:
        weights, stored = opened.weights, opened.unread
    elif kept.is_dir():
        weights = Weights(kept)
        stored = weights.stored
    else:
        dtype = opened.tensors["model.vqmodel.quant_conv.weight"].dtype
        shapes = unread_shapes(opened.shapes)
        return {
            name: Output(name, shape, dtype, partial(torch.zeros, shape, dtype=dtype))
            for name, shape in shapes.items()
        }
    return {
        name: Output(name, item.shape, item.dtype, partial(weights.read, name))
        for name, item in stored.items()
    }


def _output(
    opened: ModelFolder, name: str, changed: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Output:
    """A tensor by transformers' name, of the source or of `changed`, in its type in the source or in `dtype`."""
    item = opened.tensors[name]
    wanted = dtype if dtype is not None and item.dtype.is_floating_point else item.dtype
    return Output(
        name,
        item.shape,
        wanted,
        lambda: (changed[name] if name in changed else opened.read(name)).to(wanted),
    )


def _checked(output: Output) -> Tensor:
    tensor = output.read()
    if tuple(tensor.shape) != output.shape or tensor.dtype != output.dtype:
        raise ValueError(
            f"{output.name} must be {list(output.shape)} {output.dtype}; got {list(tensor.shape)} {tensor.dtype}."
        )
    return tensor


def _text_for_transformers(opened: ModelFolder, words: Path, folder: Path) -> None:
    config: Any = opened.config
    if _has_words(words):
        tokenizer = write_for_transformers(words, folder, config.vision_config.num_image_tokens)
        if opened.layout == MULTI_MODALITY:
            config.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config.text_config, name, getattr(tokenizer, name))
    config.architectures = ["JanusForConditionalGeneration"]
    config.save_pretrained(folder)


def _text_for_the_original(opened: ModelFolder, words: Path, folder: Path) -> None:
    config: Any = opened.config
    if _has_words(words):
        write_for_the_original(
            words, folder, config.vision_config.image_size, config.vision_config.num_image_tokens
        )
    kept = opened.folder if opened.layout == MULTI_MODALITY else opened.folder / MULTI_MODALITY
    for name in KEPT:
        if (kept / name).is_file():
            shutil.copyfile(kept / name, folder / name)
    if not (folder / "config.json").is_file():
        shapes = opened.shapes
        shapes.setdefault(HEAD, shapes[EMBEDDING])
        write_json(folder / "config.json", original_config(config, original_shapes(shapes)))


def _has_words(folder: Path) -> bool:
    """Whether the folder has a tokenizer; a model without one is converted, and that is said."""
    if (folder / "tokenizer.json").is_file():
        return True
    sys.stderr.write(f"{folder} has no tokenizer, so the result has none; --tokenizer names another folder\n")
    return False
