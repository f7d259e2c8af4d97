"""A damaged or foreign checkpoint is refused with one text that says what is wrong, before the weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stage.policy.checkpoint import read_checkpoint, resolve_dtype
from stage.policy.janus import JanusPolicy
from tests.policy.conftest import load
from tests.policy.tiny_model import IMAGE_TOKENS, build_tiny_janus, tiny_tokenizer


@pytest.fixture
def folder(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "janus"))


@pytest.fixture
def weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model was built before the folder was checked")

    monkeypatch.setattr("transformers.JanusForConditionalGeneration.from_pretrained", fail)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.usefixtures("weights_are_not_read")
class TestBeforeTheWeights:
    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere does not exist. .*model\.path"):
            load(tmp_path / "nowhere")

    def test_a_repository_that_cannot_be_reached(self) -> None:
        with pytest.raises(FileNotFoundError, match="is no local folder, and could not be downloaded"):
            load("deepseek-community/Janus-Pro-1B")

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
    )
    def test_a_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"must contain .*{name}"):
            load(folder)

    def test_a_missing_image_processor(self, folder: Path) -> None:
        (folder / "processor_config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"must contain preprocessor_config\.json"):
            load(folder)

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
        index = {"weight_map": {name: f"model-0000{name}-of-00002.safetensors" for name in "12"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FileNotFoundError, match=r"must contain model-00001-of-00002\.safetensors"):
            load(folder)

    @pytest.mark.parametrize("kept", [0, 5, 1000, -1])
    def test_truncated_weights(self, folder: Path, kept: int) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"whole safetensors file; .*model.safetensors .* is damaged"):
            load(folder)

    def test_another_model(self, folder: Path) -> None:
        edit(folder / "config.json", model_type="llama")
        with pytest.raises(ValueError, match="'llama'"):
            load(folder)

    def test_a_config_that_is_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not"):
            load(folder)

    def test_a_tokenizer_without_image_tokens(self, folder: Path) -> None:
        tiny_tokenizer({"image_token": IMAGE_TOKENS["image_token"]}).save_pretrained(folder)
        with pytest.raises(ValueError, match="lacks boi_token, eoi_token"):
            load(folder)

    def test_image_tokens_outside_the_vocabulary(self, folder: Path) -> None:
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        assert IMAGE_TOKENS["boi_token"] in vocabulary
        text = (folder / "tokenizer.json").read_text().replace(IMAGE_TOKENS["boi_token"], "<other>")
        (folder / "tokenizer.json").write_text(text)
        edit(folder / "tokenizer_config.json", boi_token=None)
        with pytest.raises(ValueError, match="lacks boi_token"):
            load(folder)


def test_a_missing_tensor(folder: Path) -> None:
    """transformers would fill it at random with no more than a warning."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing, first .*layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_shards(random_checkpoint: Path, tmp_path: Path) -> None:
    policy = load(random_checkpoint)
    policy.model.save_pretrained(tmp_path, max_shard_size="1MB")
    policy.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(tmp_path / "whole" / name, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert load(tmp_path).state_dict().keys() == policy.state_dict().keys()


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no attention dropout; got 0\.1"):
        load(build_tiny_janus(tmp_path, attention_dropout=0.1))


def test_a_grid_that_does_not_fit(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config={**config["vision_config"], "num_image_tokens": 15})
    with pytest.raises(ValueError, match="square of the VQ grid; got 15 and 4 x 4"):
        load(folder)


def test_no_token_for_unconditional_rows(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    policy.model.generation_config.pad_token_id = None
    policy.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="unconditional rows need pad_token_id"):
        JanusPolicy(policy.model, policy.tokenizer, policy.template)


def test_a_tokenizer_that_appends_a_token(random_checkpoint: Path) -> None:
    policy = load(random_checkpoint)
    policy.tokenizer.boi_token = "circle<begin_of_image> red"
    with pytest.raises(ValueError, match="must end in the image start token"):
        policy.tokenize(["a red circle"])


@pytest.mark.parametrize("name", ["int8", "fp32", "Tensor", ""])
def test_a_type_that_is_none(name: str, random_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="floating-point type of torch"):
        resolve_dtype(name)


def test_weights_stay_on_disk_as_they_were(random_checkpoint: Path) -> None:
    found = read_checkpoint(random_checkpoint, resolve_dtype("float32"))
    stored = load_file(random_checkpoint / "model.safetensors")
    state = found.model.state_dict()
    assert all((state[name] == tensor).all() for name, tensor in stored.items())
