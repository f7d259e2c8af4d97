"""What training made, as a model that others load: merged or as an adapter, in either layout, with its card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stage import export
from stage.model_card import model_card
from stage.policy.forms import MULTI_MODALITY
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.layout import open_folder
from stage.policy.lora import Lora
from stage.policy.sampler import Sampler
from stage.policy.weights import Weights
from stage.sharded_checkpoint import WEIGHTS, Parts
from stage.subject import find_subjects
from stage.training_checkpoint import read_training_checkpoint, weights_sha256
from tests.evaluation_world import SAMPLER, World, make_world, model, run_command
from tests.policy.conftest import PLAIN
from tests.sliced import slice_up
from tests.tiny_training import FROZEN, Redness, tiny_module, tiny_trainer

ADAPTER = {
    "_target_": "stage.policy.lora.Lora",
    "rank": 2,
    "alpha": 4.0,
    "dropout": 0,
    "targets": ["q_proj", "up_proj"],
    "path": None,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def lora(world: World) -> Path:
    """A training checkpoint of an update with LoRA, by the update loop and Lightning themselves."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    run = world.root / "lora"
    settings: dict[str, Any] = {key: value for key, value in ADAPTER.items() if key != "_target_"}
    policy = load_policy(str(world.base), PLAIN, "float32", FROZEN, False, Lora(**settings))
    config = {
        "seed": 3,
        "algorithm": {"beta": 0.1},
        "model": {**model(world), "adapter": ADAPTER},
        "sampler": SAMPLER,
    }
    base = {"path": str(world.base), "sha256": weights_sha256(world.base)}
    scorer: Any = Redness()
    scorer.provenance = {"path": "hps", "revision": "v1", "sha256": {"hps.pt": "abc"}}
    module = tiny_module(world.base, policy=policy, base=base, config=config, updates=1, scorer=scorer)
    trainer = tiny_trainer(run)
    trainer.fit(module)
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    return run / "checkpoints" / "last.ckpt"


def subject(world: World, checkpoint: Path) -> Any:
    node = OmegaConf.create({"checkpoint": str(checkpoint), "model": model(world), "sampler": SAMPLER})
    return find_subjects(node, []).tuned


def scores(policy: JanusPolicy) -> Tensor:
    tokens = torch.arange(16).view(1, 1, 16) % policy.codebook_size
    with torch.no_grad():
        return policy(policy.tokenize(["a red circle"]), tokens, guidance_scale=2.0, temperature=1.0).logps


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    return run_command(export.main, list(arguments), monkeypatch)


def test_a_checkpoint_of_lora_is_small_and_comes_back(world: World, lora: Path) -> None:
    saved = read_training_checkpoint(lora)["state_dict"]
    assert saved and all("lora_A" in name or "lora_B" in name for name in saved)
    # Two layers; q_proj 64 -> 64 and up_proj 64 -> 128, each with rank 2.
    assert sum(tensor.numel() for tensor in saved.values()) == 2 * 2 * (64 + 64 + 64 + 128)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    found = subject(world, lora)
    policy = found.load(CPU)
    state = policy.state_dict()
    assert all(torch.equal(state[name.removeprefix("policy.")], tensor) for name, tensor in saved.items())
    sampled = Sampler(1.0, 1.0)(
        policy, policy.tokenize(["a red circle"]), torch.rand(1, 1, 16, dtype=torch.float64)
    )
    assert sampled.tokens.shape == (1, 1, 16)


@pytest.mark.parametrize("layout", export.LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_exported_model_is_the_trained_policy(
    world: World, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, kind: str
) -> None:
    checkpoint = lora if kind == "lora" else world.checkpoint
    output = tmp_path / "exported"
    arguments = [f"checkpoint={checkpoint}", f"output={output}", f"layout={layout}"]
    assert run(monkeypatch, *arguments) is None
    trained = subject(world, checkpoint).load(CPU)
    again = load_policy(str(output), PLAIN, "float32", (), False)
    torch.testing.assert_close(scores(again), scores(trained), rtol=0, atol=1e-5)
    base = load_policy(str(world.base), PLAIN, "float32", (), False)
    assert (scores(again) - scores(base)).abs().max() > 1e-5
    if layout == MULTI_MODALITY:
        assert open_folder(output).layout == MULTI_MODALITY
        assert "gen_vision_model.quantize.codebook_used" in Weights(output).stored
    else:
        loaded: Any = JanusForConditionalGeneration.from_pretrained(output, output_loading_info=True)
        assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    # A second time would overwrite it.
    assert "exists" in str(run(monkeypatch, *arguments))


def test_the_program_of_the_card_draws_an_image(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "exported"
    assert run(monkeypatch, f"checkpoint={world.checkpoint}", f"output={output}") is None
    program = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "guidance_scale=2.0, temperature=1.0" in program
    command = [sys.executable, "-c", program.replace("FOLDER", str(output))]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with Image.open(tmp_path / "image.png") as image:
        assert image.mode == "RGB" and image.width == image.height


def test_the_program_of_the_card_draws_as_training_did() -> None:
    """transformers' generate doubles its rows for guidance, and fails at a scale of exactly 1."""
    assert export.drawing({"sampler": {"guidance_scale": 5.0, "temperature": 0.7}}) == {
        "source": "as training drew", "guidance": 5.0, "temperature": 0.7,
    }  # fmt: skip
    alone = export.drawing({"sampler": {"guidance_scale": 1.0, "temperature": 1.0}})
    assert 1 < alone["guidance"] < 1.001 and "without guidance" in alone["source"]
    assert export.drawing(None)["guidance"] == 5.0
    assert export.drawing({"sampler": {"_target_": "one.of.your.own"}})["guidance"] == 5.0


def test_the_adapter_alone(world: World, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    output = tmp_path / "adapter"
    assert run(monkeypatch, f"checkpoint={lora}", f"output={output}", "form=adapter") is None
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = scores(subject(world, lora).load(CPU))
    found = subject(world, output)  # an adapter's folder is a subject on top of the base
    assert found.sha256 == weights_sha256(output)
    torch.testing.assert_close(scores(found.load(CPU)), expected, rtol=0, atol=0)
    base = load_policy(str(world.base), PLAIN, "float32", (), False)
    theirs: Any = peft.PeftModel.from_pretrained(base.model, str(output))
    small = [
        "--config-dir",
        str(world.groups),
        "model=small",
    ]  # an adapter does not bring the model it stands on
    merged = JanusPolicy(theirs.merge_and_unload(), base.tokenizer, PLAIN)
    torch.testing.assert_close(scores(merged), expected, rtol=0, atol=1e-5)
    assert run(monkeypatch, *small, f"checkpoint={output}", f"output={tmp_path / 'merged'}") is None
    again = load_policy(str(tmp_path / "merged"), PLAIN, "float32", (), False)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", export.FORMS)
def test_a_checkpoint_in_parts_gives_the_same_weights_without_its_optimizer(
    world: World, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    parts = slice_up(lora, tmp_path / "last.ckpt", tmp_path / "results")
    whole, read = Parts.whole, []

    def watched(self: Parts, name: str) -> Tensor:
        read.append(self.folder.name)
        return whole(self, name)

    monkeypatch.setattr(Parts, "whole", watched)
    for name, checkpoint in (("one", lora), ("two", parts)):
        output = tmp_path / name
        assert run(monkeypatch, f"checkpoint={checkpoint}", f"output={output}", f"form={form}") is None
    assert read and set(read) == {WEIGHTS}
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert files
    for file in files:
        one, two = load_file(file), load_file(tmp_path / "two" / file.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_types_of_the_base_unless_asked(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, asked, dtype in (("same", "null", torch.float32), ("half", "bfloat16", torch.bfloat16)):
        output = tmp_path / name
        assert (
            run(monkeypatch, f"checkpoint={world.checkpoint}", f"output={output}", f"dtype={asked}") is None
        )
        assert {item.dtype for item in Weights(output).stored.values()} == {dtype}
        assert json.loads((output / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_card(world: World, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    results = {
        "models": {"tuned": {"sha256": subject(world, lora).sha256}},
        "benchmark": {"name": "shapes", "headline": "strict"},
        "scores": {
            "heldout": {"strict": {"overall": {"base": interval, "tuned": {**interval, "low": None}}}}
        },
    }
    for name, content in (("mine", results), ("other", {**results, "models": {"tuned": {"sha256": "0"}}})):
        folder = lora.parent.parent / "evaluation" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(content))
    output = tmp_path / "mine"
    assert run(monkeypatch, f"checkpoint={lora}", f"output={output}", "form=adapter") is None
    card = (output / "README.md").read_text()
    for line in (
        f"- base: `{world.base}`, sha256 `{weights_sha256(world.base)}`",
        "- updates done: 1",
        "- algorithm: beta 0.1",
        "- adapter: LoRA of rank 2, alpha 4.0, on q_proj, up_proj",
        "- weights of the reward: `weights.hps.pt`, sha256 `abc`",
        "- seed: 3",
        "- model.template.name: plain",
        "- sampler.guidance_scale: 2.0",
        "| overall | 0.500 [0.250, 0.750] | 0.500 |",
    ):
        assert line in card.splitlines(), line
    assert card.count("| overall |") == 1 and "base_model" not in card


def test_the_card_of_one_of_several_models_of_a_repository() -> None:
    """The published weights of STAGE are three subfolders."""
    card = model_card(
        title="mine",
        base={"path": "krennic/STAGE", "sha256": "abc"},
        update=1,
        trained_with={"model": {"subfolder": "ocr_ours", "revision": None}},
        reward=None,
        form="the whole model",
        usage="",
        results=[],
    )
    assert "base_model: krennic/STAGE" in card and "- model.subfolder: ocr_ours\n" in card
    assert "model.revision" not in card


def test_mistakes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = f"output={tmp_path / 'out'}"
    wrong = {
        "form=tensor": "form must be merged or adapter; got 'tensor'",
        "layout=x": "layout must be transformers or multi_modality",
        "form=adapter": "has no adapter to save by itself",
        "dtype=int8": "floating-point type of torch; got 'int8'",
    }
    for argument, message in wrong.items():
        assert message in str(run(monkeypatch, f"checkpoint={world.checkpoint}", output, argument))
    assert not list(tmp_path.iterdir())
