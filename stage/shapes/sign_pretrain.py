"""Makes the second tiny Janus, which plans in words and writes on signs, from nothing.

    python -m stage.shapes.sign_pretrain WORK_FOLDER [--stage vq|paint|language|export|all]

Each stage is seeded, saves as it goes and continues where it was killed. `export` writes the checkpoint into this
package's assets (or `--assets FOLDER`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stage.shapes.sign_codec import train_codec, train_painter
from stage.shapes.sign_corpus import Pages, Requests, vocabulary_texts
from stage.shapes.sign_language import train_writer
from stage.shapes.signs import CONTENTS, SIGN_WORLD
from stage.shapes.tiny import build_config, build_processor, build_speller, save
from stage.shapes.vq import encode, to_images

STAGES = ("vq", "paint", "language", "export")


@dataclass(frozen=True)
class Plan:
    """Sizes of pretraining. `noise` is the share of letters that a picture gets wrong, and `clean` the share of steps
    before the language model sees such a picture; see `stage.shapes.sign_corpus`."""

    seed: int = 0
    vq_steps: int = 2100
    paint_steps: int = 2000
    vq_batch: int = 64
    bank: int = 150_000
    noise: float = 0.45
    clean: float = 0.6
    text_length: int = 24
    language_steps: int = 3000
    language_batch: int = 2048
    code_size: int = 16
    hidden: int = 128
    layers: int = 4


class SignPretraining:
    """The stages over one work folder."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan = folder, plan
        self.tokenizer = build_speller(vocabulary_texts())
        torch.manual_seed(plan.seed)
        config = build_config(
            SIGN_WORLD, len(self.tokenizer), CONTENTS, plan.hidden, plan.layers, plan.code_size
        )
        self.model = JanusForConditionalGeneration(config)
        torch.nn.Module.to(self.model, device)
        self.device = device

    def _generator(self, stage: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(1_000_003 * (self.plan.seed + 1) + stage)

    def vq(self) -> None:
        """The picture codec; the language model's own code embeddings start as its codebook."""
        plan, vq = self.plan, self.model.model.vqmodel
        train_codec(vq, self.folder, plan.vq_steps, plan.vq_batch, self._generator(0, self.device))
        with torch.no_grad():
            self.model.model.generation_embeddings.weight.copy_(vq.quantize.embedding.weight)

    def paint(self) -> None:
        """The decoder once more, with the codes as they are."""
        plan = self.plan
        train_painter(
            self.model.model.vqmodel,
            self.folder,
            plan.paint_steps,
            plan.vq_batch,
            self._generator(1, self.device),
        )

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images through the codec and back."""
        vq = self.model.model.vqmodel
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=images.is_cuda):
            return to_images(vq.decode(encode(vq, images)))

    def pages(self, stage: int, faithful: bool) -> Pages:
        """`bank` fresh signs as tokens."""
        generator = self._generator(stage, torch.device("cpu"))
        requests = Requests.draw(self.plan.bank, self.plan.noise, faithful, generator)
        return Pages.write(requests, self.tokenizer, self.plan.text_length, self.device)

    def language(self) -> None:
        """The policy that reinforcement learning starts from."""
        plan = self.plan
        train_writer(
            self.model,
            self.pages(2, faithful=True),
            self.pages(3, faithful=False),
            round(plan.clean * plan.language_steps),
            self.folder,
            plan.language_steps,
            plan.language_batch,
            self._generator(4, self.device),
        )

    def export(self, assets: Path) -> None:
        """Writes `tiny_text/`."""
        save(self.model, build_processor(self.tokenizer, SIGN_WORLD), assets / "tiny_text")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where stages save their state")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="the last stage to run")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent / "assets")
    for name, value in vars(Plan()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="default %(default)s"
        )
    arguments = vars(parser.parse_args())
    folder, last, assets = (arguments.pop(name) for name in ("folder", "stage", "assets"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    work = SignPretraining(folder, Plan(**arguments), device)
    for stage in STAGES[: STAGES.index("export" if last == "all" else last) + 1]:
        if stage == "export":
            work.export(assets)
        else:
            getattr(work, stage)()


if __name__ == "__main__":
    main()
