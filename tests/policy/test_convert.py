"""There and back between the layouts is bit for bit, for other depths, widths and grids; nothing is lost silently."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, JanusForConditionalGeneration

from stage.policy import convert as conversion
from stage.policy.checkpoint import load_model, main, read_checkpoint
from stage.policy.convert import convert
from stage.policy.forms import MULTI_MODALITY, TRANSFORMERS
from stage.policy.layout import open_folder
from stage.policy.weights import Weights, plan_shards
from tests.policy.conftest import load
from tests.policy.tiny_model import build_tiny_janus, tiny_config

# Depths, widths, grids, heads, ties: no two alike.
SIZES: dict[str, dict[str, Any]] = {
    "own head": dict(tied=False),
    "tied, three layers": dict(tied=True, layers=3, grid=6),
    "grouped heads": dict(tied=False, grid=3, hidden=48, num_key_value_heads=2, vocabulary=40),
    "wide heads": dict(tied=False, layers=1, hidden=96, head_dim=32),
    "other eyes and codes": dict(
        **dict(tied=False, grid=5, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
        vision=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, patch_size=2, image_size=10)
        | dict(mlp_ratio=3.7, depth=3),
        vq=dict(
            embed_dim=4, num_embeddings=33, channel_multiplier=[2, 4], num_res_blocks=2, latent_channels=48
        )
        | dict(num_hidden_layers=3),
    ),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under the names they are stored with."""
    weights = Weights(folder)
    return {name: weights.read(name).clone() for name in weights.stored}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Names, types and every bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module", params=SIZES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model in the layout of transformers and, converted, in the original one."""
    folder = tmp_path_factory.mktemp("models")
    return both(folder, SIZES[request.param])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same of one size."""
    return both(tmp_path_factory.mktemp("pair"), SIZES["own head"])


def both(folder: Path, size: dict[str, Any]) -> tuple[Path, Path]:
    source = build_tiny_janus(folder / "janus", **size)
    convert(source, folder / "original", MULTI_MODALITY)
    return source, folder / "original"


def test_both_layouts_give_the_same_model(models: tuple[Path, Path]) -> None:
    first, second = (load(folder) for folder in models)
    assert open_folder(models[1]).layout == MULTI_MODALITY
    state = second.state_dict()
    assert same(dict(first.state_dict()), dict(state))
    # Parts of one storage would be saved three times by torch, and refused by safetensors.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    prompt = first.tokenize(["a red circle"])
    assert torch.equal(prompt.ids, second.tokenize(["a red circle"]).ids)
    tokens = torch.randint(first.codebook_size, (1, 2, first.num_image_tokens))
    left, right = (
        item.score(prompt, tokens, guidance_scale=2.0, temperature=1.0) for item in (first, second)
    )
    torch.testing.assert_close(left.logps, right.logps, rtol=0, atol=0)
    assert torch.equal(first.decode(tokens), second.decode(tokens))
    pixels = torch.randn(1, 3, first.image_size, first.image_size)
    features = [item.model.model.vision_model(pixels).last_hidden_state for item in (first, second)]
    torch.testing.assert_close(*features, rtol=0, atol=0)


def test_there_and_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    source, original = models
    convert(original, tmp_path / "back", TRANSFORMERS)
    assert same(tensors(tmp_path / "back"), tensors(source))
    convert(tmp_path / "back", tmp_path / "again", MULTI_MODALITY, shard_bytes=1 << 19)
    assert same(tensors(tmp_path / "again"), tensors(original))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes(), name


def test_transformers_loads_what_was_converted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[1], tmp_path / "back", TRANSFORMERS, shard_bytes=1 << 19)
    loaded: Any = JanusForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same(dict(model.state_dict()), dict(load(pair[0]).model.state_dict()))
    assert model.generation_config.pad_token_id == 0 and model.config.image_token_id == 6
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    assert processor.tokenizer.boi_token == "<begin_of_image>"


def test_tensors_that_nothing_reads_come_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Those that the layout of transformers has no place for: random numbers and a type of their own survive."""
    original = Path(shutil.copytree(pair[1], tmp_path / "original"))
    content = tensors(original)
    name = "vision_model.vision_tower.attn_pool.kv.weight"
    content[name] = torch.randn_like(content[name]).to(torch.bfloat16)
    content["gen_vision_model.quantize.codebook_used"] += torch.arange(65536)
    content["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    save_file(content, original / "model.safetensors")
    convert(original, tmp_path / "there", TRANSFORMERS)
    convert(tmp_path / "there", tmp_path / "back", MULTI_MODALITY)
    assert same(tensors(tmp_path / "back"), content)


def test_half_precision_keeps_its_type(random_checkpoint: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(random_checkpoint, tmp_path / "half"))
    content = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(half).items()}
    save_file(content, half / "model.safetensors", {"format": "pt"})
    convert(half, tmp_path / "original", MULTI_MODALITY)
    assert {item.dtype for item in tensors(tmp_path / "original").values()} == {torch.bfloat16}
    convert(tmp_path / "original", tmp_path / "back", TRANSFORMERS)
    assert same(tensors(tmp_path / "back"), content)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_files(pair: tuple[Path, Path], tmp_path: Path, shards: int) -> None:
    """`pytorch_model.bin`, as Janus-Pro is published, whole and in shards."""
    folder = Path(shutil.copytree(pair[1], tmp_path / "bin"))
    content = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = list(content)
    parts = {f"pytorch_model-{n + 1}.bin": names[n::shards] for n in range(shards)} if shards > 1 else {}
    for file, mine in (parts or {"pytorch_model.bin": names}).items():
        torch.save({name: content[name] for name in mine}, folder / file)
    if parts:
        places = {name: file for file, mine in parts.items() for name in mine}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(dict(load(folder).state_dict()), dict(load(pair[0]).state_dict()))
    convert(folder, tmp_path / "back", TRANSFORMERS)
    assert same(tensors(tmp_path / "back"), tensors(pair[0]))


def test_transformers_reads_a_pytorch_file_too(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "bin"))
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(dict(load(folder).state_dict()), dict(load(random_checkpoint).state_dict()))


def test_a_head_of_its_own_is_not_tied_by_default(models: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers' default, tied, would overwrite one of head and embedding without a word."""
    folder = Path(shutil.copytree(models[0], tmp_path / "janus"))
    stored = tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = load(folder).model
    embedding = model.model.language_model.embed_tokens.weight
    assert torch.equal(embedding, stored["model.language_model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, stored.get("lm_head.weight", embedding))


def test_a_head_that_differs_is_kept_whatever_the_configuration_says(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    """Both are in the file: to write the embedding alone would lose the head."""
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "janus"))
    stored = tensors(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    stored["lm_head.weight"] = stored["model.language_model.embed_tokens.weight"] + 1
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "out", TRANSFORMERS)
    assert same(tensors(tmp_path / "out"), stored)
    assert not load(tmp_path / "out").model.config.tie_word_embeddings


class TestFaults:
    """Every tensor has its place, or all of their names are listed and nothing is written."""

    @pytest.fixture
    def original(self, pair: tuple[Path, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(pair[1], tmp_path / "original"))

    def change(self, folder: Path, **new: Tensor | None) -> None:
        content: dict[str, Any] = load_file(folder / "model.safetensors") | new
        save_file(
            {name: item for name, item in content.items() if item is not None}, folder / "model.safetensors"
        )

    def test_all_three_kinds_are_listed(self, original: Path, tmp_path: Path) -> None:
        self.change(
            original,
            **{
                "gen_vision_model.decoder.conv_out.bias": None,
                "gen_vision_model.decoder.mid.0.norm1.bias": None,
                "gen_embed.weight": torch.zeros(7, 8),
                "optimizer.step": torch.zeros(1),
            },
        )
        with pytest.raises(ValueError) as caught:
            convert(original, tmp_path / "out", TRANSFORMERS)
        text = str(caught.value)
        assert "2 tensors are missing" in text and "1 tensors are unexpected, first optimizer.step" in text
        for name in ("model.vqmodel.decoder.conv_out.bias", "model.vqmodel.decoder.mid.block_1.norm1.bias"):
            assert name in text
        assert "model.generation_embeddings.weight: [7, 8] for" in text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]
        with pytest.raises(ValueError, match="2 tensors are missing"):
            load(original)

    def test_fused_rows_that_cannot_be_cut(self, original: Path, tmp_path: Path) -> None:
        self.change(original, **{"vision_model.vision_tower.blocks.0.attn.qkv.bias": torch.zeros(95)})
        with pytest.raises(ValueError, match=r"3 tensors are of another shape.*\[95\] for \[32\]"):
            convert(original, tmp_path / "out", TRANSFORMERS)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            # the axis of one cut off, and a second axis that a square grid could have: 36 = 6 x 6
            ("vision_model.vision_tower.pos_embed", torch.zeros(16, 36), r"must have 3 axes; .*\[16, 36\]"),
            ("language_model.model.embed_tokens.weight", torch.zeros(5), r"must have 2 axes; .*\[5\]"),
            ("aligner.layers.0.weight", torch.tensor(1.0), r"must have 2 axes; .*\[\]"),
            ("gen_embed.weight", torch.zeros(7, 8, dtype=torch.uint16), "gen_embed.weight in .* is U16"),
        ],
    )
    def test_tensors_that_sizes_cannot_be_read_from(
        self, original: Path, tmp_path: Path, name: str, tensor: Tensor, message: str
    ) -> None:
        self.change(original, **{name: tensor})
        with pytest.raises(ValueError, match=message):
            convert(original, tmp_path / "out", TRANSFORMERS)

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_nothing_behind(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        # A shell that starts the tests in the background has SIGINT ignored.
        interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(conversion, "write_shard", lambda *_: signal.raise_signal(number))
        try:
            with pytest.raises(SystemExit) as caught:
                main(["convert", str(original), str(tmp_path / "out"), "--to", "transformers"])
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, interrupt)
        assert caught.value.code == status
        assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]

    def test_a_shard_has_a_size(self, original: Path, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(original), str(tmp_path / "out"), "--to", "transformers", "--shard-mb", "0"])
        assert caught.value.code == 2 and not (tmp_path / "out").exists()

    def test_a_link_that_leads_nowhere_is_not_overwritten(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match="out exists"):
            convert(original, tmp_path / "out", TRANSFORMERS)

    def test_the_command_ends_with_status_1(
        self, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.change(original, **{"gen_embed.weight": None})
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(original), str(tmp_path / "out"), "--to", "transformers"])
        assert "1 tensors are missing" in str(caught.value.code)
        assert not (tmp_path / "out").exists()

    def test_nothing_is_half_written(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(conversion, "write_shard", fail)
        with pytest.raises(OSError, match="No space"):
            convert(original, tmp_path / "out", TRANSFORMERS)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]

    def test_nothing_is_overwritten(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError, match="out exists"):
            convert(original, tmp_path / "out", TRANSFORMERS)

    def test_a_configuration_of_the_other_layout(self, pair: tuple[Path, Path], original: Path) -> None:
        shutil.copy(pair[0] / "config.json", original)
        with pytest.raises(ValueError, match="tensors have the names of the original layout"):
            load(original)

    def test_a_truncated_pytorch_file(self, original: Path) -> None:
        content = load_file(original / "model.safetensors")
        (original / "model.safetensors").unlink()
        torch.save(content, original / "pytorch_model.bin")
        whole = (original / "pytorch_model.bin").read_bytes()
        (original / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"whole PyTorch file; .*pytorch_model.bin .* is damaged"):
            load(original)

    def test_a_tokenizer_without_the_image_tokens(self, original: Path) -> None:
        text = (original / "tokenizer.json").read_text().replace("<begin_of_image>", "<other>")
        (original / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="lacks image_token, boi_token, eoi_token"):
            load(original)


def test_without_a_tokenizer(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are converted, and that there is no tokenizer is said; a policy takes it from elsewhere."""
    bare = Path(shutil.copytree(pair[1], tmp_path / "bare"))
    for file in bare.iterdir():
        if "token" in file.name or "processor" in file.name:
            file.unlink()
    convert(bare, tmp_path / "out", TRANSFORMERS)
    assert "has no tokenizer" in capsys.readouterr().err
    assert same(tensors(tmp_path / "out"), tensors(pair[0]))
    model: Any = load_model(open_folder(bare), torch.float32)
    assert model.config.vq_config.embed_dim == 8
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        read_checkpoint(bare, torch.float32)
    found = read_checkpoint(bare, torch.float32, tokenizer=str(pair[0]))
    assert found.tokenizer.boi_token == "<begin_of_image>"
    convert(bare, tmp_path / "with", TRANSFORMERS, words=pair[0])
    assert (tmp_path / "with" / "tokenizer.json").is_file()


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(pair[1]), str(tmp_path / "out"), "--to", "transformers", "--shard-mb", "1"])
    assert "is in" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert same(tensors(tmp_path / "out"), tensors(pair[0]))


def test_shards_are_filled_in_order() -> None:
    # 3 + 4 fit into 7, then 5 does not; 9 is larger than a shard and stands alone.
    plan = plan_shards({"a": 3, "b": 4, "c": 5, "d": 9, "e": 1}, 7)
    assert list(plan.values()) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert next(iter(plan)) == "model-00001-of-00004.safetensors"
    assert plan_shards({"a": 1, "b": 2}, 3) == {"model.safetensors": ["a", "b"]}


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="the peak of a process is read as Linux tells it"
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_stays_near_one_shard(tmp_path: Path, suffix: str) -> None:
    """Some 300 MB in shards of 32 MB: the peak grows by less than half of the model."""
    config = tiny_config(tied=False, hidden=1024, layers=12, intermediate_size=4096)
    build_tiny_janus(tmp_path / "words")
    with torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    folder = tmp_path / "large"
    shutil.copytree(tmp_path / "words", folder)
    config.save_pretrained(folder)
    content = {name: torch.ones(tensor.shape, dtype=torch.float16) for name, tensor in state.items()}
    total = sum(tensor.nbytes for tensor in content.values())
    (folder / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    del content
    program = (
        "import sys; from pathlib import Path; from stage.policy.convert import convert;"
        "from stage.policy.layout import open_folder;"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024;"
        "source = Path(sys.argv[1]); open_folder(source.parent / 'words').faults(); before = peak();"
        "convert(source, Path(sys.argv[2]), 'multi_modality', shard_bytes=32 << 20);"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert total > 250e6
    assert grown < total / 2, f"{grown / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB"
