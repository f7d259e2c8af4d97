"""Which checkpoints stay and by which names: files and folders, the last few, the best, and what a kill leaves."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.checkpoint_folder import CheckpointFolder, link, others, remove
from stage.checkpoints import Checkpoints
from stage.training_checkpoint import read_training_checkpoint
from tests.tiny_training import tiny_base, tiny_module, tiny_trainer


def write(path: Path, update: int, kind: str) -> None:
    """A checkpoint of a kind, with its update inside."""
    if kind == "folder":
        path.mkdir()
        (path / "record").write_text(str(update))
    else:
        path.write_text(str(update))


def read(path: Path) -> int:
    return int((path / "record" if path.is_dir() else path).read_text())


def run(folder: CheckpointFolder, kind: str, *updates: int, best: tuple[int, ...] = ()) -> dict[str, int]:
    """Save at these updates; what lies there then, by name."""
    folder.prepare()
    for update in updates:
        place = folder.place(update)
        write(place, update, kind)
        folder.settle(place, update, best=update in best)
    return {path.name: read(path) for path in sorted(folder.path.iterdir())}


def test_one_file_with_two_names_and_nothing_else(tmp_path: Path) -> None:
    found = run(CheckpointFolder(tmp_path, 1), "file", 10, 20, 30, best=(20,))
    assert found == {"best.ckpt": 20, "last.ckpt": 30}
    assert run(CheckpointFolder(tmp_path, 1), "file", 40, best=(40,)) == {"best.ckpt": 40, "last.ckpt": 40}
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")
    assert CheckpointFolder(tmp_path, 1).count() == 1 and CheckpointFolder(tmp_path, 1).most == 3


def test_folders_keep_what_a_name_points_to(tmp_path: Path) -> None:
    found = run(CheckpointFolder(tmp_path, 1), "folder", 10, 20, 30, 40, best=(20,))
    assert found == {
        "best.ckpt": 20,
        "last.ckpt": 40,
        "update_00000020.ckpt": 20,
        "update_00000040.ckpt": 40,
    }
    assert os.readlink(tmp_path / "last.ckpt") == "update_00000040.ckpt"  # relative: a run can be moved
    assert CheckpointFolder(tmp_path, 1).count() == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_last_few_stay_and_the_best_beside_them(tmp_path: Path, kind: str) -> None:
    found = run(CheckpointFolder(tmp_path, 3), kind, 10, 20, 30, 40, 50, best=(10,))
    numbered = {f"update_{n:08d}.ckpt": n for n in (30, 40, 50)}
    # Of a file the best is a name of its own; of a folder it points to one that has to stay.
    pointed = {} if kind == "file" else {"update_00000010.ckpt": 10}
    assert found == {"best.ckpt": 10, "last.ckpt": 50, **pointed, **numbered}
    assert CheckpointFolder(tmp_path, 3).count() == 4


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_that_goes_back_forgets_what_came_after(tmp_path: Path, kind: str) -> None:
    """Resumed from update 20: update 30 is of another future, and so is the update 20 that was not gone on from."""
    folder = CheckpointFolder(tmp_path, 3)
    run(folder, kind, 10, 20, 30)
    found = run(folder, kind, 20)
    assert found == {"last.ckpt": 20, "update_00000010.ckpt": 10, "update_00000020_2.ckpt": 20}
    assert run(folder, kind, 30).keys() == {*found, "update_00000030.ckpt"}


def test_folders_and_files_take_turns(tmp_path: Path) -> None:
    """A run that goes on under another strategy replaces names of the other kind."""
    folder = CheckpointFolder(tmp_path, 1)
    run(folder, "file", 10, best=(10,))
    found = run(folder, "folder", 20)
    assert found == {"best.ckpt": 10, "last.ckpt": 20, "update_00000020.ckpt": 20}
    assert run(folder, "file", 30) == {"best.ckpt": 10, "last.ckpt": 30}


def test_a_copied_run_whose_links_became_folders_goes_on(tmp_path: Path) -> None:
    run(CheckpointFolder(tmp_path / "here", 1), "folder", 10)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert not (tmp_path / "there" / "last.ckpt").is_symlink()
    found = run(CheckpointFolder(tmp_path / "there", 1), "folder", 20)
    assert found == {"last.ckpt": 20, "update_00000020.ckpt": 20}


def test_what_a_kill_left_is_removed_at_the_start(tmp_path: Path) -> None:
    run(CheckpointFolder(tmp_path, 1), "folder", 10)
    for name in (".update_00000020.ckpt.parts", ".update_00000005.ckpt.gone"):
        write(tmp_path / name, 1, "folder")
    write(tmp_path / ".last.ckpt.4711", 1, "file")
    os.symlink("update_00000020.ckpt", tmp_path / ".last.ckpt.link")
    assert run(CheckpointFolder(tmp_path, 1), "folder") == {"last.ckpt": 10, "update_00000010.ckpt": 10}


def test_a_file_system_without_hard_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert run(CheckpointFolder(tmp_path, 1), "file", 10, best=(10,)) == {"best.ckpt": 10, "last.ckpt": 10}
    assert not (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")


def test_a_link_that_fails_leaves_the_former_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "last.ckpt", 10, "file")
    write(tmp_path / "update_00000020.ckpt", 20, "file")

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        link(tmp_path / "update_00000020.ckpt", tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt") == 10


def test_removing_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while files are removed leaves nothing that has the name of a checkpoint."""
    write(tmp_path / "update_00000010.ckpt", 10, "folder")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "update_00000010.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == [".update_00000010.ckpt.gone"]


def test_others_come_newest_first_and_never_the_same_by_another_name(tmp_path: Path) -> None:
    run(CheckpointFolder(tmp_path, 3), "file", 10, 20, 30, best=(10,))
    found = [read(path) for path in others(tmp_path / "last.ckpt")]
    assert found == [20, 10, 10]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


def train(base: Path, folder: Path, updates: int, resume: Path | None = None, **changes: Any) -> Checkpoints:
    settings: dict[str, Any] = {"every": 1, "keep": 3, "beside_training": False, "monitor": "reward/mean"}
    keep = Checkpoints(folder=str(folder), **(settings | changes))
    module = tiny_module(base, updates=updates)
    tiny_trainer(folder, [keep]).fit(module, ckpt_path=resume, weights_only=True)
    return keep


def test_a_damaged_last_names_the_next_older_one_which_resumes(base: Path, tmp_path: Path) -> None:
    keep = train(base, tmp_path, 4)
    content = keep.last.read_bytes()
    keep.last.write_bytes(content[: len(content) // 2])
    older = tmp_path / "update_00000003.ckpt"
    with pytest.raises(ValueError, match=rf"damaged.*Use another one: {older} holds update 3\."):
        read_training_checkpoint(keep.last)
    train(base, tmp_path, 5, resume=older)
    assert read_training_checkpoint(keep.last)["update"] == 5
    assert [update for update, _ in keep.held.numbered()] == [3, 4, 5]


def test_a_damaged_checkpoint_alone_says_that_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint\. No other one"):
        read_training_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("place", ["checkpoints", "."])
def test_a_folder_of_checkpoints_names_the_one_to_give(tmp_path: Path, place: str) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    with pytest.raises(ValueError, match=f"a folder that holds some. Give {last}.$"):
        read_training_checkpoint(tmp_path / "run" / place)


def test_a_score_that_is_the_best_writes_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = torch.save, []

    def watched(content: Any, path: Path) -> None:
        written.append(path)
        save(content, path)

    monkeypatch.setattr(torch, "save", watched)
    keep = train(base, tmp_path, 1, keep=1)
    assert len(written) == 1 and keep.last.samefile(tmp_path / "best.ckpt")


@pytest.mark.parametrize("name", ["every", "keep"])
def test_numbers_below_one_are_refused(name: str) -> None:
    settings: dict[str, Any] = {
        "folder": "here",
        "every": 1,
        "keep": 1,
        "beside_training": False,
        "monitor": "none",
    }
    with pytest.raises(ValueError, match=rf"callbacks\.checkpoints\.{name} must be at least 1"):
        Checkpoints(**(settings | {name: 0}))


def test_what_is_written_beside_training_is_of_its_moment(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as those written while training waits, though the writer is slow and the weights move on."""
    torch.manual_seed(1)
    train(base, tmp_path / "waits", 4)
    save = torch.save

    def slow(content: Any, path: Path) -> None:
        time.sleep(0.5)  # several updates
        save(content, path)

    monkeypatch.setattr(torch, "save", slow)
    torch.manual_seed(1)
    train(base, tmp_path / "beside", 4, beside_training=True)
    for update in (2, 3, 4):
        one, two = (
            read_training_checkpoint(tmp_path / name / f"update_{update:08d}.ckpt")
            for name in ("waits", "beside")
        )
        assert all(torch.equal(one["state_dict"][n], two["state_dict"][n]) for n in one["state_dict"])
        states = [found["optimizer_states"][0]["state"] for found in (one, two)]
        assert all(torch.equal(states[0][n]["exp_avg"], states[1][n]["exp_avg"]) for n in states[0])
        assert one["update"] == two["update"] == update


def test_an_error_of_the_writer_ends_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second save, at the third; and of the last save at the end."""
    save, saves = torch.save, []

    def full(content: Any, path: Path) -> None:
        saves.append(path)
        if len(saves) >= 2:
            raise OSError(28, "No space left on device", str(path))
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(base, tmp_path / "more", 5, beside_training=True)
    assert read_training_checkpoint(tmp_path / "more" / "last.ckpt")["update"] == 1
    saves.clear()
    with pytest.raises(OSError, match="No space left"):
        train(base, tmp_path / "end", 2, beside_training=True)
    assert read_training_checkpoint(tmp_path / "end" / "last.ckpt")["update"] == 1
