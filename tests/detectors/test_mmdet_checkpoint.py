"""Reading checkpoints: tensors come out, foreign objects are skipped, and no code of the file runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage.detectors.mmdet_checkpoint import read_checkpoint


class History:
    """Stands for what a training framework leaves in its checkpoints."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class Call:
    """Unpickled as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


RECORDS = {
    "history": History(np.arange(3.0)),
    "scalar": np.float64(0.5),
    "dtype": np.dtype("int32"),
    "steps": [np.arange(2), {"lr": 0.1}],
    "type": History,
}
STATE = {"a.weight": torch.arange(4.0), "b.bias": torch.ones(2, dtype=torch.float16)}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_beside_foreign_records(zipped: bool, tmp_path: Path) -> None:
    """Both formats of torch.save: mmdet publishes in the one from before torch 1.6."""
    file = tmp_path / "checkpoint.pth"
    torch.save({"meta": RECORDS, "state_dict": STATE}, file, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(file)
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_bare_state_dict_will_do(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "bare.pth")
    assert list(read_checkpoint(tmp_path / "bare.pth")) == list(STATE)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped: bool, tmp_path: Path) -> None:
    """Copying a file is skipped like any foreign record; a call into the operating system is refused."""
    (tmp_path / "source").write_text("x", encoding="utf-8")
    copied, made, file = tmp_path / "copied", tmp_path / "made", tmp_path / "attack.pth"
    calls = [Call(shutil.copyfile, str(tmp_path / "source"), str(copied)), Call(os.mkdir, str(made))]
    torch.save({"a": calls[0], "state_dict": STATE}, file, _use_new_zipfile_serialization=zipped)
    assert list(read_checkpoint(file)) == list(STATE)
    torch.save({"a": calls[1], "state_dict": STATE}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a checkpoint is a file that torch\.load reads with weights_only"):
        read_checkpoint(file)
    assert not copied.exists() and not made.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken", b"\x80\x02]q\x00."])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth .*Download it again"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "holds 1 other values, first b"),
        ({"state_dict": {}}, "holds dict"),
        ([torch.ones(1)], "holds list"),
        ({"state_dict": RECORDS}, "other values, first history"),
    ],
)
def test_what_holds_no_weights_is_refused(content: Any, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=text):
        read_checkpoint(tmp_path / "other.pth")
