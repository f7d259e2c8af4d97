"""The same scores image by image, as the loops of the release compute them: the baseline of the speed table.

Sources: krennic999/STAGE src/grpo/src/utils/reward_hps.py; CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_git.py and
reward_gdino.py. Each image is preprocessed on the CPU and goes through the model by itself, in the dtype of the scorer,
so that the difference in time is that of batching and preprocessing alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from stage.rewards.gdino import GDinoReward
from stage.rewards.git import GITReward, questions
from stage.rewards.grounding import Boxes, caption
from stage.rewards.hps import HPSReward
from stage.rewards.mentions import read_mentions
from stage.rewards.pixels import Pixels
from stage.types import Prompt

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def seen(picture: Tensor, pixels: Pixels, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One picture uint8 `[H, W, 3]` through Pillow, or a tensor where `pixels` keeps fractions, `[1, 3, h, w]`."""
    image = Image.fromarray(picture.numpy())
    size = list(pixels.size(image.height, image.width))
    if pixels.rounded:
        found = transforms.to_tensor(transforms.resize(image, size, MODES[pixels.mode]))
    else:
        found = transforms.resize(transforms.to_tensor(image), size, MODES[pixels.mode])
    if pixels.crop is not None:
        found = transforms.center_crop(found, [pixels.crop, pixels.crop])
    return transforms.normalize(found, list(pixels.mean), list(pixels.std))[None].to(device, dtype)


def pairs(images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Tensor, Prompt]]:
    """Each image uint8 `[H, W, 3]` with its prompt."""
    return [(image, prompt) for group, prompt in zip(images, prompts, strict=True) for image in group]


@torch.no_grad()
def plain_hps(scorer: HPSReward, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Cosines, one an image; the prompt is read again for each."""
    tower, found = scorer.tower, []
    for image, prompt in pairs(images, prompts):
        pixels = seen(image, tower.pixels, tower.device, tower.dtype)
        tokens = tower.tokenizer([prompt.text]).to(tower.device)
        features = tower.model.encode_image(pixels).float(), tower.model.encode_text(tokens).float()
        one, other = (torch.nn.functional.normalize(value, dim=-1) for value in features)
        found.append((one @ other.T).item())
    return found


@torch.no_grad()
def plain_git(scorer: GITReward, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Mean probabilities of yes, one an image; a pass of encoder and model for each question."""
    found = []
    for image, prompt in pairs(images, prompts):
        pixels, answers = seen(image, scorer.pixels, scorer.device, scorer.dtype), []
        for question in questions(read_mentions(prompt))[0]:
            words = scorer.tokenizer(question, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[scorer.tokenizer.cls_token_id, *words]], device=scorer.device)
            looked_at = scorer.encoder(pixels).last_hidden_state.unsqueeze(1)
            logits = scorer.model(pixel_values=looked_at, input_ids=ids).logits[0, -1].float()
            answers.append(torch.softmax(logits[[scorer.yes, scorer.no]], dim=0)[0].item())
        found.append(sum(answers) / len(answers))
    return found


@torch.no_grad()
def plain_gdino(scorer: GDinoReward, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """Scores by the rules of the reward, one an image; every box is looked at by itself."""
    found = []
    for image, prompt in pairs(images, prompts):
        asked = read_mentions(prompt)
        text, spans = caption(asked.nouns)
        encoding = scorer.tokenizer(text, return_tensors="pt").to(scorer.device)
        pixels = seen(image, scorer.pixels, scorer.device, scorer.dtype)
        output = scorer.model(
            pixel_values=pixels, input_ids=encoding["input_ids"], attention_mask=encoding["attention_mask"]
        )
        logits, places = output.logits[0].float().sigmoid().cpu(), output.pred_boxes[0].float().cpu()
        boxes = {}
        for noun, tokens in zip(asked.nouns, scorer._tokens(text, spans), strict=True):
            kept = [(q, row[tokens].mean()) for q, row in enumerate(logits)]
            kept = [(q, value) for q, value in kept if value.item() > scorer.threshold]
            values = [value for _, value in kept]
            boxes[noun] = Boxes(
                places=places[[q for q, _ in kept]],
                scores=torch.stack(values) if values else torch.zeros(0),
            )
        found.append(scorer.rules.score(asked, boxes))
    return found
