"""The dependency lists of pyproject.toml and the import statements say the same."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

# Import name to distribution, where they differ.
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "hydra": "hydra-core",
    "markupsafe": "jinja2",  # the strings of jinja2's templates
    "open_clip": "open-clip-torch",
    "hypothesis": "schemathesis",  # which is a set of strategies for it, and requires it
    "triton": "torch",  # comes with torch's builds for CUDA; only the files of kernels import it
    "yaml": "omegaconf",  # omegaconf reads its files with PyYAML and requires it
}

OWN = {"stage", "tests", "train", "evaluate"}
TOOLS = {"pytest", "ruff", "mypy", "pre-commit"}


def canonical(requirement: str) -> str:
    """`open_clip_torch>=3.0` is `open-clip-torch`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def nodes(tree: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    """All nodes under `tree`; without functions it is what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if into_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from nodes(node, into_functions)


def outside(tree: ast.AST, into_functions: bool = True) -> set[str]:
    """Distributions that the imports under `tree` need: neither the standard library nor the project."""
    names: set[str] = set()
    for node in nodes(tree, into_functions):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return {canonical(DISTRIBUTION.get(name, name)) for name in names - OWN - sys.stdlib_module_names}


def sources(root: Path) -> dict[str, ast.Module]:
    paths = [*sorted((root / "stage").rglob("*.py")), *(root / name for name in ("train.py", "evaluate.py"))]
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if path.is_file()
    }


def declared(root: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Core distributions, and those of each extra."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: set(map(canonical, lines)) for name, lines in project["optional-dependencies"].items()}
    return set(map(canonical, project["dependencies"])), extras


def test_what_is_imported_is_declared(root: Path) -> None:
    core, extras = declared(root)
    allowed = core.union(*(names for extra, names in extras.items() if extra != "dev"))
    missing = {name: sorted(outside(tree) - allowed) for name, tree in sources(root).items()}
    assert not {name: found for name, found in missing.items() if found}


def test_what_is_declared_is_imported(root: Path) -> None:
    core, _ = declared(root)
    used = set().union(*map(outside, sources(root).values()))
    assert not core - used, "no line imports these: drop them from pyproject.toml"


def test_tests_need_what_make_test_installs_alone(root: Path) -> None:
    core, extras = declared(root)
    assert extras["dev"] >= TOOLS
    line = re.search(r"--editable '\.\[(dev[a-z,]*)\]'", (root / "Makefile").read_text(encoding="utf-8"))
    assert line is not None
    installed = core.union(*(extras[name] for name in line[1].split(",")))
    trees = {
        path.name: ast.parse(path.read_text(encoding="utf-8")) for path in (root / "tests").rglob("*.py")
    }
    needed = {name: sorted(outside(tree, into_functions=False) - installed) for name, tree in trees.items()}
    assert not {name: found for name, found in needed.items() if found}


def test_every_dependency_is_pinned(root: Path) -> None:
    """constraints.txt pins core and extras, except the extras that pyproject.toml sets apart."""
    core, extras = declared(root)
    pins = {canonical(line) for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    wanted = core.union(
        *(names for extra, names in extras.items() if extra not in ("mmdet", "paddleocr", "compbench"))
    )
    assert not wanted - pins


def test_the_reader_of_imports() -> None:
    tree = ast.parse(
        "import PIL.Image, os\nfrom stage import types\nclass A:\n def f():\n  from open_clip import x"
    )
    assert outside(tree) == {"pillow", "open-clip-torch"}
    assert outside(tree, into_functions=False) == {"pillow"}
