"""Draw images of one prompt into one picture. `python -m stage.sample --help` says what can be set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from stage import launch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

GAP = 2  # white pixels between the images of the grid


@hydra.main(config_path="../conf", config_name="sample", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        sample(config)


def sample(config: DictConfig) -> None:
    """Draw the images of one prompt and save them as one picture."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    import io

    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from PIL import Image

    from stage.benchmarks.images import write_atomic
    from stage.subject import choose_device, find_subjects

    launch.quiet_libraries()
    prompt = str(config.prompt)
    for name in ("count", "columns", "batch_size"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {config[name]!r}")
    subjects = find_subjects(config, HydraConfig.get().overrides.task)
    subject = subjects.tuned or subjects.base
    output = output_file(config.output, prompt, config.seed, subject.sha256)
    output.parent.mkdir(parents=True, exist_ok=True)
    policy, sampler = subject.load(choose_device(config.device)), instantiate(subjects.sampler)
    images, plans = draw(
        policy, sampler, prompt, count=config.count, seed=config.seed, batch_size=config.batch_size
    )
    file = io.BytesIO()
    Image.fromarray(grid(images.numpy(), config.columns)).save(file, format="PNG")
    write_atomic(output, file.getvalue())
    for number, plan in enumerate(plans, start=1):
        print(f"{number}: {plan}")
    print(f"{config.count} images of {prompt!r} in {launch.short(output)}", flush=True)


def output_file(asked: str | None, prompt: str, seed: int, sha256: str) -> Path:
    """The picture's path. Raises ValueError for one that does not end in .png."""
    if asked is None:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        return Path("outputs") / "samples" / f"{words}-seed{seed}-{sha256[:8]}.png"
    path = Path(asked).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"output must be the name of a picture that ends in .png; got {asked!r}")
    return path


def draw(
    policy: Any, sampler: Any, prompt: str, *, count: int, seed: int, batch_size: int
) -> tuple[Tensor, list[str]]:
    """Images 0 to count - 1 of `prompt`, uint8 `[count, H, W, 3]`, `batch_size` of them at once, and their plans.

    Image n is the one that an evaluation with this seed draws as sample n of the prompt. The plans are an empty list
    without reasoning.
    """
    import torch

    from stage.data import prompt_id
    from stage.policy import drawing
    from stage.policy.plans import plan_texts
    from stage.types import map_tensors

    noise = drawing.noise(policy, sampler, seed, 0, [prompt_id(prompt)], count)
    tokens = drawing.tokenize(policy, sampler, [prompt])
    images, plans = [], list[str]()
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        cut = map_tensors(noise, lambda tensor, part=part: tensor[:, part])
        with torch.no_grad():
            samples = drawing.draw(policy, sampler, tokens, cut)
            images.append(policy.decode(samples.tokens)[0].cpu())
        if samples.plans is not None:
            plans += plan_texts(policy, samples.plans)[0]
    return torch.cat(images), plans


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 `[N, H, W, 3]` as one picture, `columns` images a row, white between them and after the last."""
    import numpy as np

    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        picture[top : top + height, left : left + width] = image
    return picture


if __name__ == "__main__":
    launch.run(main)
