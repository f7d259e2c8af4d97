"""Plain paths and paths inside packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage.paths import resolve


def test_plain_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("a/b.jsonl") == Path("a/b.jsonl")
    assert resolve(tmp_path) == tmp_path
    assert resolve("~/x") == tmp_path / "x"


def test_package_paths_from_any_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("package://stage/types.py") == root / "stage" / "types.py"
    assert resolve("package://stage/shapes/assets") == root / "stage" / "shapes" / "assets"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("package://stage", ValueError),
        ("package://stage/", ValueError),
        ("package:///types.py", ValueError),
        ("package://stage/../secret", ValueError),
        ("package://stage//types.py", ValueError),
        ("package://..stage/types.py", ValueError),
        ("package://no_such_package/x", FileNotFoundError),
        ("package://stage/no/such.file", FileNotFoundError),
    ],
)
def test_package_paths_that_name_nothing(path: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="package"):
        resolve(path)
