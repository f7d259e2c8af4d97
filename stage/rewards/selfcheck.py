"""Two bundled pictures through a reward, beside what its weights must give. `--help` says what can be set.

Expected scores are kept by the sha256 of the weights, so that a table serves every reward and never compares
different files. The bundled table (`assets/selfcheck.json`) holds what is known from measurements with the published
weights; a table of one's own carries scores from one machine, device or version to another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from stage import paths
from stage.provenance import hashes
from stage.rewards.known_answers import ASSETS, PROMPTS, pictures
from stage.score_checks import check_itself
from stage.types import Scorer


def scores(scorer: Scorer) -> list[list[float]]:
    """The weighted sum of parts of each picture, two prompts by two pictures, scored twice.

    Raises:
        ValueError: the second pass, in batches of other pictures, gives something else.
    """
    images = pictures()
    first, second = scorer(images, PROMPTS), scorer(images.flip(0), PROMPTS[::-1])
    totals = first.parts @ torch.tensor(first.weights)
    again = (second.parts @ torch.tensor(second.weights)).flip(0)
    if not torch.allclose(totals, again, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"a picture's score does not depend on the pictures beside it, got {totals.tolist()} and "
            f"{again.tolist()} in another order; try dtype float32"
        )
    return [[round(float(value), 6) for value in row] for row in totals.cpu()]


def key(scorer: Any) -> str:
    """What stands for class and weights of a scorer in a table.

    Raises:
        ValueError: the scorer does not say what its weights are.
    """
    provenance = getattr(scorer, "provenance", None)
    if not isinstance(provenance, Mapping):
        raise ValueError(
            f"a selfcheck is for a reward with weights, {type(scorer).__name__} names none; check the scorers of "
            f"a combination one by one"
        )
    files = sorted(digest for _, digest in hashes(provenance))
    found = hashlib.sha256("\n".join(files).encode()).hexdigest()
    return f"{type(scorer).__name__}:{found}"


def compare(found: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    """Raises ValueError where a score is further from the expected one than `tolerance`."""
    difference = np.abs(np.array(found) - np.array(expected)).max()
    if difference > tolerance:
        raise ValueError(
            f"these weights give {expected} for the bundled pictures, got {found}, {difference:.4f} away at most "
            f"with {tolerance:g} allowed; check device, dtype and library versions before training on this reward"
        )


def read_table(file: Path) -> dict[str, Any]:
    """A table of expected scores; an absent file is an empty one."""
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"a table of expected scores is JSON, {file} is not: {error}; repair it") from error
    if not isinstance(table, dict):
        raise ValueError(f"a table of expected scores maps keys to scores, {file} does not; record a new one")
    return table


def check(scorer: Scorer, config: Mapping[str, Any]) -> str:
    """Scores, compares and, if asked, records; gives the lines to print."""
    tables = dict(read_table(paths.resolve(ASSETS) / "selfcheck.json"))
    own = None if config["table"] is None else Path(str(config["table"])).expanduser()
    if config["record"] and own is None:
        raise ValueError("record=true writes into a table, got table=null; name one: table=FILE.json")
    if own is not None and not config["record"] and not own.is_file():
        raise ValueError(f"a table is a file, there is no {own}; record it first with record=true")
    mine = {} if own is None else read_table(own)
    name = key(scorer)
    check_itself(scorer, wanted=True)
    found = scores(scorer)
    lines = [
        f"{prompt.text}: {row[0]:.4f} for its picture, {row[1]:.4f} for the other"
        for prompt, row in zip(PROMPTS, found, strict=True)
    ]
    if config["record"] and own is not None:
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps({**mine, name: found}, indent=1) + "\n", encoding="utf-8")
        return "\n".join([*lines, f"recorded in {own}"])
    expected = mine.get(name, tables.get(name))
    if expected is None:
        lines.append(
            f"nothing to compare with: no table has scores for these weights ({name}). Record them on a machine "
            "that you trust with table=FILE.json record=true, and compare elsewhere with table=FILE.json"
        )
        return "\n".join(lines)
    compare(found, expected, float(config["tolerance"]))
    return "\n".join([*lines, f"as expected, within {float(config['tolerance']):g}"])


@hydra.main(config_path="../../conf", config_name="selfcheck", version_base="1.3")
def main(config: DictConfig) -> None:
    """Instantiate the reward, check it, print what was found."""
    from hydra.utils import instantiate

    try:
        print(check(instantiate(config.reward), dict(config)), flush=True)
    except hydra.errors.InstantiationException as error:
        raise SystemExit(f"selfcheck: {error.__cause__ or error}") from error
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"selfcheck: {error}") from error


if __name__ == "__main__":
    main()
