"""A reward service for tests: a scorer that counts, in this process or in one of its own that can be hurt.

python -m tests.rewards.serving PORT FOLDER --errors 0.1 --stalls 0.05 --stall-seconds 3
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage.rewards.service import Limits, Service, build_app
from stage.types import Prompt, Scores

TOKEN = "a token for tests"


class Brightness:
    """`bright`: mean of the pixels over 255, in [0, 1]; `length`: letters of the prompt. Fails where it is asked to.

    Every image that is scored leaves a line in `log`: the value of its first pixel, which numbers it in the tests.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.log, self.calls = log, 0
        self.provenance = {"weights": "none"}

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if "unscorable" in prompt.text:
                raise ValueError(f"a prompt must be scorable; got {prompt.text!r}. Choose another.")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        if any("broken" in prompt.text for prompt in prompts):
            raise RuntimeError("the scorer is broken")
        bright = images.double().mean(dim=(2, 3, 4)) / 255
        length = torch.tensor([[float(len(prompt.text))] * images.shape[1] for prompt in prompts])
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                for image in images.flatten(0, 1):
                    stream.write(f"{number_of(image)}\n")
        reasons = tuple(tuple(f"{value:.3f}" for value in row) for row in bright.tolist())
        parts = torch.stack([bright.float(), length], dim=-1)
        return Scores(parts, ("bright", "length"), (1.0, 0.0), reasons, ((0.0, 1.0), (0.0, 1e6)))


class Contrast(Brightness):
    """`bright` is that of the image less the mean of its group."""

    compares_group = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = super().__call__(images, prompts)
        parts = found.parts.clone()
        parts[..., 0] -= parts[..., 0].mean(1, keepdim=True)
        return replace(found, parts=parts, ranges=((-1.0, 1.0), (0.0, 1e6)))


def numbered_images(prompts: int, group: int, side: int = 8) -> Tensor:
    """Random images uint8 `[P, G, side, side, 3]` whose first pixel says which one it is."""
    images = torch.randint(
        0, 256, (prompts, group, side, side, 3), generator=torch.Generator().manual_seed(0)
    )
    numbers = torch.arange(prompts * group).view(prompts, group)
    images[:, :, 0, 0, 0], images[:, :, 0, 0, 1] = numbers // 256, numbers % 256
    return images.to(torch.uint8)


def number_of(image: Tensor) -> int:
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])


def some_prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(index, "a" * (1 + index % 7), {"tag": "test"}) for index in range(count))


def service(scorer: Any, token: str | None = TOKEN, **limits: Any) -> Service:
    chosen = {
        "max_images": 64,
        "max_wait_seconds": 0.01,
        "max_waiting": 4096,
        "max_bytes": 2**20,
        "images_per_minute": 10**6,
        "remembered": 64,
    } | limits
    return Service(scorer, reward="brightness", identity="f" * 64, token=token, limits=Limits(**chosen))


class Faults:
    """ASGI middleware: some score requests get a 500 before or after the work, some no answer in time."""

    def __init__(self, app: Any, errors: float, stalls: float, stall_seconds: float) -> None:
        self.app, self.errors, self.stalls, self.stall_seconds = app, errors, stalls, stall_seconds
        self.random = random.Random(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/score":
            await self.app(scope, receive, send)
            return
        drawn = self.random.random()
        if drawn < self.errors / 2:
            await _error(send)
        elif drawn < self.errors:  # the work is done, and its answer lost
            await self.app(scope, receive, _nowhere)
            await _error(send)
        elif drawn < self.errors + self.stalls:
            await asyncio.sleep(self.stall_seconds)
            await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def _nowhere(message: Any) -> None:
    return None


async def _error(send: Any) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"injected"})


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--errors", type=float, default=0.0)
    parser.add_argument("--stalls", type=float, default=0.0)
    parser.add_argument("--stall-seconds", type=float, default=0.0)
    parser.add_argument("--contrast", action="store_true")
    asked = parser.parse_args()
    scorer = Contrast if asked.contrast else Brightness
    app = build_app(service(scorer(asked.folder / "scored.txt")))
    app.add_middleware(Faults, errors=asked.errors, stalls=asked.stalls, stall_seconds=asked.stall_seconds)
    uvicorn.run(app, host="127.0.0.1", port=asked.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
