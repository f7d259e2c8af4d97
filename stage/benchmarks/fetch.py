"""Fetch the prompt lists of benchmarks: `python -m stage.benchmarks.fetch geneval ocr`, into datasets/NAME/.

A file that is there with the right checksum is not fetched again. One that arrives with another checksum is an error
and is not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stage.benchmarks.images import write_atomic
from stage.paths import resolve

SOURCES = "package://stage/benchmarks/assets/datasets.yaml"
TIMEOUT = 60  # seconds without an answer


def fetch(names: Sequence[str], folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Fetch the files of data sets that are not there yet; return a line about each.

    Args:
        names: of data sets in `sources`.
        folder: a subfolder for each data set is made in it.
        sources: data set to file name to `url` and `sha256`, as in stage/benchmarks/assets/datasets.yaml.

    Raises:
        ValueError: an unknown name, or a file that is not what the checksum says.
        OSError: a file cannot be fetched or written.
    """
    unknown = [name for name in names if name not in sources]
    if unknown or not names:
        raise ValueError(
            f"data sets are {', '.join(sources)}, got {', '.join(unknown) or 'none'}; name some of these"
        )
    return [
        _file(folder / name / file, source["url"], source["sha256"])
        for name in names
        for file, source in sources[name].items()
    ]


def _file(path: Path, url: str, sha256: str | None) -> str:
    if path.is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 in (None, found):
            return f"{path}: there already{_unpinned(sha256, found)}"
        raise ValueError(
            f"{path} has the sha256 {found}, published is {sha256}; remove the file to fetch it again, or point "
            "the benchmark at it if it is meant to differ"
        )
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except urllib.error.URLError as error:
        raise OSError(
            f"{url} cannot be fetched ({error.reason}); where there is no network, copy the file to {path}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(
            f"{url} gave {len(content)} bytes with the sha256 {found}, expected {sha256}; nothing was kept. The list "
            f"may have changed: compare it, and put it at {path} with its path set in the benchmark if it is right"
        )
    write_atomic(path, content)
    return f"{path}: {len(content)} bytes{_unpinned(sha256, found)}"


def _unpinned(sha256: str | None, found: str) -> str:
    return "" if sha256 else f", sha256 {found}, which nothing was compared with"


def main(arguments: Sequence[str] | None = None) -> None:
    sources = yaml.safe_load(resolve(SOURCES).read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m stage.benchmarks.fetch", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of {', '.join(sources)}")
    parser.add_argument("--datasets", default="datasets", help="folder to write to (default: datasets)")
    parser.add_argument("--sources", help="a YAML file with other addresses, such as those of a mirror")
    options = parser.parse_args(arguments)
    if options.sources is not None:
        sources = yaml.safe_load(Path(options.sources).read_text(encoding="utf-8"))
    try:
        lines = fetch(options.names, Path(options.datasets), sources)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
