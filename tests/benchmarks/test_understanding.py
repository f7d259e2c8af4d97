"""Questions about images, before and after: probes, answers of a random tiny Janus, and what counts as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from stage.benchmarks.adding import add_up
from stage.benchmarks.categories import Key
from stage.benchmarks.evaluation import Candidate
from stage.benchmarks.intervals import Bootstrap
from stage.benchmarks.understanding import UnderstandingBenchmark, plain, read_probe
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler
from stage.policy.understanding import answer, features, pixels
from tests.benchmarks.example import tiny_policy
from tests.policy.tiny_model import build_tiny_janus

QUESTION = "<|User|> : {image} {question} <|Assistant|> :"
LINES: list[dict[str, Any]] = [
    {"image": "a.png", "question": "a red circle", "topic": "shapes"},
    {"image": "b.png", "question": "a red circle", "topic": "shapes"},
    {"image": "b.png", "question": "two blue square"},
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return tiny_policy(tmp_path_factory.mktemp("model"))


def write_probe(folder: Path, lines: list[dict[str, Any]]) -> str:
    for number, name in enumerate(("a.png", "b.png")):
        noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "probe.jsonl")


def bench(path: str) -> UnderstandingBenchmark:
    return UnderstandingBenchmark("understanding", {"probe": read_probe(path)}, Key("topic"), QUESTION, 6)


def test_an_answer_is_the_greedy_continuation_with_the_image_in_its_place(policy: JanusPolicy) -> None:
    """Against a loop that runs the whole sequence anew for each word."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    words = policy.tokenizer
    shown = words.boi_token + words.image_token * policy.num_image_tokens + words.eoi_token
    text = "<|User|> : {image} a red circle <|Assistant|> :"
    ids = words([text.replace("{image}", shown)], return_tensors="pt")["input_ids"]
    start, model = ids.shape[1], policy.model.model
    with torch.no_grad():
        seen = model.get_image_features(pixels(policy, image[None]), return_dict=True).pooler_output
        for _ in range(6):
            embedded = model.get_input_embeddings()(ids)
            embedded[ids == words.image_token_id] = seen.flatten(0, 1)
            hidden = model.language_model(inputs_embeds=embedded).last_hidden_state[:, -1]
            best = policy.model.lm_head(hidden).argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
            if int(best) == policy.model.generation_config.eos_token_id:
                break
    expected = " ".join(words.decode(ids[0, start:], skip_special_tokens=True).split())
    assert answer(policy, image, text, 6) == expected
    with pytest.raises(ValueError, match=r"\{image\} once"):
        answer(policy, image, "no place", 6)


def test_features_are_unit_vectors_of_each_image(policy: JanusPolicy) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    found = features(policy, images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features(policy, images[1:2]), found[1:2], atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_answers_before_and_after(policy: JanusPolicy, tmp_path: Path) -> None:
    path = write_probe(tmp_path, LINES)
    made = bench(path)
    assert (made.headline, made.beside, made.draws) == ("unchanged", (), False)
    build_tiny_janus(tmp_path / "other", seed=1)
    other = tiny_policy(tmp_path / "other")
    loads = {"base": lambda: policy, "tuned": lambda: other}
    items = [Candidate(role, tmp_path, {"checkpoint": role}, {}, load) for role, load in loads.items()]
    lines = made.judge_models(items, {}, ["probe"], Sampler(1.0, 1.0), 4, Console(quiet=True))
    assert [(line.role, line.index, line.task) for line in lines] == [
        (role, index, task) for role in loads for index, task in enumerate(("shapes", "shapes", "all"))
    ]
    for line in lines:
        text = QUESTION.replace("{question}", line.prompt)
        picture = np.asarray(Image.open(line.file).convert("RGB"))
        said = answer(loads[line.role](), picture, text, 6)
        assert line.verdict.reason == f"“{said}”"
    scores = add_up(lines, made, ["probe"], Bootstrap(0.95, 100, 0))["probe"]["unchanged"]
    before, after = ([line.verdict.reason for line in lines if line.role == role] for role in loads)
    same = sum(plain(a) == plain(b) for a, b in zip(before, after, strict=True)) / 3
    assert scores["overall"]["base"]["mean"] == 1 and scores["overall"]["tuned"]["mean"] == pytest.approx(
        same
    )
    assert same < 1


def test_expected_answers_are_looked_for_as_words(policy: JanusPolicy, tmp_path: Path) -> None:
    assert plain("Yes, it is.") == " yes it is " and plain("It is") in plain("Yes, it is.")
    assert plain("red") not in plain("a hundred") and plain("RED") in plain("It's red!")
    probe = read_probe(
        write_probe(tmp_path, [{**LINES[0], "answer": "red"}, {**LINES[1], "answer": ["a", "b"]}])
    )
    assert [prompt.metadata["answers"] for prompt in probe] == [["red"], ["a", "b"]]
    made = UnderstandingBenchmark("u", {"probe": probe}, Key("topic"), QUESTION, 6)
    assert (made.headline, made.beside) == ("correct", ("unchanged",))
    item = Candidate("base", tmp_path, {"checkpoint": "c"}, {}, lambda: policy)
    for line in made.judge_models([item], {}, ["probe"], Sampler(1.0, 1.0), 4, Console(quiet=True)):
        answers = probe[line.index].metadata["answers"]
        expected = any(f" {word} " in plain(line.verdict.reason.strip("“”")) for word in answers)
        assert line.verdict.parts == {"unchanged": 1.0, "correct": float(expected)}


def test_all_faults_of_a_probe_are_told_at_once_with_counts(tmp_path: Path) -> None:
    write_probe(tmp_path, [])
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    lines = [
        json.dumps({**LINES[0], "answer": "yes"}), json.dumps(LINES[1]), "{", json.dumps({"image": "a.png"}),
        *(json.dumps({"image": name, "question": "a"}) for name in ("no.png", "none.png", "half.png")),
        json.dumps({**LINES[2], "answer": [3]}),
    ]  # fmt: skip
    (tmp_path / "probe.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="Nothing was asked") as caught:
        read_probe(str(tmp_path / "probe.jsonl"))
    for part in (
        "has 2 such lines", "1 that are no JSON (line 3", "1 without question or image (line 4",
        "2 whose image is missing (line 5: no.png, line 6: none.png)", "1 whose image is damaged (line 7: half.png",
        "1 whose answer is no text (line 8: [3])", "1 without an answer, where others have one (a red circle)",
    ):  # fmt: skip
        assert part in str(caught.value), (part, str(caught.value))
    with pytest.raises(FileNotFoundError, match=r"benchmark.splits.probe.path=FILE"):
        read_probe(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="has 0 such lines"):
        (tmp_path / "probe.jsonl").write_text("\n")
        read_probe(str(tmp_path / "probe.jsonl"))


def test_the_same_question_about_the_same_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than once"):
        bench(write_probe(tmp_path, [LINES[0], LINES[0]]))
