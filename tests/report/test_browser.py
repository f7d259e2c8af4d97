"""report.html in a real browser: pictures load, filters work, nothing is asked of a network, narrow and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stage.report.page import write_report
from tests.report.browser import Browser, browser, driver, missing
from tests.report.example import write_config, write_metrics, write_picture, write_results

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PROMPTS = tuple((("colors", "counting")[index % 2], f"prompt {index} of a ring") for index in range(60))
TAB, ENTER, DOWN = "\ue004", "\ue007", "\ue015"  # WebDriver's names of keys
VISIBLE = "[...document.querySelector('[data-gallery]').querySelectorAll('.pair')].filter(c => !c.hidden)"
FOCUS = (
    "return document.activeElement.name || document.activeElement.className || document.activeElement.tagName"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything; of 60 pairs of a split 20 fell, by more and more, and 20 rose."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    write_metrics(folder)
    write_config(folder)
    for update in (0, 10, 20):
        write_picture(folder / "images" / f"update_{update:05d}.png", update)
    inner = folder / "evaluation" / "best"
    write_results(inner, {"validation": 0.6, "heldout": 0.45}, prompts=PROMPTS)
    results = json.loads((inner / "results.json").read_text())
    for line in results["images"]:
        change = {0: -0.2 - line["index"] / 200, 1: 0.0, 2: 0.3}[line["index"] // 20]
        line["parts"]["strict"] = 0.5 + (change if line["model"] == "tuned" else 0)
    (inner / "results.json").write_text(json.dumps(results))
    return write_report(folder)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with driver(tmp_path_factory.mktemp("driver")) as port:
        yield port


@pytest.fixture(scope="module")
def window(port: int, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A wide window."""
    with browser(port, tmp_path_factory.mktemp("profile"), (1280, 900)) as found:
        yield found


@pytest.fixture
def opened(window: Browser, page: Path) -> Browser:
    window.requests()
    window.open(page)
    return window


def choose(window: Browser, name: str, value: str) -> None:
    window.run(
        f"const e = document.querySelector('[data-gallery] [name={name}]'); e.value = {value!r};"
        "e.dispatchEvent(new Event('input', {bubbles: true}))"
    )


def places(window: Browser) -> list[int]:
    return window.run(f"return {VISIBLE}.map(c => Number(c.dataset.place))")


def test_pictures_load_and_nothing_is_asked_of_a_network(opened: Browser, page: Path) -> None:
    sizes = opened.run(
        "for (const i of document.images) i.loading = 'eager';"
        "return Promise.all([...document.images].map(i => i.decode())).then("
        "() => [...document.images].map(i => [i.naturalWidth, i.naturalHeight]))"
    )
    assert len(sizes) == 2 * 60 * 2 + 3 and all(size == [8, 8] for size in sizes)
    assert opened.requests() == [page.resolve().as_uri()]
    assert opened.complaints() == []  # no refused source, no error of the script


def test_a_network_request_would_be_refused(opened: Browser) -> None:
    opened.run("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);")
    said = opened.complaints()
    assert len(said) == 1 and "Content Security Policy" in said[0]


def test_filters_and_orders(opened: Browser) -> None:
    assert places(opened) == [
        *range(19, -1, -1),
        *range(20, 40),
        *range(40, 48),
    ]  # the worst first, 48 at once
    assert opened.run("return document.querySelector('.count').textContent") == "48 of 60 shown"
    choose(opened, "outcome", "worse")
    assert places(opened) == list(range(19, -1, -1))
    choose(opened, "task", "counting")
    assert places(opened) == list(range(19, 0, -2))
    choose(opened, "outcome", "")
    choose(opened, "order", "best")
    assert places(opened) == [*range(41, 60, 2), *range(21, 40, 2), *range(1, 20, 2)]
    choose(opened, "words", "prompt 41 ")
    assert places(opened) == [41]
    choose(opened, "words", "nothing like it")
    assert places(opened) == [] and "0 of 0" in opened.run(
        "return document.querySelector('.count').textContent"
    )
    choose(opened, "words", "")
    choose(opened, "task", "")
    choose(opened, "order", "listed")
    assert places(opened) == list(range(48))


def test_by_keyboard_alone(opened: Browser) -> None:
    """Tab reaches the filters in their order, letters and arrows choose, and the focus follows what is shown anew."""
    opened.run("document.querySelector('[data-gallery] [name=task]').focus()")
    opened.keys("c", "o", "u")  # the option that begins so
    assert opened.run("return document.querySelector('[name=task]').value") == "counting"
    assert all(place % 2 for place in places(opened)) and len(places(opened)) == 30
    reached = []
    for _ in range(3):
        opened.keys(TAB)
        reached.append(opened.run(FOCUS))
    assert reached == ["outcome", "order", "words"]
    opened.run("document.querySelector('[name=task]').value = ''")
    opened.keys("4", "1", ENTER)  # sends no form, and the page stays
    assert places(opened) == [41]
    choose(opened, "words", "")
    opened.keys(TAB)
    while opened.run(FOCUS) != "more":
        opened.keys(TAB)
    opened.keys(ENTER)
    assert len(places(opened)) == 60 and opened.run(FOCUS) == "pair"
    assert opened.run("return Number(document.activeElement.dataset.place)") == 48
    outline = opened.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus can be seen


def test_a_narrow_window(port: int, page: Path, tmp_path: Path) -> None:
    """390 pixels, a telephone: nothing but tables, which scroll by themselves, is wider than the window."""
    with browser(port, tmp_path / "profile", (390, 844)) as narrow:
        narrow.open(page)
        inner, scrolled = narrow.run("return [innerWidth, document.documentElement.scrollWidth]")
        assert inner == 390 and scrolled <= 390
        sticking_out = narrow.run(
            "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, [hidden]')"
            " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert sticking_out == []
        smallest = narrow.run(
            f"return Math.min(...{VISIBLE}.flatMap(c => [...c.querySelectorAll('p, figcaption')])"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert smallest >= 12
        assert narrow.run("return document.querySelector('.picture img').getBoundingClientRect().width") > 100


def test_without_scripts_everything_is_there(page: Path, port: int, tmp_path: Path) -> None:
    with browser(port, tmp_path / "profile", (1280, 900)) as still:
        still._chrome("Emulation.setScriptExecutionDisabled", {"value": True})
        still.open(page)
        still._chrome("Emulation.setScriptExecutionDisabled", {"value": False})
        assert places(still) == [*range(19, -1, -1), *range(20, 60)]
        assert still.run("return document.querySelector('.filters').hidden")
