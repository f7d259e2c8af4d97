"""Makes the tiny Janus and its judge from nothing.

    python -m stage.shapes.pretrain WORK_FOLDER [--stage vq|detector|language|export|all]

Each stage is seeded, saves as it goes and continues where it was killed; on one H200 no stage takes seven
minutes.
`export` writes the checkpoint and the detector into this package's assets (or `--assets FOLDER`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stage.shapes.corpus import Captions
from stage.shapes.detector import ShapeNet
from stage.shapes.detector_training import train_detector
from stage.shapes.language import Bank, train_language
from stage.shapes.prompts import splits
from stage.shapes.scenes import World
from stage.shapes.tiny import BOI, SPECIAL, build_config, build_processor, build_tokenizer, save
from stage.shapes.vq import encode, to_images, train_vq

STAGES = ("vq", "detector", "language", "export")


@dataclass(frozen=True)
class Plan:
    """Sizes of pretraining. `noise` is the share of captions that lie; see `stage.shapes.corpus`."""

    seed: int = 0
    vq_steps: int = 5000
    vq_batch: int = 64
    detector_steps: int = 1500
    detector_batch: int = 192
    bank: int = 600_000
    noise: float = 0.5
    language_steps: int = 5000
    language_batch: int = 2048
    codes: int = 256
    hidden: int = 128
    layers: int = 6


class Pretraining:
    """The four stages over one work folder."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan, self.device, self.world = folder, plan, device, World()
        lines = splits()["corpus"]
        self.texts = [line["prompt"] for line in lines]
        self.captions = Captions.read(lines, device)
        self.tokenizer = build_tokenizer(self.texts)
        torch.manual_seed(plan.seed)
        config = build_config(self.world, len(self.tokenizer), plan.codes, plan.hidden, plan.layers)
        self.model = JanusForConditionalGeneration(config)
        torch.nn.Module.to(self.model, device)
        self.net = ShapeNet().to(device)

    def _generator(self, stage: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1_000_003 * (self.plan.seed + 1) + stage)

    def vq(self) -> None:
        """The picture codec; the language model's own code embeddings start as its codebook."""
        plan = self.plan
        train_vq(
            self.model.model.vqmodel,
            self.world,
            self.folder,
            plan.vq_steps,
            plan.vq_batch,
            self._generator(0),
        )
        with torch.no_grad():
            codes = self.model.model.vqmodel.quantize.embedding.weight
            self.model.model.generation_embeddings.weight.copy_(codes)

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images through the codec and back."""
        model = self.model.model.vqmodel
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=images.is_cuda):
            return to_images(model.decode(encode(model, images)))

    def detector(self) -> None:
        """The judge."""
        plan = self.plan
        train_detector(
            self.net,
            self.reconstruct,
            self.world,
            self.folder,
            plan.detector_steps,
            plan.detector_batch,
            self._generator(1),
        )

    def language(self) -> None:
        """The policy that reinforcement learning starts from."""
        plan = self.plan
        bank = Bank.draw(self.model, self.captions, self.world, plan.noise, plan.bank, self._generator(2))
        train_language(
            self.model,
            self.prompt_ids(),
            bank,
            self.folder,
            plan.language_steps,
            plan.language_batch,
            self._generator(3),
        )

    def prompt_ids(self) -> Tensor:
        """Left-padded ids `[M, T]` of all captions, begin token first and image start token last."""
        texts = [text + SPECIAL[BOI] for text in self.texts]
        return self.tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(self.device)

    def export(self, assets: Path) -> None:
        """Writes `tiny_janus/` and `detector.safetensors`."""
        save(self.model, build_processor(self.tokenizer, self.world), assets / "tiny_janus")
        weights = {
            name: tensor.half().cpu()
            for name, tensor in self.net.state_dict().items()
            if tensor.is_floating_point()
        }
        save_file(weights, assets / "detector.safetensors")


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
    work = Pretraining(folder, Plan(**arguments), device)
    for stage in STAGES[: STAGES.index("export" if last == "all" else last) + 1]:
        if stage == "export":
            work.export(assets)
        else:
            getattr(work, stage)()


if __name__ == "__main__":
    main()
