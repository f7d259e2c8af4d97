"""Which code made a run: the commit, the hash that needs none, and what a resume by other code leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

from stage.code_version import code_record, continued, git_state


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["changed"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {**state, "changed": True}


def test_the_hash_follows_the_programs_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "stage" / "inner").mkdir(parents=True)
    (tmp_path / "train.py").write_text("a = 1")
    module = tmp_path / "stage" / "inner" / "module.py"
    module.write_text("b = 1")
    first = code_record(tmp_path)
    assert first["commit"] is None and first["changed"] is None and len(first["sha256"]) == 64
    (tmp_path / "README.md").write_text("words")
    assert code_record(tmp_path) == first
    module.write_text("b = 2")
    second = code_record(tmp_path)
    assert second["sha256"] != first["sha256"]
    module.rename(module.with_name("other.py"))
    assert code_record(tmp_path)["sha256"] not in (first["sha256"], second["sha256"])


def test_a_resume_by_other_code_stands_beside_what_came_before() -> None:
    old, new = {"commit": "a", "sha256": "1"}, {"commit": "b", "sha256": "2"}
    begun = continued([], old, 0)
    assert begun == [{"since": 0, **old}]
    assert continued(begun, old, 40) == begun
    mixed = continued(begun, new, 40)
    assert mixed == [{"since": 0, **old}, {"since": 40, **new}]
    assert continued(mixed, old, 20) == begun  # gone back to an earlier checkpoint
    assert continued(mixed, new, 0) == [{"since": 0, **new}]
