"""House rules that a machine can check: no place of one machine, small files, short functions, safe loads."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

MEBIBYTE = 2**20
MAX_FILE_BYTES = 20 * MEBIBYTE
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

# Folders where people keep their things, as an absolute path.
MACHINE_PATH = re.compile(r"(?<![\w./~$}-])(/(?:home|Users|root|mnt|work)/\w[\w./-]*|[A-Z]:\\\\?Users)")
BUILD_FILES = (
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "environments/mmdet.txt",
    "environments/mmdet.sh",
    ".ci/run",
    ".pre-commit-config.yaml",
)
PACKAGE_INDEX = re.compile(r"https?://|index-url|find-links|file:|git\+|@ *\S+\.whl", re.IGNORECASE)
UNSAFE_CALLS = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}


def files(root: Path) -> list[Path]:
    """The files of the project: what git tracks or would track, or everything where there is no git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True) if (root / ".git").exists() else None
    if listed is not None and listed.returncode == 0:
        names = [root / name for name in listed.stdout.split("\0") if name]
    else:
        unwanted = {".venv", "outputs", "multirun", "build", "__pycache__"}
        names = [path for path in root.rglob("*") if not unwanted & set(path.relative_to(root).parts)]
    return sorted(path for path in names if path.is_file() and not path.is_symlink())


def texts(root: Path, suffix: str = "") -> Iterator[tuple[str, str]]:
    """(path from the root, content) of every text file whose name ends in `suffix`."""
    for path in files(root):
        content = path.read_bytes() if path.name.endswith(suffix) else b"\0"
        if b"\0" not in content:
            yield path.relative_to(root).as_posix(), content.decode("utf-8")


def lines_matching(pattern: re.Pattern[str], name: str, text: str) -> list[str]:
    return [
        f"{name}:{n}: {line.strip()[:100]}"
        for n, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def code_faults(name: str, text: str) -> Iterator[str]:
    """Loading that can run code, swallowed exceptions, overlong functions, unfinished notes."""
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = any(
                word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
            )
            if called == "torch.load" and not safe:
                yield f"{name}:{node.lineno}: torch.load without weights_only=True can run code of the file"
            if called in UNSAFE_CALLS:
                yield f"{name}:{node.lineno}: {called}"
        elif isinstance(node, ast.ExceptHandler):
            if all(isinstance(line, ast.Pass | ast.Continue) for line in node.body):
                yield f"{name}:{node.lineno}: an exception is swallowed"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
    yield from lines_matching(re.compile(r"#\s*(TO" r"DO|FIX" r"ME|XX" r"X)\b"), name, text)


def test_nothing_names_a_place_on_one_machine(root: Path) -> None:
    found = [line for name, text in texts(root) for line in lines_matching(MACHINE_PATH, name, text)]
    found += [f"{name}: the path of this checkout" for name, text in texts(root) if f"{root}/" in text]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BUILD_FILES)
def test_installation_names_no_package_index(name: str, root: Path) -> None:
    found = lines_matching(PACKAGE_INDEX, name, (root / name).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_files_are_small(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}: {path.stat().st_size / MEBIBYTE:.1f} MiB"
        for path in files(root)
        if path.stat().st_size > MAX_FILE_BYTES
    ]
    assert not found, "\n".join(found)


def test_a_module_is_one_room(root: Path) -> None:
    found = {name: len(text.splitlines()) for name, text in texts(root, ".py") if name.startswith("stage/")}
    assert not {name: length for name, length in found.items() if length > MAX_MODULE_LINES}


def test_code_keeps_the_rules(root: Path) -> None:
    found = [fault for name, text in texts(root, ".py") for fault in code_faults(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("model." + "eval()", 0),
        ("eval" + "('1')", 1),
        ("try:\n    f()\nexcept OSError:\n    pass", 1),
        ("try:\n    f()\nexcept OSError:\n    g()", 0),
        ("def f():\n" + "    g()\n" * MAX_FUNCTION_LINES, 1),
        ("def f():\n" + "    g()\n" * (MAX_FUNCTION_LINES - 1), 0),
        ("x = 1  # TO" + "DO later", 1),
    ],
)
def test_the_checker_of_code_sees(line: str, faults: int) -> None:
    assert len(list(code_faults("planted.py", line))) == faults


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path: /ho" + "me/anna/models", True),
        ('open("/ro' + 'ot/x.pt")', True),
        ("C:" + "\\Users\\anna", True),
        ("see ../shared/golden and outputs/home/x", False),
        ("https://example.org/ho" + "me/page", False),
        ("a/root/b", False),
    ],
)
def test_the_checker_of_paths_sees(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == found


@pytest.mark.parametrize(
    "line", ["--extra-index" + "-url x", "torch @ git" + "+ssh://x", "-f htt" + "ps://x"]
)
def test_the_checker_of_indexes_sees(line: str) -> None:
    assert PACKAGE_INDEX.search(line)


@pytest.mark.parametrize("name", ["constraints.txt", "environments/mmdet.txt"])
def test_every_pin_is_exact(name: str, root: Path) -> None:
    pin = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*( ; [\w '<>=!.()]+)?")
    lines = (root / name).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)]


def test_an_installed_package_has_its_data(root: Path) -> None:
    """Each file of stage/ that is not Python matches a glob of package-data, else a wheel would lack it."""
    tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    globs = [
        f"{package.replace('.', '/')}/{glob}"
        for package, found in tables["package-data"].items()
        for glob in found
    ]
    names = [path.relative_to(root).as_posix() for path in files(root)]
    data = {name for name in names if name.startswith("stage/") and not name.endswith(".py")}
    packed = {path.relative_to(root).as_posix() for glob in globs for path in root.glob(glob)}
    packed |= {name for name in data for glob in globs if glob.endswith("/**") and name.startswith(glob[:-2])}
    assert not data - packed
