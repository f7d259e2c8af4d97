"""Prompt files in all the shapes that people have, as `Prompt`s.

| file | a prompt is |
|---|---|
| `.jsonl`, `.ndjson`, or any text file that begins with `{` | one JSON object a line with the key `prompt` |
| `.json` | an element of a JSON list: a text, or an object with the key `prompt` (HPSv2) |
| `.csv`, `.tsv` | a row; the column is called `prompt`, `prompts`, `caption` or `text` (DrawBench, PartiPrompts) |
| anything else | a line of plain text (T2I-CompBench, lists of quoted words for `ocr`) |

Keys of JSON objects that something scores are checked here: GenEval's (`tag`, `include`, `exclude`, see
`stage.request`) and those of the mixed T2I list (`nouns`, `attr_nouns`, `spatial_info`, `numeracy_info`). A line
without them is a prompt like any other; a reward that needs them refuses it (`ChecksPrompts` in `stage.types`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stage.paths import resolve
from stage.request import parse_request
from stage.types import ChecksPrompts, Prompt

JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
HEADINGS = ("prompt", "prompts", "caption", "text")
GENEVAL = ("include", "exclude")
# A line tagged with one of these must hold them; any other tag is a category that scores are averaged by.
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # line number, and a record with the text under `prompt`


class LineError(ValueError):
    """What is wrong with one line of a file."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def prompt_id(text: str) -> int:
    """32-bit BLAKE2b of the text in UTF-8, in [0, 2**32); it depends on nothing but the text.

    Two texts may share an id (0.6 % of lists of 7,000 hold such a pair). They then share random numbers, and
    nothing else.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest(), "big")


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in its order; the shapes are those of the table above.

    A count may be written as a string of digits and becomes a number. A prompt that is repeated with the same
    metadata is read once, and a warning says so, since lists that people use repeat some (T2I-CompBench's colours).

    Args:
        path: an ordinary path, or `package://stage/shapes/assets/train.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `file:line: what is wrong; remedy` for the first line that cannot be read, that would not be
            scored as written, or that repeats an earlier prompt with other metadata. A file without lines is an
            error too.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(f"a prompt file is a file, got {str(path)!r}, which is none; check the path")
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise ValueError(f"{file}:1: the file holds no prompt; write one a line")
    first: dict[str, tuple[int, Prompt]] = {}
    repeats: list[int] = []
    try:
        for number, record in _reader(file, content)(content):
            prompt = _prompt(number, record)
            line, earlier = first.setdefault(prompt.text, (number, prompt))
            if earlier is not prompt:
                if earlier.metadata != prompt.metadata:
                    raise LineError(
                        number,
                        f"one prompt has one meaning, {prompt.text!r} is on line {line} already with other metadata; "
                        f"remove one of them",
                    )
                repeats.append(number)
    except LineError as error:
        raise ValueError(f"{file}:{error.number}: {error}") from error
    if repeats:
        logging.getLogger(__name__).warning(
            "%s:%d: %d prompts stand on an earlier line already and are read once",
            file,
            repeats[0],
            len(repeats),
        )
    return tuple(prompt for _, prompt in first.values())


def check_prompts(scorer: object, lists: Mapping[str, Sequence[Prompt]]) -> None:
    """Ask a scorer that can tell (`ChecksPrompts`) about prompts before anything is drawn for them.

    Raises:
        ValueError: it cannot score one of them; begins with the name of the list.
    """
    if isinstance(scorer, ChecksPrompts):
        for name, prompts in lists.items():
            try:
                scorer.check(prompts)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _reader(file: Path, content: bytes) -> Callable[[bytes], Rows]:
    """What reads this file, by its name and then by what it begins with."""
    if file.suffix.lower() in TABLES:
        return lambda content: _table(content, TABLES[file.suffix.lower()])
    if file.suffix.lower() == ".json" and content.lstrip().startswith(b"["):
        return _json_list
    if file.suffix.lower() in JSON_LINES or content.lstrip().startswith(b"{"):
        return _json_lines
    return _plain


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        if not line.strip():
            raise LineError(number, "the line is empty; remove it")
        yield number, _decode(line, number)


def _decode(content: bytes, number: int) -> str:
    """UTF-8 that begins on line `number`."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        place = len(before) - before.rfind(b"\n") - 1
        raise LineError(
            number + before.count(b"\n"),
            f"the line is not UTF-8 ({error.reason} at byte {place}); save it as UTF-8",
        ) from error


def _plain(content: bytes) -> Rows:
    return ((number, {"prompt": line.strip()}) for number, line in _lines(content))


def _table(content: bytes, delimiter: str) -> Rows:
    """Rows of a table; the other columns are metadata under their headings."""
    rows = csv.reader(io.StringIO(_decode(content, 1), newline=""), delimiter=delimiter, strict=True)
    number = 1
    try:
        headings = next(rows)
        column = next((name for name in headings if name.strip().lower() in HEADINGS), None)
        if column is None or len(set(headings)) < len(headings):
            raise LineError(
                1,
                f"a table has different headings, and one of {', '.join(HEADINGS)} over the prompts, got "
                f"{headings}; name the columns, or save plain prompts as .txt",
            )
        number = rows.line_num + 1
        for row in rows:
            if len(row) != len(headings):
                raise LineError(
                    number,
                    f"a row has as many cells as there are headings, {len(headings)}, got {len(row)}; put cells that "
                    f"hold {delimiter!r} in double quotes",
                )
            cells = dict(zip(headings, row, strict=True))
            yield number, {"prompt": cells.pop(column).strip(), **cells}
            number = rows.line_num + 1
    except csv.Error as error:
        raise LineError(number, f"the row cannot be read ({error}); repair its quotes") from error


def _json_lines(content: bytes) -> Rows:
    for number, line in _lines(content):
        try:
            record = json.loads(line, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            reason = f"the line is not JSON ({error.msg}, column {error.colno}); repair it"
            raise LineError(number, reason) from error
        except RecursionError as error:
            raise LineError(
                number, "the line is nested too deeply to be read; write a flat object"
            ) from error
        except ValueError as error:
            raise LineError(number, str(error)) from error
        if not isinstance(record, dict):
            raise LineError(
                number, f"a line holds one JSON object, got {type(record).__name__}; wrap it in braces"
            )
        try:
            yield number, _checked(record)
        except ValueError as error:
            raise LineError(number, str(error)) from error


def _json_list(content: bytes) -> Rows:
    """Elements of a JSON list; a number is that of the element, counted from 1."""
    text = _decode(content, 1)
    try:
        elements = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise LineError(error.lineno, f"the file is not JSON ({error.msg}); repair it") from error
    except ValueError as error:
        raise LineError(1, str(error)) from error
    for number, element in enumerate(elements, start=1):
        if isinstance(element, str):
            element = {"prompt": element}
        if not isinstance(element, dict):
            raise LineError(
                number, f"an element is a text or an object, got a {type(element).__name__}; repair it"
            )
        try:
            yield number, _checked(element)
        except ValueError as error:
            raise LineError(number, str(error)) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys is written twice; Python would keep the last and drop the others."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"every key stands once in an object, {twice!r} stands twice; remove one of them")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}; write a number or leave the key out")


def _prompt(number: int, record: Mapping[str, Any]) -> Prompt:
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise LineError(
            number, f"prompt must be a non-empty string, got {text!r}; write what the picture shows"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise LineError(
            number, f"prompt holds half of a surrogate pair, got {text!r}; write the whole character"
        )
    return Prompt(id=prompt_id(text), text=text, metadata=dict(record))


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its counts as numbers. Raises ValueError for metadata that nothing could score as written."""
    for key in ("include", "exclude"):
        if isinstance(record.get(key), list):
            record[key] = [_counted(entry, "count") for entry in record[key]]
    if any(record.get(key) is not None for key in GENEVAL) or record.get("tag") in TASKS:
        parse_request(record)
    for key in ("nouns", "attr_nouns"):
        names = record.get(key)
        if names is not None and not (isinstance(names, list) and all(_is_word(name) for name in names)):
            raise ValueError(
                f"{key} must be a list of non-empty strings, got {names!r}; write ['dog', 'cat']"
            )
    _check_spatial(record.get("spatial_info"))
    if record.get("numeracy_info") is not None:
        record["numeracy_info"] = _numeracy(record["numeracy_info"])
    return record


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _counted(entry: Any, key: str) -> Any:
    """A copy of the entry whose count is a number where it is a string of digits."""
    if isinstance(entry, dict) and isinstance(entry.get(key), str):
        digits = entry[key].strip()
        if digits.isascii() and digits.isdecimal():
            return {**entry, key: int(digits)}
    return entry


def _check_spatial(info: Any) -> None:
    keys = ("obj1", "obj2", "locality")
    if info is not None and not (isinstance(info, dict) and all(_is_word(info.get(key)) for key in keys)):
        raise ValueError(
            f"spatial_info must name obj1, obj2 and locality, got {info!r}; write "
            f"{{'obj1': 'dog', 'obj2': 'cat', 'locality': 'left of'}}"
        )


def _numeracy(entries: Any) -> list[Any]:
    """`numeracy_info` with its counts as numbers."""
    found = [_counted(entry, "num") for entry in entries] if isinstance(entries, list) else []
    for entry in found:
        num = entry.get("num") if isinstance(entry, dict) else None
        if not _is_word(entry.get("obj_name") if isinstance(entry, dict) else None):
            break
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            break
    else:
        if found:
            return found
    raise ValueError(
        f"numeracy_info must list an obj_name and a positive num for each object, got {entries!r}; write "
        f"[{{'obj_name': 'dog', 'num': 2}}]"
    )
