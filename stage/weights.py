"""The weights of a scorer or detector: where they lie, what they are, and whether they fit their architecture."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage import paths
from stage.paths import sha256

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a folder in the layout of transformers is made of, without weights of other frameworks.
FOLDER = ("*.json", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True)
class Home:
    """Where weights are published: a repository of the Hugging Face hub and a file in it, "" for all files.

    What is not on the hub has the `command` that fetches the file into a folder DIRECTORY.
    """

    repository: str
    file: str = ""
    command: str = ""

    def download(self) -> str:
        """The command that fetches them."""
        return (
            self.command
            or f"hf download {' '.join(filter(None, (self.repository, self.file)))} --local-dir DIRECTORY"
        )


def locate(path: str, revision: str | None, home: Home) -> Path:
    """The file, or the folder where `home` names no file.

    `path` is a file, a folder that holds the file under its published name, a package path (see `stage.paths`)
    or a repository of the hub, of which `revision` (branch, tag or commit) is fetched.

    Raises:
        FileNotFoundError: there is nothing at `path`; says what to download and where to put it.
    """
    place = paths.resolve(path)
    if place.is_dir() and home.file:
        place = place / home.file
    if place.exists():
        return place
    reason: object = "there is no such file or folder"
    if paths.PACKAGE not in path and path.count("/") == 1 and path[0] not in "./~":
        try:
            return _download(path, revision, home.file)
        except FileNotFoundError as error:
            reason = f"it is not here, and the hub did not give it ({error})"
    raise FileNotFoundError(
        f"weights must be there before the first rollout, looked for {str(path)!r}"
        f"{f' at revision {revision!r}' if revision else ''}: {reason}. Run `{home.download()}` where there is a "
        f"network, and give {'the file' if home.file else 'that directory'} in place of {str(path)!r}"
    )


def _download(repository: str, revision: str | None, file: str) -> Path:
    """The file, or the folder, from the hub, or from its cache where the hub does not answer.

    Raises:
        FileNotFoundError: neither has it; says why the hub has not.
    """
    import huggingface_hub

    silent = paths.why_the_hub_is_silent(repository, revision)

    def fetch(*wanted: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(wanted),
                local_files_only=silent is not None,
            )
        )

    try:
        if not file:
            folder = fetch(*FOLDER)
            return folder if any(folder.glob("*.safetensors")) else fetch(*FOLDER, "*.bin")
        place = fetch(file) / file
    except (OSError, ValueError) as error:
        reason = silent or error
        first, _, _ = str(reason).partition("\n")
        raise FileNotFoundError(f"{type(reason).__name__}: {first}") from reason
    if not place.is_file():
        raise FileNotFoundError(f"{repository} has no {file}")
    return place


def provenance(place: Path, path: str, revision: str | None) -> dict[str, Any]:
    """What results record of weights: path as configured, revision, and the sha256 of each file.

    The revision is the commit that the hub gave where the weights came from there.
    """
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    parts = place.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else revision
    return {"path": str(path), "revision": commit, "sha256": {file.name: sha256(file) for file in files}}


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch file, from under `state_dict` or `model` if there.

    Raises:
        ValueError: the file cannot be read without running code of it, or holds no tensors.
    """
    import safetensors
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"weights are a .safetensors file or a PyTorch file of plain tensors, {file} is not: {error!r}; "
            f"download it again and compare its sha256 with the published one"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"a weight file maps names to tensors, {file} holds {type(state).__name__}; give the weights "
            f"themselves, not a training checkpoint or a traced model"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def fill(module: torch.nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Loads `state` into `module`, tensor for tensor.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    own = module.state_dict()
    require_fit(
        file,
        type(module).__name__,
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        mismatched=[
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    )
    module.load_state_dict(state)


def require_fit(
    file: Path, model: str, missing: list[str], unexpected: list[str], mismatched: list[str]
) -> None:
    """Raises ValueError unless all three lists of tensors are empty."""
    faults = (("lacks", missing), ("has besides", unexpected), ("has in another shape", mismatched))
    if any(names for _, names in faults):
        found = "; ".join(
            f"it {word} {len(names)} tensors ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for word, names in faults
            if names
        )
        raise ValueError(
            f"a weight file fits its architecture tensor for tensor, {file} does not fit {model}: {found}; "
            f"give the weights of this architecture"
        )


def pretrained(load: Callable[..., Any], folder: Path, model_type: str, dtype: torch.dtype) -> Any:
    """A transformers model from a folder in the layout of transformers, every tensor accounted for.

    Args:
        load: `from_pretrained` of its class.
        model_type: what `config.json` must call the architecture.

    Raises:
        ValueError: the folder holds another architecture, or its tensors do not fit.
    """
    found = read_json(folder, "config.json").get("model_type")
    if found != model_type:
        raise ValueError(
            f"the config.json of {folder} must describe a model of type {model_type!r}, it says {found!r}; give "
            f"the folder of that model"
        )
    return loaded(lambda: load(folder, dtype=dtype, output_loading_info=True, local_files_only=True), folder)


def loaded(load: Callable[[], Any], folder: Path) -> Any:
    """The model that `from_pretrained(..., output_loading_info=True)` gives, frozen, every tensor accounted for.

    Raises:
        ValueError: the tensors of `folder` do not fit.
    """
    try:
        model, info = load()
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"a weight file fits its architecture tensor for tensor, what is in {folder} could not be loaded: "
            f"{error}; download it again"
        ) from error
    require_fit(
        folder,
        type(model).__name__,
        missing=list(info["missing_keys"]),
        unexpected=[name for name in info["unexpected_keys"] if not name.endswith("position_ids")],
        mismatched=[str(name) for name in info["mismatched_keys"]],
    )
    return model.eval().requires_grad_(False)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder. Raises FileNotFoundError or ValueError naming the folder."""
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(
            f"a model's folder holds {name}, {folder} does not; download all files of the repository into it"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} must be JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, it is a {type(content).__name__}; download it again")
    return content


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by their names in a configuration. Raises ValueError for one that is not to be had."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}; choose one")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the device of a scorer or detector must be there, got {device!r} without CUDA; set its `device` to cpu: "
            "benchmark.scorer.device=cpu or reward.device=cpu, reward.scorers.NAME.device=cpu in a combination, "
            "benchmark.scorer.detector.device=cpu for GenEval"
        )
    return place, DTYPES[dtype]
