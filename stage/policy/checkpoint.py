"""Reading a Janus checkpoint, with every cheap check before the weights are touched, and converting one.

`python -m stage.policy.checkpoint convert SRC DST --to transformers|multi_modality`
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage.paths import model_folder
from stage.policy.forms import MULTI_MODALITY, SHARD_BYTES, TRANSFORMERS

# torch and transformers take seconds; they are imported where they are used, so that `--help` and a mistyped option
# answer at once.
if TYPE_CHECKING:
    import torch
    from transformers import JanusForConditionalGeneration

    from stage.policy.layout import ModelFolder


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode with the tokenizer and image processor that were saved beside it."""

    model: JanusForConditionalGeneration
    tokenizer: Any
    image_processor: Any


def resolve_dtype(name: str) -> torch.dtype:
    """`float32` to `torch.float32`. Raises ValueError for anything but a floating-point type of torch."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must name a floating-point type of torch; got {name!r}. Use float32, bfloat16 or float16."
        )
    return dtype


def read_checkpoint(
    path: str | Path,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> Checkpoint:
    """Load a Janus in the layout of transformers or of the original, from a folder or a hub repository.

    `lm_head` is tied to the text embeddings or not, as the checkpoint says. No code of the checkpoint is run.

    Args:
        path, revision, subfolder: see `stage.paths.model_folder`.
        tokenizer: another folder or repository, for a checkpoint without tokenizer and processor files.

    Raises FileNotFoundError for a missing folder or file, ValueError for a file of another model, a damaged file, a
    tokenizer without the image tokens, or weights that do not fill the model.
    """
    from transformers import GenerationConfig

    from stage.policy.layout import open_folder
    from stage.policy.text import generation_config, read_image_processor, read_tokenizer

    folder = model_folder(path, revision, subfolder)
    source = open_folder(folder)
    words = folder if tokenizer is None else model_folder(tokenizer)
    read = read_tokenizer(words)
    processor = read_image_processor(words)
    model = load_model(source, dtype)
    if source.layout == MULTI_MODALITY:
        model.generation_config = GenerationConfig(**generation_config(read))
    return Checkpoint(model, read, processor)


def load_model(source: ModelFolder, dtype: torch.dtype) -> JanusForConditionalGeneration:
    """The model alone, in eval mode; a folder without tokenizer will do. Raises ValueError as `ModelFolder.check`."""
    source.check()
    return source.load(dtype).eval()


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake or a signal ends it with one text, and leaves no files."""
    parser = argparse.ArgumentParser(prog="python -m stage.policy.checkpoint", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "convert", help="write a checkpoint in the other layout, or in new shards; SRC is not changed"
    )
    command.add_argument("source", metavar="SRC", help="folder, package:// path or hub repository owner/name")
    command.add_argument("destination", metavar="DST", type=Path, help="folder to make; must not exist")
    command.add_argument("--to", required=True, choices=(TRANSFORMERS, MULTI_MODALITY), help="layout of DST")
    command.add_argument("--revision", help="branch, tag or commit of a hub repository")
    command.add_argument("--subfolder", help="folder inside of SRC")
    command.add_argument("--tokenizer", help="folder or repository with tokenizer files, where SRC has none")
    command.add_argument(
        "--shard-mb", type=int, default=SHARD_BYTES >> 20, help="largest file, in MiB (%(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.shard_mb < 1:
        parser.error(f"--shard-mb must be at least 1; got {given.shard_mb}")
    from stage.policy.convert import convert

    # What a job scheduler sends must clean up as Ctrl-C does; the status is the one that a shell reports.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        source = model_folder(given.source, given.revision, given.subfolder)
        words = model_folder(given.tokenizer) if given.tokenizer else source
        convert(source, given.destination, given.to, words=words, shard_bytes=given.shard_mb << 20)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        sys.exit(128 + signal.SIGINT)
    sys.stdout.write(f"{given.source} in the layout of {given.to} is in {given.destination}\n")


if __name__ == "__main__":
    main()
