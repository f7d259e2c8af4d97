"""What the pages tell people to type or open exists: make targets, programs, modules, options, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)


def commands(page: str) -> Iterator[str]:
    """Lines of a page's shell blocks without comments, and what in backticks starts like a command."""
    for block in BLOCK.findall(page):
        yield from (line.split(" #")[0].strip() for line in block.splitlines() if not line.startswith("#"))
    yield from re.findall(r"`((?:make|python) [^`]+)`", BLOCK.sub("", page))


def overrides(words: list[str], root: Path) -> Iterator[str]:
    """Choices among `words` that no file stands for: `algorithm=grpo` is conf/algorithm/grpo.yaml."""
    for word in words:
        group, _, options = word.lstrip("+").partition("=")
        folder = root / ("experiments" if group == "experiment" else f"conf/{group}")
        placeholder = options.isupper() or "--config-dir" in words
        if options and folder.is_dir() and not placeholder:
            names = options.strip("[]").split(",")  # `a,b` of a sweep, `[a,b]` for several at once
            yield from (f"{group}={o}" for o in names if not (folder / f"{o}.yaml").is_file())


def missing(command: str, root: Path) -> list[str]:
    """What a command refers to and the repository does not have."""
    words = [
        word
        for word in command.replace('"', " ").replace("'", " ").split()
        if not re.match(r"[A-Z_]+=\S*$", word)
    ]
    if words[:1] == ["make"]:
        targets = set(TARGET.findall((root / "Makefile").read_text(encoding="utf-8")))
        wanted = [word for word in words[1:2] if "=" not in word]
        return [f"make {word}" for word in wanted if word not in targets]
    if not words or Path(words[0]).name != "python":
        return []
    if words[1:2] == ["-m"]:
        module = root.joinpath(*words[2].split("."))
        there = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        return [f"python -m {words[2]}"] if words[2].startswith("stage") and not there else []
    absent = [word for word in words[1:2] if word.endswith(".py") and not (root / word).is_file()]
    return absent + list(overrides(words, root))


def pages(root: Path) -> dict[str, str]:
    found = [*(root / name for name in PAGES), *sorted(root.glob("*/README.md"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_commands_refer_to_what_exists(root: Path) -> None:
    found = [
        f"{name}: {what}"
        for name, page in pages(root).items()
        for c in commands(page)
        for what in missing(c, root)
    ]
    assert not found, "\n".join(found)


def test_links_lead_somewhere(root: Path) -> None:
    found = [
        f"{name}: {to}"
        for name, page in pages(root).items()
        for to in LINK.findall(page)
        if not (root / name).parent.joinpath(to).exists()
    ]
    assert not found, "\n".join(found)


def test_paths_of_the_map_exist(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Map", 1)[1].split("```")[1]
    named = [word for line in block.splitlines() for word in re.split(r"\s{3,}", line.strip())[0].split()]
    assert len(named) > 10
    assert not [name for name in named if not (root / name).exists()]


def test_the_two_commands_are_the_ones_of_continuous_integration(root: Path) -> None:
    readme = list(commands((root / "README.md").read_text(encoding="utf-8")))
    assert {"make train", "make test"} <= set(readme)
    assert "make test-all" in (root / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("make test", []),
        ('make train ARGS="seed=3"', []),
        ("make tea", ["make tea"]),
        ("python tea.py", ["tea.py"]),
        ("python -m stage.tea x=1", ["python -m stage.tea"]),
        ("python -m stage.types", []),
        ("python pyproject.toml algorithm=grpo,tea", ["algorithm=tea"]),
        ("python pyproject.toml --config-dir mine algorithm=mine", []),
        ("PYTHONPATH=. python tea.py", ["tea.py"]),
        ("ls tea", []),
    ],
)
def test_the_checker_of_commands_sees(command: str, absent: list[str], root: Path) -> None:
    assert missing(command, root) == absent
