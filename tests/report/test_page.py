"""The page: self-contained, escaped, and honest about what it shows."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage.report import gallery
from stage.report.gallery import SIDE, galleries
from stage.report.page import write_report
from stage.report.read import read_run
from tests.report.example import PROMPTS, write_config, write_metrics, write_picture, write_results

BOTH = {"validation": 0.6, "heldout": 0.45}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} & \N{SNOWMAN}'


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
        self.feed(re.sub(r"<(style|script)>.*?</(style|script)>", "", html, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(html: str) -> Page:
    """Nothing is fetched, and nothing runs but our own file: images are data, there is no link or frame."""
    page = Page(html)
    assert not re.search(r"https?:|file:|url\(\s*['\"]?(?!#)|@import|javascript:", html)
    for image in page.of("img"):
        assert image["src"].startswith("data:image/png;base64,") and image["alt"]
        assert base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
        assert "srcset" not in attributes and (
            "src" not in attributes or attributes["src"].startswith("data:")
        )
    ours = (Path(gallery.__file__).parent / "templates" / "gallery.js").read_text(encoding="utf-8")
    assert page.scripts in ([], [ours])
    digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    (policy,) = [tag["content"] for tag in page.of("meta") if "http-equiv" in tag]
    assert (
        policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{digest}'" in policy
    )
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    return page


def page_of(folder: Path) -> Page:
    return check_self_contained(write_report(folder).read_text(encoding="utf-8"))


def full_run(folder: Path) -> Path:
    write_metrics(folder)
    write_config(folder)
    for update in (0, 10, 20, 30):
        write_picture(folder / "images" / f"update_{update:05d}.png", update)
    write_results(folder / "evaluation" / "best", BOTH)
    return folder


def test_a_run_with_everything(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path / "run"))
    assert len(page.of("img")) == 2 * 4 * 2 + 3  # splits, prompts, models; and three of training
    assert (
        len([svg for svg in page.of("svg") if svg.get("role") == "img"]) == 4
    )  # validation, reward, KL, entropy
    for text in (
        "a red ring",
        "wrong: no ring",
        "0.500 → 0.600",
        "+0.100",
        "\N{MINUS SIGN}0.050",
        "became right (2)",
    ):
        assert text in " ".join(page.text.split())
    assert "Of 4 pairs 2 became right and" in " ".join(page.text.split())
    markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| **overall** | **2** | **0.500 (0.400 to 0.600)** | **0.600" in markdown
    assert (
        "python evaluate.py checkpoint=last.ckpt" in markdown
        and "| policy/kl | 0.003 | 0.100 | 0.100 |" in markdown
    )


def test_the_page_of_an_evaluation_inside_a_run_has_the_curves(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run") / "evaluation" / "best"
    page = page_of(folder)
    assert (folder / "report.html").is_file() and "KL to the reference" in page.text
    assert "run" in Page(page.text).text


def test_curves_without_an_evaluation(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    page = page_of(tmp_path)
    assert "Training" in page.text and "Scores" not in page.text and not page.of("img")


def test_an_evaluation_without_curves(tmp_path: Path) -> None:
    write_results(tmp_path, BOTH)
    page = page_of(tmp_path)
    assert "Scores" in page.text and "Training" not in page.text and page.of("img")


def test_the_base_alone(tmp_path: Path) -> None:
    write_results(tmp_path, None)
    page = page_of(tmp_path)
    assert "Images: validation" in page.text and "difference" not in page.text and "after" not in page.text
    assert len(page.of("img")) == 2 * 4


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    prompts = (("colors", HOSTILE), (HOSTILE, "a ring"))
    write_metrics(tmp_path / HOSTILE.replace("/", "-"))
    folder = tmp_path / HOSTILE.replace("/", "-")
    settings: dict[str, Any] = {"name": HOSTILE, "</pre><script>": HOSTILE}
    write_config(folder, **settings)
    write_results(folder, BOTH, prompts=prompts, reason=HOSTILE, command=HOSTILE)
    page = page_of(folder)
    assert page.text.count(HOSTILE) >= 4  # prompt, task, reason, command
    assert "49" not in page.text  # no template in a template
    captions = [image["alt"] for image in page.of("img")]
    assert f"base: {HOSTILE}" in captions


def test_pictures_are_paired_by_prompt_and_sample(tmp_path: Path) -> None:
    write_results(tmp_path, BOTH)
    evaluation = read_run(tmp_path).evaluation
    assert evaluation is not None
    first = galleries(evaluation)[0]
    assert [pair.prompt for pair in first.pairs] == ["a blue ring", "three rings", "a red ring", "two rings"]
    for pair in first.pairs:
        index = [prompt for _, prompt in PROMPTS].index(pair.prompt)
        assert [picture.role for picture in pair.pictures] == ["base", "tuned"]
        assert (pair.place, pair.task) == (index, PROMPTS[index][0])
        for picture in pair.pictures:
            file = tmp_path / "validation" / "images" / f"{picture.role}{index:05d}_0.png"
            assert picture.source is not None
            assert base64.b64decode(picture.source.partition(",")[2]) == file.read_bytes()
            assert picture.correct == (picture.role == "tuned" and index % 2 == 0)
    assert first.total == 4 and first.outcomes == {"better": 2, "same": 2}
    assert first.tasks == {"colors": 2, "counting": 2}


def test_a_plan_stands_under_its_image(tmp_path: Path) -> None:
    """In the gallery from results.json, and below the pictures of training from the file beside them."""
    folder = full_run(tmp_path / "run")
    (folder / "images" / "update_00030.txt").write_text("a red ring, 1: one <ring> in the middle\n")
    path = folder / "evaluation" / "best" / "results.json"
    results = json.loads(path.read_text())
    for line in results["images"]:
        line["plan"] = f"{line['model']} plans {line['prompt']}"
    results["settings"]["base"] |= {"template": {"name": "janus_pro"}}
    results["settings"]["base"]["sampler"] |= {"reasoning": "text"}
    path.write_text(json.dumps(results))
    text = " ".join(page_of(folder).text.split())
    assert "“base plans a red ring”" in text and "“tuned plans a red ring”" in text
    assert "one <ring> in the middle" in text
    assert "templatejanus_pro reasoningtext" in text  # name and value of two facts under the title


def test_the_worst_regressions_come_first(tmp_path: Path) -> None:
    write_results(tmp_path, BOTH)
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {"base": [0.5, 0.9, 0.1, 0.3], "tuned": [0.4, 0.2, 0.8, 0.3]}
    for line in results["images"]:
        line["parts"]["strict"] = scores[line["model"]][line["index"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    evaluation = read_run(tmp_path).evaluation
    assert evaluation is not None
    found = galleries(evaluation)[0]
    assert [pair.place for pair in found.pairs] == [1, 0, 3, 2]
    assert [pair.outcome for pair in found.pairs] == ["worse", "worse", "same", "better"]
    assert [pair.change for pair in found.pairs] == pytest.approx([-0.7, -0.1, 0, 0.7])
    assert found.outcomes == {"worse": 2, "better": 1, "same": 1} and not found.verdicts
    assert "fell (2)" in " ".join(page_of(tmp_path).text.split())


def test_a_page_of_too_many_has_the_worst_the_best_and_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST", 6)
    prompts = tuple((f"task{index // 20}", f"prompt {index}") for index in range(60))
    write_results(tmp_path, BOTH, prompts=prompts)
    results = json.loads((tmp_path / "results.json").read_text())
    for line in results["images"]:  # the last of the file falls, and the one before it
        line["parts"]["strict"] = float((line["model"] == "base") == (line["index"] >= 58))
    (tmp_path / "results.json").write_text(json.dumps(results))
    evaluation = read_run(tmp_path).evaluation
    assert evaluation is not None
    found = galleries(evaluation)[0]
    assert [pair.place for pair in found.pairs] == [58, 59, 0, 1, 56, 57]
    assert found.total == 60 and found.outcomes == {"worse": 2, "better": 58}
    assert "6 of 60 are on this page: the worst, the best" in " ".join(page_of(tmp_path).text.split())


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((384, 300, 3), np.uint8)).save(tmp_path / "a.png")
    source = gallery.thumbnail(tmp_path / "a.png")
    assert source is not None and source.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        assert picture.size == (SIDE * 300 // 384, SIDE)
    assert gallery.thumbnail(tmp_path / "none.png") is None


def test_a_picture_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    write_results(tmp_path, BOTH)
    (tmp_path / "validation" / "images" / "base00000_0.png").unlink()
    page = page_of(tmp_path)
    assert page.text.count("the file is gone") == 1


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    path = write_report(tmp_path)
    before = path.read_bytes()
    (tmp_path / "metrics.csv").write_text("update,reward/mean\n1,x\n")
    with pytest.raises(ValueError, match="metrics are numbers"):
        write_report(tmp_path)
    assert path.read_bytes() == before
