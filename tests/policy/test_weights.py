"""Files of weights: whole or not written, readable by others, and read without running what they name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from stage.policy import weights
from stage.policy.checkpoint import read_checkpoint
from stage.policy.convert import UNFINISHED, convert, new_folder
from stage.policy.forms import MULTI_MODALITY, TRANSFORMERS
from stage.policy.weights import save_tensors
from tests.policy.conftest import load
from tests.policy.tiny_model import build_tiny_janus, tiny_config


class Intruder:
    """An object whose reading makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def original(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "original"
    convert(random_checkpoint, folder, MULTI_MODALITY)
    return folder


@pytest.fixture(params=[TRANSFORMERS, MULTI_MODALITY])
def folder(request: pytest.FixtureRequest, random_checkpoint: Path, original: Path, tmp_path: Path) -> Path:
    source = random_checkpoint if request.param == TRANSFORMERS else original
    return Path(shutil.copytree(source, tmp_path / "janus"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


class TestCode:
    """Nothing that a checkpoint names is run."""

    @pytest.mark.parametrize("way", ["zip", "before zip", "bare pickle"])
    def test_a_pickle_that_calls_a_function(self, folder: Path, way: str, tmp_path: Path) -> None:
        content = {**load_file(folder / "model.safetensors"), "intruder": Intruder(tmp_path / "mark")}
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        if way == "bare pickle":
            file.write_bytes(pickle.dumps(content["intruder"], protocol=2))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=way == "zip")
        with pytest.raises(
            ValueError, match="tensors and nothing else, since reading other objects runs code"
        ):
            load(folder)
        assert not (tmp_path / "mark").exists()

    def test_a_module_beside_the_image_processor(
        self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """transformers would ask at the terminal whether it may run."""
        (folder / "theirs.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})\nclass P: pass\n")
        (folder / "processor_config.json").unlink()
        named = {"image_processor_type": "P", "auto_map": {"AutoImageProcessor": "theirs.P"}}
        (folder / "preprocessor_config.json").write_text(json.dumps(named))
        with pytest.raises(ValueError, match="code of a checkpoint is not run"):
            load(folder)
        assert not (tmp_path / "mark").exists() and "[y/N]" not in "".join(capfd.readouterr())

    @pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
    def test_a_kernel_of_a_hub(self, folder: Path, field: str) -> None:
        """transformers would fetch and run it, whatever the policy is told to use."""
        config = json.loads((folder / "config.json").read_text())
        inner = "text_config" if "text_config" in config else "language_config"
        change(
            folder / "config.json", **{field: "owner/kernel", inner: {**config[inner], field: "owner/kernel"}}
        )
        assert load(folder).language_model.config._attn_implementation == "sdpa"

    def test_quantised_weights(self, random_checkpoint: Path, tmp_path: Path) -> None:
        """Their way of loading is a package of its own."""
        folder = Path(shutil.copytree(random_checkpoint, tmp_path / "janus"))
        change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(ValueError, match="must not be quantised"):
            load(folder)


class TestContradictions:
    def test_fewer_layers_than_tensors(self, random_checkpoint: Path, tmp_path: Path) -> None:
        """A model of the first layers alone would draw, badly."""
        folder = Path(shutil.copytree(random_checkpoint, tmp_path / "janus"))
        text = json.loads((folder / "config.json").read_text())["text_config"]
        change(folder / "config.json", text_config={**text, "num_hidden_layers": 1})
        with pytest.raises(
            ValueError, match=r"9 tensors are unexpected, first model\.language_model\.layers\.1"
        ):
            load(folder)

    def test_parts_of_different_widths(self, tmp_path: Path) -> None:
        """Compiled code would read beyond the shorter of the two."""
        config = tiny_config(vq=dict(image_token_embed_dim=48))
        build_tiny_janus(tmp_path)
        JanusForConditionalGeneration(config).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"meet at the width .* 64; vq_config.image_token_embed_dim is 48"
        ):
            load(tmp_path)

    def test_tensors_of_nobody(self, folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        save_file(content | {"step": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
        with pytest.warns(UserWarning, match="not used: 1 tensors are unexpected, first step"):
            load(folder)

    def test_converted_tensors_under_an_original_configuration(
        self, random_checkpoint: Path, original: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(random_checkpoint, tmp_path / "janus"))
        shutil.copy(original / "config.json", folder)
        with pytest.raises(
            ValueError, match=r"multi_modality\" and the tensors have the names of transformers"
        ):
            load(folder)

    def test_one_file_counts_before_shards(self, folder: Path) -> None:
        """As it does for transformers: what is checked must be what is loaded."""
        content = load_file(folder / "model.safetensors")
        other = {name: torch.zeros_like(tensor) for name, tensor in content.items()}
        save_file(other, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
        places = dict.fromkeys(content, "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert load(folder).image_embeddings().count_nonzero() > 0

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[]"])
    def test_an_index_that_is_none(self, folder: Path, text: str) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "value"), [("hidden_act", "none"), ("num_attention_heads", 0), ("num_attention_heads", "4")]
    )
    def test_values_that_no_llama_has(self, folder: Path, name: str, value: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        inner = "text_config" if "text_config" in config else "language_config"
        change(folder / "config.json", **{inner: {**config[inner], name: value}})
        with pytest.raises(ValueError, match=r"config\.json must describe a Janus"):
            load(folder)

    def test_a_tokenizer_that_is_none(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE"}}')
        with pytest.raises(ValueError, match=r"tokenizer\.json must describe a tokenizer"):
            read_checkpoint(folder, torch.float32)


class TestWriting:
    def test_others_may_read_it(self, tmp_path: Path) -> None:
        """safetensors makes files for their owner alone."""
        (tmp_path / "plain").touch()
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
        modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        assert len(modes) == 1 and load_file(tmp_path / "a.safetensors")["a"].tolist() == [1.0, 1.0]

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(weights, "save_file", full)
        with pytest.raises(OSError, match=r"No space left.*a\.safetensors"):
            save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_is_too_small(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OSError, match="MB of weights must fit on the disk, which has 0 MB left"):
            convert(original, tmp_path / "out", TRANSFORMERS)
        assert not list(tmp_path.iterdir())

    def test_a_killed_process_is_in_nobodys_way(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        left = tmp_path / f".out.{os.getpid()}{UNFINISHED}"
        left.mkdir()
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").touch()
        assert (tmp_path / "out" / "file").exists() and left.exists()
        assert str(left) in capsys.readouterr().err
