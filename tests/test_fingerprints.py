"""Fingerprints of prompts: equal for equal words and pictures, and the committed ones are those of the evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stage import fingerprints
from stage.fingerprints import main, meaning, of_picture, of_prompt, of_text
from stage.prompt_files import read_prompts
from stage.request import parse_request
from stage.types import Prompt

COMMITTED = "package://stage/assets/geneval_evaluation.txt"
DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


def key(text: str, *include: dict[str, Any], **more: Any) -> Any:
    return meaning(parse_request({"tag": "x", "prompt": text, "include": list(include), **more}))


def test_one_picture_has_one_meaning() -> None:
    assert key("dog and cat", DOG, CAT) == key("cat and dog", CAT, DOG)
    left = key("dog left of cat", CAT, {**DOG, "position": ["left of", 0]})
    right = key("cat right of dog", DOG, {**CAT, "position": ["right of", 0]})
    assert left == right != key("dog and cat", DOG, CAT)
    assert left != key("cat left of dog", DOG, {**CAT, "position": ["left of", 0]})
    assert key("above", CAT, {**DOG, "position": ["above", 0]}) != left
    red, blue = {"color": "red"}, {"color": "blue"}
    assert key("", {**DOG, **red}, {**CAT, **blue}) == key("", {**CAT, **blue}, {**DOG, **red})
    assert key("", {**DOG, **red}, {**CAT, **blue}) != key("", {**DOG, **blue}, {**CAT, **red})
    assert key("", {**DOG, "count": 2}) != key("", {**DOG, "count": 3})


def test_a_fingerprint_by_hand() -> None:
    digest = hashlib.sha256(b"a photo of a dog").hexdigest()[:16]
    assert of_text(" A photo  of\na dog. ") == of_text("a photo of a dog") == f"text {digest}"
    request = parse_request({"tag": "colors", "include": [{**DOG, "color": "red"}]})
    digest = hashlib.sha256(b'[[["dog", 1, "red"]], []]').hexdigest()[:16]
    assert of_picture(request) == f"picture {digest}"
    assert of_text("a photo of a dog") != of_text("a photo of a cat")


def test_a_prompt_has_one_of_each() -> None:
    prompt = Prompt(0, "a dog and a cat", {"tag": "two_object", "include": [DOG, CAT]})
    turned = Prompt(1, "a cat and a dog", {"tag": "two_object", "include": [CAT, DOG]})
    assert len(of_prompt(prompt)) == 2 and len(of_prompt(prompt) & of_prompt(turned)) == 1


def test_the_committed_fingerprints_are_those_of_the_evaluation(tmp_path: Path, shared: Path) -> None:
    found = fingerprints.read(COMMITTED)
    assert sum(line.startswith("text") for line in found) == 553
    assert (
        sum(line.startswith("picture") for line in found) == 552
    )  # laptop and cow: asked for from both sides
    file = shared / "data" / "geneval_evaluation_metadata.jsonl"
    if not file.is_file():
        pytest.skip(f"no GenEval metadata at {file}")
    output = tmp_path / "again.txt"
    main([str(file), "--output", str(output)])
    assert output.read_bytes() == fingerprints.resolve(COMMITTED).read_bytes()
    assert all(of_prompt(prompt) <= found for prompt in read_prompts(file))


def test_what_is_no_file_of_fingerprints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m stage\.fingerprints LIST"):
        fingerprints.read(tmp_path / "none.txt")
    (tmp_path / "list.txt").write_text("a photo of a dog\n")
    with pytest.raises(ValueError, match="number 1 is 'a photo of a dog'"):
        fingerprints.read(tmp_path / "list.txt")


def test_a_list_of_another_schema_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "a dog"}) + "\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "plain.jsonl"), "--output", str(tmp_path / "out.txt")])
    assert "tag must be a non-empty string" in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()
