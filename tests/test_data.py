"""Prompt files, the order of prompts, and the data module under Lightning, interrupted and resumed."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

from stage.data import PromptStream, UpdateData, prompt_id, read_prompts
from stage.types import Prompt


def line(text: str, **more: Any) -> dict[str, Any]:
    return {"tag": "any", "include": [{"class": "dog", "count": 1}], "prompt": text, **more}


def write(path: Path, lines: Iterable[dict[str, Any] | str | bytes]) -> Path:
    rows = [json.dumps(row) if isinstance(row, dict) else row for row in lines]
    path.write_bytes(b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in rows))
    return path


def prompts(count: int, start: int = 0) -> tuple[Prompt, ...]:
    return tuple(Prompt(prompt_id(f"p{i}"), f"p{i}", line(f"p{i}")) for i in range(start, start + count))


# --- Files


def test_reads_what_is_written(tmp_path: Path) -> None:
    rows = [line("ein Hund"), line("犬 — café", tag="new task", id=7)]
    found = read_prompts(write(tmp_path / "a.jsonl", rows))
    assert [prompt.text for prompt in found] == ["ein Hund", "犬 — café"]
    assert [prompt.metadata for prompt in found] == rows


def test_windows_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(line("a")).encode() + b"\r\n" + json.dumps(line("b\u2028c")).encode())
    assert [prompt.text for prompt in read_prompts(file)] == ["a", "b\u2028c"]


def test_id_depends_on_the_text_alone(tmp_path: Path) -> None:
    first = read_prompts(write(tmp_path / "a.jsonl", [line("a"), line("b")]))
    second = read_prompts(write(tmp_path / "b.jsonl", [line("b", tag="other")]))
    assert first[1].id == second[0].id != first[0].id
    # The first four bytes of BLAKE2b with a digest of that length, as `b2sum -l 32` prints them.
    assert prompt_id("abc") == 0x63906248
    assert all(0 <= prompt_id(str(i)) < 2**32 for i in range(1000))


DOG_CAT = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
BAD: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"tag": "x", ', "not JSON .*column"),
    "two objects": ('{"a": 1} {"b": 2}', "not JSON"),
    "a list": ("[1, 2]", "one JSON object, got list"),
    "not a number": ('{"prompt": NaN}', "JSON has no NaN"),
    "a key twice": ('{"tag": "x", "tag": "y"}', "'tag' stands twice"),
    "too deep": ("[" * 100_000, "nested too deeply|not JSON"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8 .*byte 15"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(line("x")).encode(), "not JSON"),
    "empty line": ("", "empty; remove it"),
    "blank line": ("  \t", "empty; remove it"),
    "no prompt": ({"tag": "x", "include": [{"class": "dog", "count": 1}]}, "prompt must be .* got None"),
    "empty prompt": (line(" "), "prompt must be a non-empty string"),
    "prompt is a number": (line(3), "got 3"),  # type: ignore[arg-type]
    "half a surrogate": ('{"prompt": "\\ud800"}', "surrogate"),
    "no tag": ({"include": DOG_CAT, "prompt": "x"}, "tag must be"),
    "no include": ({"tag": "counting", "prompt": "x"}, "include must list"),
    "empty include": (line("x", include=[]), "include must list"),
    "count of 0": (line("x", include=[{"class": "dog", "count": 0}]), r"include\[0\].count .* got 0"),
    "count as a word": (line("x", include=[{"class": "dog", "count": "two"}]), "positive integer, got 'two'"),
    "unknown relation": (line("x", include=[DOG_CAT[0], {**DOG_CAT[1], "position": ["near", 0]}]), "'near'"),
    "later include": (line("x", include=[DOG_CAT[1], DOG_CAT[0]]), r"include\[0\].position must refer"),
    "missing include": (line("x", include=[DOG_CAT[0], {**DOG_CAT[1], "position": ["above", 4]}]), "got 4"),
    "misspelt key": (line("x", include=[{"class": "dog", "count": 1, "colour": "red"}]), "'colour'"),
    "repeated prompt": (line("good 0", tag="other"), "'good 0' is on line 1 already"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("before", [1, 3])
def test_a_bad_line_is_named(case: str, before: int, tmp_path: Path) -> None:
    bad, words = BAD[case]
    file = write(tmp_path / "some.jsonl", [*(line(f"good {i}") for i in range(before)), bad, line("after")])
    with pytest.raises(ValueError, match=rf"some\.jsonl:{before + 1}: .*({words})"):
        read_prompts(file)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n"])
def test_an_empty_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the file holds no prompt"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="check the path"):
            read_prompts(path)


def test_the_real_metadata_of_geneval(shared: Path) -> None:
    file = shared / "data" / "geneval_evaluation_metadata.jsonl"
    if not file.is_file():
        pytest.skip(f"no GenEval metadata at {file}")
    found = read_prompts(file)
    assert len(found) == len({prompt.id for prompt in found}) == 553
    assert Counter(prompt.metadata["tag"] for prompt in found) == {
        "single_object": 80, "two_object": 99, "counting": 80,
        "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


# --- Order


def test_an_epoch_reads_every_prompt_once() -> None:
    stream = PromptStream(prompts(12), 4, seed=3)
    orders = []
    for epoch in range(3):
        texts = [prompt.text for update in range(3) for prompt in stream.batch(3 * epoch + update)]
        assert sorted(texts) == sorted(prompt.text for prompt in stream.prompts)
        orders.append(texts)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_what_does_not_fill_an_update_is_left_out_of_the_epoch() -> None:
    stream = PromptStream(prompts(11), 4, seed=0)
    assert stream.updates_per_epoch == 2
    counts: Counter[str] = Counter()
    for update in range(400):
        batch = stream.batch(update)
        assert len({prompt.text for prompt in batch}) == 4
        counts.update(prompt.text for prompt in batch)
    for epoch in range(200):
        assert len({prompt.id for update in (0, 1) for prompt in stream.batch(2 * epoch + update)}) == 8
    # Each prompt is read in an epoch with probability 8 / 11: 145.5 of 200, standard deviation 6.3.
    assert min(counts.values()) > 145.5 - 5 * 6.3 and max(counts.values()) < 145.5 + 5 * 6.3


def test_order_is_a_function_of_seed_and_update() -> None:
    stream = PromptStream(prompts(50), 7, seed=11)
    forward = [stream.batch(update) for update in range(40)]
    again, other = PromptStream(prompts(50), 7, seed=11), PromptStream(prompts(50), 7, seed=12)
    assert [again.batch(update) for update in reversed(range(40))] == forward[::-1]
    assert [other.batch(update) for update in range(40)] != forward


def test_order_is_the_documented_one() -> None:
    """The first words of Philox4x64-10 with the key (seed, epoch), sorted; the cipher is written out here."""
    seed, epoch, count = 2**63 + 5, 9, 10
    words: list[int] = []
    for block in range(1, 4):  # NumPy raises the counter before it draws
        x = [block, 0, 0, 0]
        key = [seed, epoch]
        for _ in range(10):
            low, high = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            mask = 2**64 - 1
            x = [(high >> 64) ^ x[1] ^ key[0], high & mask, (low >> 64) ^ x[3] ^ key[1], low & mask]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        words += x
    expected = sorted(range(count), key=lambda i: words[i])
    assert PromptStream(prompts(count), 1, seed).order(epoch).tolist() == expected


@pytest.mark.parametrize(
    ("count", "size", "seed", "words"),
    [
        (3, 4, 0, "at least prompts_per_update = 4 prompts, got 3"),
        (3, 0, 0, "positive"),
        (3, 1, -1, "seed"),
        (3, 1, 2**64, "seed"),
    ],
)
def test_streams_that_cannot_be(count: int, size: int, seed: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PromptStream(prompts(count), size, seed)


def test_updates_are_counted_from_zero() -> None:
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        PromptStream(prompts(3), 1, 0).batch(-1)


# --- Under Lightning


class Counting(LightningModule):
    """Counts updates as training does; keeps what it was given."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.updates, self.update = updates, 0
        self.given: list[int] = []
        self.validated: list[tuple[str, ...]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.given.append(int(batch))
        self.optimizers().step()  # type: ignore[union-attr]
        self.update += 1
        if self.update >= self.updates:
            self.trainer.should_stop = True

    def validation_step(self, batch: tuple[Prompt, ...], batch_idx: int) -> None:
        self.validated.append(tuple(prompt.text for prompt in batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["update"] = self.update

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.update = checkpoint["update"]


@pytest.fixture
def data(tmp_path: Path) -> UpdateData:
    files = {
        name: str(write(tmp_path / f"{name}.jsonl", [line(f"{name} {i}") for i in range(count)]))
        for name, count in (("train", 10), ("validation", 7), ("heldout", 3))
    }
    return UpdateData(**files, prompts_per_update=3, seed=5)


def trainer(tmp_path: Path, **more: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        accelerator="cpu", max_epochs=-1, default_root_dir=tmp_path, enable_checkpointing=False,
        num_sanity_val_steps=0, **quiet, **more,
    )  # fmt: skip


def test_items_without_a_trainer(data: UpdateData) -> None:
    assert list(islice(data.train_dataloader(), 4)) == [0, 1, 2, 3]
    (validation,) = data.val_dataloader()
    assert [[prompt.text for prompt in batch] for batch in validation] == [
        ["validation 0", "validation 1", "validation 2"],
        ["validation 3", "validation 4", "validation 5"],
        ["validation 6"],
    ]
    assert [len(batch) for loader in data.test_dataloader() for batch in loader] == [3]


def test_resuming_in_the_middle_continues_exactly(data: UpdateData, tmp_path: Path) -> None:
    """Five updates and a checkpoint, in the middle of an epoch; a fresh trainer begins with number 5."""
    first = Counting(updates=5)
    running = trainer(tmp_path)
    running.fit(first, datamodule=data)
    running.save_checkpoint(tmp_path / "middle.ckpt")
    assert first.given == [0, 1, 2, 3, 4]
    second = Counting(updates=9)
    trainer(tmp_path).fit(second, datamodule=data, ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert second.given == [5, 6, 7, 8]
    whole = Counting(updates=9)
    trainer(tmp_path).fit(whole, datamodule=data)
    assert whole.given == first.given + second.given


def test_numbers_go_on_over_lightning_epochs(data: UpdateData, tmp_path: Path) -> None:
    module = Counting(updates=7)
    trainer(tmp_path, limit_train_batches=3).fit(module, datamodule=data)
    assert module.given == [0, 1, 2, 3, 4, 5, 6]
    assert module.validated[:3] == [
        ("validation 0", "validation 1", "validation 2"),
        ("validation 3", "validation 4", "validation 5"),
        ("validation 6",),
    ]


def test_a_module_without_the_counter(data: UpdateData, tmp_path: Path) -> None:
    module = Counting(updates=1)
    del module.update
    with pytest.raises(ValueError, match="saved counter `update`, Counting has none"):
        trainer(tmp_path).fit(module, datamodule=data)


def test_held_out_prompts_are_held_out(tmp_path: Path) -> None:
    a, b = (str(write(tmp_path / name, [line(name), line("both")])) for name in ("a.jsonl", "b.jsonl"))
    for train, validation in ((a, None), (str(write(tmp_path / "c.jsonl", [line("c")])), a)):
        with pytest.raises(ValueError, match=r"1 of .* do, the first is 'both'"):
            UpdateData(train, validation, b, prompts_per_update=1, seed=0)
    alone = UpdateData(a, a, None, prompts_per_update=2, seed=0)
    assert alone.heldout == () and alone.test_dataloader() == []


def test_the_recipe_states_every_argument(root: Path) -> None:
    composed = {"seed": 1, "data": OmegaConf.load(root / "conf" / "data" / "shapes.yaml")}
    whole: Any = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)
    given = whole["data"]
    assert given.pop("_target_") == "stage.data.UpdateData"
    assert set(given) == set(inspect.signature(UpdateData).parameters)
    data = UpdateData(**given)
    assert len(data.stream.batch(0)) == 8 and data.validation and data.heldout
