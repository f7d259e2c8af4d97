"""A checkpoint folder in either layout, seen under transformers' names, with every tensor accounted for.

The layout is recognised from config.json, or from tensor names where config.json does not say what it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

from stage.policy.architecture import transformers_config
from stage.policy.forms import MULTI_MODALITY, TRANSFORMERS
from stage.policy.names import (
    Shape,
    Shapes,
    is_unread,
    looks_converted,
    looks_original,
    split,
    split_shape,
    to_original,
    to_transformers,
)
from stage.policy.weights import Stored, Weights, read_json, require

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
LISTED = 20  # names of a kind that a message prints
# Fields of config.json that have transformers fetch and run code of a hub, wherever they stand.
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels")


@dataclass(frozen=True)
class Faults:
    """Tensors that are not as the configuration says, by name; of a wrong shape, what came and what was wanted."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line a kind with its count, and one a tensor."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshaped}
        found = []
        for kind, names in kinds.items():
            if names:
                more = [f"  and {len(names) - LISTED} more"] if len(names) > LISTED else []
                found += [f"{len(names)} tensors are {kind}, first {names[0]}"]
                found += [f"  {name}" for name in names[1:LISTED]] + more
        return found


class ModelFolder:
    """A Janus on disk in the layout of transformers.

    Attributes:
        layout: its name; weights: the files; config: of transformers; tensors: by transformers' name; unread: tensors
        that only the original layout has; strange: names that belong to neither.
    """

    layout = TRANSFORMERS

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, Weights(folder)
        self.tensors: dict[str, Stored] = {}
        self.unread: dict[str, Stored] = {}
        self.strange: list[str] = []
        self._sort()
        self.config = self._config()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by transformers' name."""
        return {name: item.shape for name, item in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor by transformers' name."""
        return self.weights.read(name)

    def faults(self) -> Faults:
        """What is missing, too much, or of another shape than the configuration says."""
        with described_by(self.folder / "config.json"):
            wanted = expected_shapes(self.config)
        return compare(self.shapes, wanted, self.strange, tied=bool(self.config.tie_word_embeddings))

    def check(self) -> None:
        """Raise ValueError, before any number is read, unless the tensors fill the model and it takes all of them.

        Tensors that no Janus has are left alone, with a warning.
        """
        _check_widths(self.config)
        faults = self.faults()
        ours = tuple(name for name in faults.unexpected if _is_of_janus(name))
        told = Faults(faults.missing, ours, faults.misshaped)
        if told != Faults():
            raise ValueError(
                f"the weights in {self.folder} must fill the model of its config.json; "
                + "; ".join(told.lines())
                + ". Copy or convert the checkpoint again."
            )
        strange = Faults(unexpected=tuple(name for name in faults.unexpected if name not in ours))
        if strange != Faults():
            warnings.warn(
                f"no Janus has these tensors of {self.folder}, which are not used: {'; '.join(strange.lines())}",
                stacklevel=2,
            )

    def load(self, dtype: torch.dtype) -> JanusForConditionalGeneration:
        """The model with these weights, on the CPU. Call `check` before."""
        return JanusForConditionalGeneration.from_pretrained(
            self.folder, config=self.config, dtype=dtype, local_files_only=True
        )

    def _sort(self) -> None:
        if looks_original(self.weights.stored):
            raise ValueError(
                f'config.json says "model_type": "janus" and the tensors have the names of the original layout in '
                f"{self.folder}. Take config.json and weights from one checkpoint."
            )
        self.tensors = dict(self.weights.stored)

    def _config(self) -> JanusConfig:
        stated = read_json(self.folder / "config.json")
        if "quantization_config" in stated:
            raise ValueError(
                f"a checkpoint must not be quantised; config.json in {self.folder} has a quantization_config. Take "
                "the weights that it was made of."
            )
        config = JanusConfig.from_dict(without_code(stated))
        if not self._tied(bool(stated.get("tie_word_embeddings", False))):
            config.tie_word_embeddings = False  # as tied, one of the two would be lost
        return config

    def _tied(self, stated: bool) -> bool:
        """Whether the text head is the embedding: it has no tensor, or it is `stated` to be and the numbers agree."""
        if HEAD not in self.tensors:
            return True
        if not stated or self.shapes[HEAD] != self.shapes.get(EMBEDDING):
            return False
        return torch.equal(self.read(HEAD), self.read(EMBEDDING))


class OriginalFolder(ModelFolder):
    """A Janus on disk in the original layout; `read` gives its tensors as transformers has them."""

    layout = MULTI_MODALITY

    def read(self, name: str) -> Tensor:
        """One tensor by transformers' name, which shares no memory with the others that it is fused with."""
        original, _, parts = to_original(name)
        tensor = split(original, self.weights.read(original))[name]
        return tensor.clone() if parts > 1 else tensor

    def load(self, dtype: torch.dtype) -> JanusForConditionalGeneration:
        """The model with these weights, on the CPU. Call `check` before."""
        state = {name: self.read(name) for name in self._read_names()}
        loaded: Any = JanusForConditionalGeneration.from_pretrained
        model = loaded(None, config=self.config, state_dict=state, dtype=dtype)
        model.generation_config = GenerationConfig.from_model_config(self.config)
        return model

    def _read_names(self) -> list[str]:
        tied = bool(self.config.tie_word_embeddings)
        return [name for name in self.tensors if not (tied and name == HEAD)]

    def _sort(self) -> None:
        if looks_converted(self.weights.stored):
            raise ValueError(
                f'config.json says "model_type": "multi_modality" and the tensors have the names of transformers in '
                f"{self.folder}. Take config.json and weights from one checkpoint."
            )
        for original, item in self.weights.stored.items():
            if is_unread(original):
                self.unread[original] = item
                continue
            try:
                names = to_transformers(original)
            except KeyError:
                self.strange.append(original)
                continue
            shapes = split_shape(original, item.shape)
            self.tensors |= {name: Stored(shapes[name], item.dtype, item.file) for name in names}

    def _config(self) -> JanusConfig:
        stated, shapes = read_json(self.folder / "config.json"), self.weights.stored
        meta = self.folder / "meta.json"
        config = transformers_config(
            stated,
            {name: item.shape for name, item in shapes.items()},
            read_json(meta) if meta.is_file() else {},
            tied=self._tied(bool(stated.get("language_config", {}).get("tie_word_embeddings", False))),
        )
        config.dtype = self.tensors[EMBEDDING].dtype
        return config


def open_folder(folder: Path) -> ModelFolder:
    """A checkpoint folder in the layout that its files show; headers are read, numbers are not.

    Raises FileNotFoundError for missing files, ValueError for a damaged file, another model, or a configuration that
    contradicts the tensors.
    """
    config = require(folder, "config.json")
    stated = read_json(config)
    kind = stated.get("model_type")
    with described_by(config):
        if kind == "janus":
            return ModelFolder(folder)
        if kind == "multi_modality" or "MultiModalityCausalLM" in (stated.get("architectures") or ()):
            return OriginalFolder(folder)
        if kind is None and looks_original(Weights(folder).stored):
            return OriginalFolder(folder)
    raise ValueError(
        'config.json must be that of a Janus, "model_type": "janus" in the layout of transformers or "multi_modality" '
        f"in the original one; {config} has {kind!r}. Set model.path to a Janus checkpoint."
    )


@contextmanager
def described_by(config: Path) -> Iterator[None]:
    """A block that builds what config.json describes: whatever transformers says of bad values is a ValueError."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # as many kinds as there are fields with a wrong value
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"config.json must describe a Janus; {config} does not: {type(error).__name__}, {reason}. Take it from "
            "where the checkpoint came from."
        ) from error


def without_code(stated: Any) -> Any:
    """A configuration without the fields that name code, at any depth."""
    if isinstance(stated, dict):
        return {name: without_code(value) for name, value in stated.items() if name not in CODE}
    return stated


def expected_shapes(config: JanusConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of transformers' Janus, built without memory; a tied head is left out."""
    with torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def compare(found: Shapes, wanted: Shapes, strange: list[str], *, tied: bool) -> Faults:
    """The faults of `found` against `wanted`; a tied head may be stored beside its embedding."""
    extra = [name for name in found if name not in wanted and not (tied and name == HEAD)]
    return Faults(
        missing=tuple(name for name in wanted if name not in found),
        unexpected=(*strange, *extra),
        misshaped=tuple(
            f"{name}: {list(found[name])} for {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ),
    )


def _is_of_janus(name: str) -> bool:
    """Whether a Janus of some size has a tensor of this name."""
    try:
        to_original(name)
    except KeyError:
        return False
    return True


def _check_widths(config: Any) -> None:
    """Raise ValueError unless what the parts hand to each other has one width, that of the language model."""
    hidden, vq = config.text_config.hidden_size, config.vq_config
    widths = {
        "vision_config.projection_dim": config.vision_config.projection_dim,
        "vq_config.projection_dim": vq.projection_dim,
        "vq_config.image_token_embed_dim": vq.image_token_embed_dim,
    }
    wrong = [f"{name} is {width}" for name, width in widths.items() if width != hidden]
    if wrong:
        raise ValueError(
            f"the parts of a Janus must meet at the width of its language model, {hidden}; {', '.join(wrong)}. "
            "Take config.json and weights from one checkpoint."
        )
