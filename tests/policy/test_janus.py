"""The policy scores what a plain loop scores, decodes what the processor decodes, and trains what it should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from transformers import AutoProcessor

from stage.policy.janus import JanusPolicy, load_policy
from stage.types import PromptTokens, map_tensors
from tests.policy.conftest import PLAIN, PROMPTS, load
from tests.policy.reference import guided_logits, prompt_ids, tolerance, unconditional
from tests.policy.tiny_model import build_tiny_janus


def random_tokens(policy: JanusPolicy, prompts: int, group: int) -> Tensor:
    return torch.randint(policy.codebook_size, (prompts, group, policy.num_image_tokens))


def test_numbers_of_the_model(shared_policy: JanusPolicy) -> None:
    config: Any = shared_policy.model.config
    assert shared_policy.num_image_tokens == shared_policy.grid**2 == config.vision_config.num_image_tokens
    assert shared_policy.codebook_size == config.vq_config.num_embeddings
    assert shared_policy.image_size == config.vision_config.image_size
    assert not any(module.training for module in shared_policy.model.modules())


def test_prompt_tokens(shared_policy: JanusPolicy) -> None:
    """Left padding, and unconditional rows of bos, padding, image start."""
    prompt = shared_policy.tokenize(PROMPTS)
    for row, text in enumerate(PROMPTS):
        ids = prompt_ids(shared_policy, text)
        padding = prompt.ids.shape[1] - len(ids)
        pad = [shared_policy.tokenizer.pad_token_id] * padding
        assert prompt.ids[row].tolist() == pad + ids.tolist()
        assert prompt.mask[row].tolist() == [0] * padding + [1] * len(ids)
        assert prompt.unconditional_ids[row].tolist() == pad + unconditional(shared_policy, ids).tolist()
    assert prompt.ids.dtype == prompt.unconditional_ids.dtype == prompt.mask.dtype == torch.int64
    assert not prompt.mask.bool().all()


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (1.0, 0.5), (3.0, 1.0), (3.0, 2.0)])
def test_scores_are_those_of_a_plain_loop(
    shared_policy: JanusPolicy, scale: float, temperature: float
) -> None:
    prompt, tokens = shared_policy.tokenize(PROMPTS), random_tokens(shared_policy, len(PROMPTS), 2)
    # Random tokens are improbable: log-probabilities around -50 have twice the error of those of sampled tokens.
    bound = tolerance(2 * scale, temperature)
    with torch.no_grad():
        got = shared_policy.score(prompt, tokens, guidance_scale=scale, temperature=temperature)
        for p, text in enumerate(PROMPTS):
            for g in range(2):
                logits = guided_logits(shared_policy, text, tokens[p, g, :-1], scale) / temperature
                logps = logits.log_softmax(-1)
                chosen = logps.gather(1, tokens[p, g, :, None])[:, 0]
                entropy = -(logps.exp() * logps).sum(-1)
                torch.testing.assert_close(got.logps[p, g].double(), chosen, **bound)
                torch.testing.assert_close(got.entropy[p, g].double(), entropy, **bound)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_is_that_of_a_plain_loop(policy: JanusPolicy, scale: float) -> None:
    """Sum of weighted log-probabilities, differentiated through one row at a time with a float64 softmax."""
    prompt, tokens = policy.tokenize(PROMPTS), random_tokens(policy, len(PROMPTS), 2)
    weights = torch.randn(tokens.shape)
    scores = policy(prompt, tokens, guidance_scale=scale, temperature=0.7)
    (scores.logps * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for p, text in enumerate(PROMPTS):
        for g in range(2):
            logps = (guided_logits(policy, text, tokens[p, g, :-1], scale) / 0.7).log_softmax(-1)
            (logps.gather(1, tokens[p, g, :, None])[:, 0] * weights[p, g]).sum().backward()
    wanted = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert any("q_proj" in name for name in got) and any("generation_head" in name for name in got)
    for name, gradient in wanted.items():
        # Relative to the largest element: sums of some hundred terms of that size cancel in the small ones.
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scoring_keeps_no_logits(tmp_path: Path, scale: float) -> None:
    """Nothing of one number a code is kept for the backward pass but the codes' own table: 96 codes, width 64."""
    policy = load(build_tiny_janus(tmp_path, vocabulary=96))
    prompt, tokens = policy.tokenize(PROMPTS), random_tokens(policy, len(PROMPTS), 2)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.score(prompt, tokens, guidance_scale=scale, temperature=1.0)
    assert kept and {shape for shape in kept if 96 in shape} <= {(96, 64), (96,)}


def test_scores_do_not_depend_on_neighbours(shared_policy: JanusPolicy) -> None:
    tokens = random_tokens(shared_policy, len(PROMPTS), 2)
    with torch.no_grad():
        together = shared_policy.score(
            shared_policy.tokenize(PROMPTS), tokens, guidance_scale=3.0, temperature=1.0
        )
        for p, text in enumerate(PROMPTS):
            prompt = shared_policy.tokenize([text])
            alone = shared_policy.score(prompt, tokens[p : p + 1], guidance_scale=3.0, temperature=1.0)
            torch.testing.assert_close(alone.logps[0], together.logps[p], **tolerance(3.0))


def test_padding_is_masked_and_takes_no_position(policy: JanusPolicy) -> None:
    """What the language model is handed for a prompt of 4 tokens beside one of 6, 16 image tokens each."""
    seen: dict[str, Tensor] = {}
    policy.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    prompt = policy.tokenize(["red circle", "a photo of circle"])
    policy.score(prompt, random_tokens(policy, 2, 1), guidance_scale=1.0, temperature=1.0)
    # bos, words, image start, then all image tokens but the last, which predicts nothing.
    assert seen["attention_mask"].tolist() == [[0, 0] + [1] * (4 + 15), [1] * (6 + 15)]
    assert seen["position_ids"].tolist() == [[0, 0, *range(4 + 15)], [*range(6 + 15)]]


class Rows(torch.nn.Module):
    """Stands in front of a module and notes how many rows go through it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, list[int]()
        inner.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.rows.append(len(args[0] if args else kwargs["inputs_embeds"]))


def test_rows_that_are_run(policy: JanusPolicy) -> None:
    """Guidance 1 runs no unconditional row; the text head is never run."""
    prompt, tokens = policy.tokenize(PROMPTS), random_tokens(policy, len(PROMPTS), 2)
    llama, text_head = Rows(policy.language_model), Rows(policy.model.lm_head)
    policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    policy.score(prompt, tokens, guidance_scale=1.5, temperature=1.0)
    assert (llama.rows, text_head.rows) == ([8, 16], [])


def test_gradient_checkpointing_changes_no_value(random_checkpoint: Path) -> None:
    plain = load(random_checkpoint)
    thrifty = load_policy(str(random_checkpoint), PLAIN, "float32", (), True)
    prompt, tokens = plain.tokenize(PROMPTS), random_tokens(plain, len(PROMPTS), 2)
    layers: Any = thrifty.language_model.layers
    feed_forward = Rows(layers[0].mlp)
    for policy in (plain, thrifty):
        policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0).logps.sum().backward()
    assert len(feed_forward.rows) == 2  # once forward, once again in the backward pass
    for (name, one), (_, two) in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_images_are_those_of_the_processor(
    shared_policy: JanusPolicy, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """19 images in chunks of 5. The two orders of rounding may part by one level."""
    side = shared_policy.image_size
    monkeypatch.setattr("stage.policy.pictures.DECODE_PIXELS", {"cpu": 5 * side**2 + 1})
    tokens = random_tokens(shared_policy, 19, 1)
    images = shared_policy.decode(tokens)
    assert images.shape == (19, 1, side, side, 3) and images.dtype == torch.uint8
    processor = AutoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        pixels = shared_policy.model.decode_image_tokens(tokens[:, 0]).permute(0, 3, 1, 2)
    wanted = processor.postprocess(list(pixels), return_tensors="pt")["pixel_values"].permute(0, 2, 3, 1)
    difference = (images[:, 0].int() - wanted.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert wanted.float().std() > 1


def test_an_image_is_a_function_of_its_tokens(shared_policy: JanusPolicy) -> None:
    tokens = random_tokens(shared_policy, 3, 7)
    images = shared_policy.decode(tokens)
    alone = shared_policy.decode(tokens[1:2, 4:5])
    assert (images[1, 4].int() - alone[0, 0].int()).abs().max() <= 1
    assert (images[1, 4] == alone[0, 0]).float().mean() > 0.999


def test_codes_are_the_vectors_of_the_decoder(shared_policy: JanusPolicy) -> None:
    tokens = random_tokens(shared_policy, 2, 3)
    codes = shared_policy.codes(tokens)
    quantize = shared_policy.model.model.vqmodel.quantize
    for p in range(2):
        for g in range(3):
            grid = quantize.get_codebook_entry(tokens[p, g : g + 1])[0]  # [C, grid, grid], raster order
            torch.testing.assert_close(codes[p, g].T, grid.flatten(1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(tokens.shape))
    assert codes.dtype == torch.float32 and not codes.requires_grad


def test_freeze_by_module(tmp_path: Path) -> None:
    """A name freezes that module alone: not generation_aligner with aligner, nor layer 10 with layer 1."""
    policy = load(
        build_tiny_janus(tmp_path, layers=11), ("aligner", "model.vqmodel", "language_model.layers.1")
    )
    frozen = {name for name, p in policy.model.named_parameters() if not p.requires_grad}
    prefixes = ("model.aligner.", "model.vqmodel.", "model.language_model.layers.1.")
    assert frozen == {name for name, _ in policy.model.named_parameters() if name.startswith(prefixes)}


def test_freeze_an_unknown_module_raises(policy: JanusPolicy) -> None:
    for name in ("gen_head", "align", ""):
        with pytest.raises(ValueError, match="freeze must name modules"):
            policy.freeze([name])


@pytest.mark.parametrize("tied", [True, False])
def test_text_head_is_tied_as_the_config_says(tmp_path: Path, tied: bool) -> None:
    folder = build_tiny_janus(tmp_path, tied=tied)
    policy = load(folder, ("lm_head",))
    embeddings = policy.model.get_input_embeddings().weight
    assert (policy.model.lm_head.weight is embeddings) == tied
    assert embeddings.requires_grad
    assert policy.model.lm_head.weight.requires_grad == tied


def test_save_and_load(policy: JanusPolicy, tmp_path: Path) -> None:
    with torch.no_grad():
        policy.model.model.generation_head.vision_head.bias.add_(0.5)
    policy.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, parameter in policy.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    assert again.tokenize(PROMPTS).ids.tolist() == policy.tokenize(PROMPTS).ids.tolist()
    assert again.image_processor.image_mean == policy.image_processor.image_mean
    assert again.model.generation_config.to_dict() == policy.model.generation_config.to_dict()


def test_a_copy_is_independent(policy: JanusPolicy) -> None:
    """What a frozen reference is made with."""
    reference = copy.deepcopy(policy)
    before = reference.model.model.generation_head.vision_head.bias.clone()
    with torch.no_grad():
        policy.model.model.generation_head.vision_head.bias.add_(1.0)
    assert torch.equal(reference.model.model.generation_head.vision_head.bias, before)
    assert reference.tokenize(PROMPTS).ids.tolist() == policy.tokenize(PROMPTS).ids.tolist()


def test_bfloat16(random_checkpoint: Path) -> None:
    policy = load_policy(str(random_checkpoint), PLAIN, "bfloat16", (), False)
    assert policy.language_model.embed_tokens.weight.dtype == torch.bfloat16
    prompt, tokens = policy.tokenize(PROMPTS), random_tokens(policy, len(PROMPTS), 2)
    scores = policy.score(prompt, tokens, guidance_scale=3.0, temperature=1.0)
    scores.logps.sum().backward()
    assert scores.logps.dtype == scores.entropy.dtype == torch.float32
    assert policy.codes(tokens).dtype == torch.float32 and policy.decode(tokens).dtype == torch.uint8


def test_the_tiny_model_config(root: Path, random_checkpoint: Path) -> None:
    with initialize_config_dir(str(root / "conf"), version_base=None):
        config = compose("model/tiny", ["model/template=janus_pro", f"model.path={random_checkpoint}"]).model
    policy = instantiate(config)
    assert policy.template.name == "janus_pro"
    trained = {name.split(".")[1] for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}


def sliced(prompt: PromptTokens, rows: slice) -> PromptTokens:
    return map_tensors(prompt, lambda part: part[rows])


def test_bad_arguments_of_score(shared_policy: JanusPolicy) -> None:
    prompt, tokens = shared_policy.tokenize(PROMPTS), random_tokens(shared_policy, len(PROMPTS), 2)
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        shared_policy.score(prompt, tokens, guidance_scale=0.9, temperature=1.0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            shared_policy.score(prompt, tokens, guidance_scale=1.0, temperature=temperature)
    with pytest.raises(ValueError, match="tokens must be images of these 3 prompts"):
        shared_policy.score(sliced(prompt, slice(3)), tokens, guidance_scale=1.0, temperature=1.0)
    for wrong in (tokens[..., :-1], tokens.flatten(0, 1)):
        with pytest.raises(ValueError, match=r"tokens must be \[prompts, group, "):
            shared_policy.score(prompt, wrong, guidance_scale=1.0, temperature=1.0)
