"""Write a trained policy as a model that others can load. `python -m stage.export --help` says what can be set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from stage import launch

if TYPE_CHECKING:
    from torch import Tensor

    from stage.subject import Subject, Subjects

FORMS = ("merged", "adapter")
LAYOUTS = ("transformers", "multi_modality")
LEAST_GUIDANCE = 1.0001  # that generate draws with; logits differ from those of 1 by 1e-4 of the gap
USAGE = {
    "transformers": (
        "from PIL import Image\nfrom transformers import JanusForConditionalGeneration, JanusProcessor\n\n"
        'model = JanusForConditionalGeneration.from_pretrained("FOLDER", dtype="auto")\n'
        'processor = JanusProcessor.from_pretrained("FOLDER")\n\n'
        'words = processor(text="a photo of a red circle", generation_mode="image", return_tensors="pt")\n'
        "# {source}\n"
        "drawn = dict(do_sample=True, guidance_scale={guidance}, temperature={temperature}, top_k=0)\n"
        'tokens = model.generate(**words, generation_mode="image", **drawn)\n'
        "pixels = model.decode_image_tokens(tokens)[0].float().clamp(-1, 1)  # [H, W, 3]\n"
        'Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy()).save("image.png")'
    ),
    "multi_modality": (
        "# with the code of deepseek-ai/Janus\n"
        "from janus.models import MultiModalityCausalLM, VLChatProcessor\n\n"
        'model = MultiModalityCausalLM.from_pretrained("FOLDER")\n'
        'processor = VLChatProcessor.from_pretrained("FOLDER")'
    ),
    "adapter": (
        "from peft import PeftModel\nfrom transformers import JanusForConditionalGeneration\n\n"
        "# the base in the layout of transformers\n"
        'base = JanusForConditionalGeneration.from_pretrained("BASE", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")'
    ),
}


@hydra.main(config_path="../conf", config_name="export", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        export(config)


def export(config: DictConfig) -> None:
    """Write the model, whole or not at all, with its card."""
    # Imported here, so that --help and mistakes on the command line are answered at once.
    from hydra.core.hydra_config import HydraConfig

    from stage.policy.convert import new_folder
    from stage.subject import find_subjects

    launch.quiet_libraries()
    for name, known in (("form", FORMS), ("layout", LAYOUTS)):
        if config[name] not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}; got {config[name]!r}")
    subjects = find_subjects(config, HydraConfig.get().overrides.task)
    subject = subjects.tuned or subjects.base
    output = Path(str(config.output)).expanduser()
    with new_folder(output) as folder:
        if config.form == "adapter":
            write_adapter(subject, base_of(subjects, subject), folder)
        else:
            write_merged(subject, folder, str(config.layout), config.dtype, int(config.shard_mb) << 20)
        card = write_card(subjects, subject, folder, str(config.form), str(config.layout), output.name)
    print(f"{card} of {subject.path} in {launch.short(output)}", flush=True)


def base_of(subjects: Subjects, subject: Subject) -> dict[str, str]:
    """Path and sha256 of the weights that the subject stands on, or of its own where it is a whole model."""
    whole = subject.checkpoint is None and "path" not in (subject.model.get("adapter") or {})
    found = subject if whole else subjects.base
    return {"path": str(found.model["path"]), "sha256": found.sha256}


def write_adapter(subject: Subject, base: Mapping[str, str], folder: Path) -> None:
    """The adapter in peft's format. Raises ValueError for a policy without one."""
    import torch

    from stage.policy.adapter_files import save_adapter

    if "rank" not in (subject.model.get("adapter") or {}):
        raise ValueError(f"{subject.path} has no adapter to save by itself; export it with form=merged")
    save_adapter(subject.load(torch.device("cpu")), folder, base)


def write_merged(subject: Subject, folder: Path, layout: str, dtype: str | None, shard_bytes: int) -> None:
    """The whole model: the base with what was trained in its place, in the types of the base or in `dtype`."""
    from stage.paths import configured_folder, model_folder
    from stage.policy.checkpoint import resolve_dtype
    from stage.policy.convert import write_checkpoint
    from stage.policy.layout import open_folder

    base = configured_folder(subject.model)
    words = model_folder(str(subject.model["tokenizer"])) if subject.model.get("tokenizer") else base
    opened = open_folder(base)
    opened.check()
    write_checkpoint(
        opened,
        folder,
        layout,
        words=words,
        shard_bytes=shard_bytes,
        changed=trained_tensors(subject),
        dtype=None if dtype is None else resolve_dtype(dtype),
    )


def trained_tensors(subject: Subject) -> dict[str, Tensor]:
    """What differs from the base, adapters merged, by transformers' name."""
    import torch

    from stage.policy.lora import has_adapters, merged_tensors
    from stage.training_checkpoint import POLICY, read_training_checkpoint

    if subject.checkpoint is None and "rank" not in (subject.model.get("adapter") or {}):
        return {}
    policy = subject.load(torch.device("cpu"))
    if has_adapters(policy):
        found = merged_tensors(policy)
    else:
        assert subject.checkpoint is not None
        names = read_training_checkpoint(subject.checkpoint)["state_dict"]
        state = policy.state_dict()
        found = {name: state[name] for name in (key.removeprefix(POLICY) for key in names)}
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def drawing(trained_with: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the program of the card draws with: as training did where that is known, else as Janus is published."""
    from stage.policy.text import GUIDANCE

    sampler = (trained_with or {}).get("sampler", {})
    if not {"guidance_scale", "temperature"} <= sampler.keys():
        return {"source": "as Janus is published", "guidance": GUIDANCE, "temperature": 1.0}
    guidance, temperature = float(sampler["guidance_scale"]), float(sampler["temperature"])
    if guidance > LEAST_GUIDANCE:
        return {"source": "as training drew", "guidance": guidance, "temperature": temperature}
    source = "as training drew, without guidance; generate has none of exactly 1"
    return {"source": source, "guidance": LEAST_GUIDANCE, "temperature": temperature}


def write_card(subjects: Subjects, subject: Subject, folder: Path, form: str, layout: str, title: str) -> str:
    """README.md beside the model; returns in words what the folder holds."""
    from stage.model_card import find_results, model_card
    from stage.paths import resolve

    held = (
        "a LoRA adapter in the format of peft"
        if form == "adapter"
        else f"the whole model in the layout of {layout}"
    )
    text = model_card(
        title=title,
        base=base_of(subjects, subject),
        update=subject.update,
        trained_with=subjects.trained_with,
        reward=subjects.reward,
        form=held,
        usage=USAGE["adapter" if form == "adapter" else layout].format(**drawing(subjects.trained_with)),
        results=find_results(subject.checkpoint or resolve(subject.path), subject.sha256),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return held


if __name__ == "__main__":
    launch.run(main)
