"""Which room may import which, read from the import statements of the tree.

Two tables are the whole rule. A module imports only from rows of `LAYERS` below its own; files of one folder
leave each other alone, except in the folders of `INSIDE`, where a file may import the steps below its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

# Lowest first: modules, or all files of a folder.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "stage.types",
        "stage.paths",
        "stage.mistakes",
        "stage.worlds",
        "stage.request",
        "stage.checkpoint_folder",
        "stage.optimizer",
        "stage.provenance",
        "stage.code_version",
        "stage.processes",
        "stage.gradients",
        "stage.whole_files",
    ),
    ("stage.links",),
    ("stage.heartbeat",),
    ("stage.weights", "stage.batches", "stage.ranks", "stage.resolvers"),
    ("stage.sharded_checkpoint",),
    ("stage.training_checkpoint",),
    ("stage.objective.*",),
    ("stage.policy.*", "stage.detectors.*", "stage.geneval", "stage.prompt_files", "stage.score_checks"),
    ("stage.subject", "stage.memory", "stage.drawn", "stage.joint_credit", "stage.fingerprints"),
    ("stage.rewards.*", "stage.benchmarks.*", "stage.data", "stage.shapes.*", "stage.replacement"),
    (
        "stage.group_draws",
        "stage.strategy",
        "stage.sharded_memory",
    ),
    ("stage.rollout", "stage.lender", "stage.report.*"),
    ("stage.loggers", "stage.forecast", "stage.step_metrics", "stage.diagnostics.*"),
    (
        "stage.module",
        "stage.callbacks",
        "stage.alarms",
        "stage.ratio_gate",
        "stage.reference_refresh",
        "stage.checkpoints",
        "stage.launch",
        "stage.model_card",
    ),
    ("stage.multirun",),
    (
        "train",
        "evaluate",
        "stage.pack.*",
        "stage.speed.*",
        "stage.sample",
        "stage.sweep_file",
        "stage.diagnose",
        "stage.export",
        "stage.prompts",
        "stage.rewards.serve",
        "stage.rewards.selfcheck",
    ),
)

# Folders whose files build on one another, lowest step first; `*` is every file not named. Files of one step
# are siblings. In objective and rewards one composing file stands on files that know little of each other.
INSIDE: dict[str, tuple[str, ...]] = {
    "stage.objective": (
        "*",
        "parts baselines ratios critical token_weights distributions",
        "credit_metrics sums",
        "objective",
    ),
    "stage.detectors": ("mmdet_settings", "*", "paddle_models mask2former mmdet clip_colors"),
    "stage.policy": (
        "forms padding plan_layout names attention draws variation compiled_decode flat_gather "
        "triton_linear triton_decode triton_draw graph_recorder",
        "template architecture weights",
        "layout text",
        "adapter_files convert",
        "checkpoint lora",
        "pictures",
        "reference janus rollout_weights sharded",
        "decoder gathered understanding",
        "graphed cpu_decode plans",
        "sampler",
        "drawing",
    ),
    "stage.rewards": (
        "batcher grid known_answers members mentions parts phrases pixels wire",
        "grounding tower",
        "*",
        "combine by_category remote service",
        "selfcheck serve",
    ),
    "stage.benchmarks": (
        "images intervals provenance categories published lists accumulate writer",
        "benchmark share outside fetch compbench official",
        "shapes generate verdicts adopt",
        "evaluation",
        "layout models judging adding",
        "results drift understanding jobs",
        "scoring",
    ),
    "stage.report": (
        "read tables statistics wandb_log dashboard",
        "curves gallery groups comparable sources spread",
        "page paired variants",
        "compare scores",
        "overview",
        "ablation",
        "picture",
        "ablation_page",
        "__main__",
    ),
    "stage.pack": ("plan", "pool thin", "archive", "__main__"),
    "stage.speed": (
        "sizes",
        "models machine scorers plain_scores saves",
        "rollout rewards evaluation",
        "plain_step",
        "training",
        "distributed memory scaling",
        "__main__",
    ),
    "stage.shapes": (
        "scenes steps",
        "prompts tiny detector signs",
        "corpus detector_training sign_prompts",
        "vq sign_corpus",
        "language sign_codec",
        "pretrain sign_language",
        "sign_pretrain",
    ),
}

# Tensors in and out: the maths knows nothing of configuration, training loops or logs.
PURE = "stage.objective.*"
IMPURE = {"hydra", "omegaconf", "lightning", "transformers", "wandb", "logging", "rich"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of all modules of the project under `root`; a package goes by its folder's name."""
    found = {}
    for file in [*sorted((root / "stage").rglob("*.py")), root / "train.py", root / "evaluate.py"]:
        if not file.is_file():
            continue
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in a file; `from a import b` is `a.b` where that is a module."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in known else source


def row(name: str) -> int | None:
    """Index of the row of a module or of a folder in LAYERS, None where no row names it.

    A module's own name beats the pattern of its folder: a program may lie in the room it is about.
    """
    for index, patterns in enumerate(LAYERS):
        if name in patterns:
            return index
    for index, patterns in enumerate(LAYERS):
        if any(fnmatchcase(name, pattern) or f"{name}.*" == pattern for pattern in patterns):
            return index
    return None


def step(name: str) -> int | None:
    """Index of the step of a file in its folder: 0 where INSIDE lists none, None if it forgets the file."""
    folder, _, file = name.rpartition(".")
    steps = [names.split() for names in INSIDE.get(folder, ("*",))]
    for wanted in (file, "*"):
        for index, names in enumerate(steps):
            if wanted in names:
                return index
    return None


def fault(name: str, target: str) -> str | None:
    """What is wrong with `name` importing `target`, both modules of the project; None where nothing is."""
    mine, its = row(name), row(target)
    folder = name.rpartition(".")[0]
    if target in ("stage", folder, name):
        return None
    if mine is None or its is None:
        return f"{name} imports {target}: {target if its is None else name} has no row in LAYERS"
    if its < mine:
        return None
    if its > mine:
        return f"{name} imports {target}, which is above it"
    lower, upper = step(target), step(name)
    if folder == target.rpartition(".")[0] and lower is not None and upper is not None and lower < upper:
        return None
    return f"{name} imports {target}, which is its sibling"


def violations(root: Path) -> list[str]:
    """One line for each import that breaks the rule, and for each module that the tables do not place."""
    known, found = modules(root), []
    for name, path in known.items():
        where = path.relative_to(root)
        if name != "stage" and row(name) is None:
            found.append(f"{where}: {name} has no row in LAYERS")
        elif name != "stage" and path.name != "__init__.py" and step(name) is None:
            found.append(f"{where}: {name} has no step in INSIDE")
        else:
            for line, target in sorted(set(imports(name, path, known))):
                top = target.split(".")[0]
                if top in IMPURE and fnmatchcase(name, PURE):
                    found.append(f"{where}:{line}: {name} is pure and imports {target}")
                if top in ("stage", "train", "evaluate", "tests") and (reason := fault(name, target)):
                    found.append(f"{where}:{line}: {reason}")
    return found


def test_rooms_import_only_from_below(root: Path) -> None:
    found = violations(root)
    assert not found, "\n".join(["the order is LAYERS and INSIDE in tests/test_layers.py:", *found])


PLANTED = {
    "a type reaches up": ("stage/types.py", "import stage.data", 1),
    "siblings": ("stage/objective/similarity.py", "from stage.objective import surrogate", 1),
    "siblings, relative": ("stage/objective/similarity.py", "from . import surrogate", 1),
    "siblings, relative module": ("stage/objective/similarity.py", "from .surrogate import loss", 1),
    "inside a function": ("stage/policy/sampler.py", "def f():\n    from stage.rewards import combine", 1),
    "rooms of one row": ("stage/data.py", "from stage.rewards.combine import Combine", 1),
    "the entry point from below": ("stage/module.py", "import train", 1),
    "tests from the package": ("stage/module.py", "from tests.policy import tiny_model", 1),
    "logging in the maths": ("stage/objective/similarity.py", "import omegaconf", 1),
    "a room without a row": ("stage/utils.py", "import math", 1),
    "down is fine": ("stage/module.py", "from stage.objective.objective import Objective", 0),
    "the composing file": ("stage/objective/objective.py", "from . import similarity, surrogate", 0),
    "a composing scorer": ("stage/rewards/combine.py", "from stage.rewards import geneval", 0),
    "a scorer another scorer": ("stage/rewards/geneval.py", "from stage.rewards import combine", 1),
    "up inside a folder": ("stage/shapes/scenes.py", "from stage.shapes import corpus", 1),
    "down inside a folder": ("stage/shapes/corpus.py", "from stage.shapes import scenes", 0),
    "a file without a step": ("stage/shapes/misc.py", "import math", 1),
    "a composing scorer elsewhere": ("stage/rewards/combine.py", "from stage.shapes import scenes", 1),
    "the package itself": ("stage/__init__.py", "from stage import module", 1),
    "names of the bottom": ("stage/rollout.py", "from stage.types import Rollout\nimport torch", 0),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_checker_finds_what_is_planted(case: str, tmp_path: Path) -> None:
    """A small tree with one planted line: the checker counts exactly the expected number of violations."""
    planted, line, expected = PLANTED[case]
    for file in (
        *("train.py", *(f"stage/{name}.py" for name in ("__init__", "types", "data", "module", "rollout"))),
        *(f"stage/objective/{name}.py" for name in ("__init__", "similarity", "surrogate", "objective")),
        *(f"stage/rewards/{name}.py" for name in ("__init__", "geneval", "combine")),
        *(f"stage/shapes/{name}.py" for name in ("__init__", "scenes", "corpus")),
        *("stage/policy/__init__.py", "stage/policy/sampler.py"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("from __future__ import annotations\n", encoding="utf-8")
    assert violations(tmp_path) == []
    (tmp_path / planted).write_text(line, encoding="utf-8")
    assert len(violations(tmp_path)) == expected, violations(tmp_path)
