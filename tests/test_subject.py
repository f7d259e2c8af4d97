"""What `checkpoint=` names: its weights, its base, and whose settings count."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from stage.subject import choose_device, find_subjects
from stage.training_checkpoint import POLICY, read_training_checkpoint, weights_sha256
from tests.evaluation_world import SAMPLER, World, make_world, model, write_run
from tests.policy.tiny_model import build_tiny_janus
from tests.sliced import slice_up

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def config(world: World, checkpoint: Any, **sampler: Any) -> DictConfig:
    node = {"checkpoint": checkpoint, "model": model(world), "sampler": {**SAMPLER, **sampler}}
    return OmegaConf.create(node)


def test_nothing_is_the_base_alone(world: World) -> None:
    found = find_subjects(config(world, None, guidance_scale=3.0), [])
    assert found.tuned is None and list(found.models) == ["base"]
    assert found.base.sha256 == weights_sha256(world.base)
    assert found.sampler["guidance_scale"] == 3.0


def test_a_training_checkpoint_brings_its_weights(world: World) -> None:
    found = find_subjects(config(world, str(world.checkpoint)), [])
    assert found.tuned is not None and list(found.models) == ["base", "tuned"]
    assert found.tuned.sha256 == hashlib.sha256(world.checkpoint.read_bytes()).hexdigest()
    assert found.tuned.update == 12 and found.trained_with is not None
    saved = read_training_checkpoint(world.checkpoint)["state_dict"]
    base, tuned = found.base.load(CPU), found.tuned.load(CPU)
    before = base.state_dict()
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, saved.get(POLICY + name, before[name]))
        if name.endswith("q_proj.weight") and "language_model" in name:
            assert not torch.equal(value, before[name])
    assert not tuned.training and not any(parameter.requires_grad for parameter in tuned.parameters())


def test_a_checkpoint_in_parts_is_the_same_model(world: World, tmp_path: Path) -> None:
    """A folder is a checkpoint, not a model, and may not change between its hash and its use either."""
    parts = slice_up(world.checkpoint, tmp_path / "last.ckpt", tmp_path / "results")
    one, two = (find_subjects(config(world, str(path)), []) for path in (world.checkpoint, parts))
    assert one.tuned is not None and two.tuned is not None
    assert (two.tuned.update, two.tuned.model, two.sampler) == (12, one.tuned.model, one.sampler)
    assert two.base.sha256 == one.base.sha256 and two.tuned.sha256 != one.tuned.sha256
    state = two.tuned.load(CPU).state_dict()
    assert all(torch.equal(state[name], value) for name, value in one.tuned.load(CPU).state_dict().items())
    torch.save(torch.load(parts / "record.pt", weights_only=True) | {"update": 13}, parts / "record.pt")
    with pytest.raises(ValueError, match=r"has changed since it was hashed"):
        two.tuned.load(CPU)


def test_settings_of_the_checkpoint_count_unless_the_command_line_changes_them(world: World) -> None:
    path = str(world.checkpoint)
    # The configuration says 5, but nobody typed it: the checkpoint was trained with 2.
    assert find_subjects(config(world, path, guidance_scale=5.0), []).sampler == SAMPLER
    typed = find_subjects(
        config(world, path, guidance_scale=5.0, temperature=0.5), ["sampler.guidance_scale=5.0", "seed=3"]
    )
    assert typed.sampler == {**SAMPLER, "guidance_scale": 5.0}
    whole = find_subjects(config(world, path, guidance_scale=5.0, temperature=0.5), ["sampler=other"])
    assert whole.sampler == {**SAMPLER, "guidance_scale": 5.0, "temperature": 0.5}


def test_a_model_folder_stands_beside_the_configured_base(world: World, tmp_path: Path) -> None:
    other = build_tiny_janus(tmp_path / "other", seed=1)
    found = find_subjects(config(world, str(other)), [])
    assert found.tuned is not None
    assert (found.base.sha256, found.tuned.sha256) == (weights_sha256(world.base), weights_sha256(other))
    assert found.tuned.update is None and found.trained_with is None
    assert (
        find_subjects(config(world, str(world.base)), []).tuned is None
    )  # the base is not its own tuned model


def test_images_depend_on_weights_and_on_how_they_are_sampled(world: World) -> None:
    found = find_subjects(config(world, str(world.checkpoint)), [])
    base, tuned = (subject.image_settings(found.sampler, 3) for subject in found.models.values())
    assert {key for key in base if base[key] != tuned[key]} == {"checkpoint"}
    assert base["sampler"] == SAMPLER and base["seed"] == 3 and base["template"]["name"] == "plain"


def test_what_is_not_there_or_damaged(world: World, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt"):
        find_subjects(config(world, str(tmp_path / "nowhere.ckpt")), [])
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(world.checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged.ckpt is damaged"):
        find_subjects(config(world, str(damaged)), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        find_subjects(config(world, str(tmp_path / "empty")), [])
    missing = config(world, None)
    missing.model.path = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*model.path"):
        find_subjects(missing, [])


def test_weights_trained_from_another_base_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    write_run(world, base={"path": "elsewhere", "sha256": "0" * 64})
    found = find_subjects(config(world, str(world.checkpoint)), [])
    assert found.tuned is not None
    with pytest.raises(ValueError, match="needs the base it was trained from: elsewhere"):
        found.tuned.load(CPU)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N; got 'gpu'"):
        choose_device("gpu")


def test_a_checkpoint_that_changes_after_it_was_hashed_is_refused(world: World) -> None:
    """Training beside an evaluation writes last.ckpt anew: the images would not be those of the hash."""
    found = find_subjects(config(world, str(world.checkpoint)), [])
    assert found.tuned is not None
    found.tuned.load(torch.device("cpu"))
    write_run(world, seed=1)
    with pytest.raises(ValueError, match=r"last.ckpt has changed since it was hashed.*evaluate the copy"):
        found.tuned.load(torch.device("cpu"))
