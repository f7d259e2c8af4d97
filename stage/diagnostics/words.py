"""What a diagnosis found, in sentences that say what a number would have to be for the paper's claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of diagnosis.md."""
    yield f"# Diagnosis of {found['checkpoint']}"
    yield ""
    teaching = f"{found['teaching']:.0%} of the groups have an advantage other than 0"
    yield f"{found['prompts']} prompts of {found['samples']} images; {teaching}."
    yield ""
    yield "## Tokens that look alike and are pushed apart"
    yield ""
    yield from _conflict(found["conflict"])
    yield ""
    yield "![share of opposed pairs by similarity](conflict.png)"
    yield ""
    if found["weights"] is not None:
        yield "## What the weights do"
        yield ""
        yield from _weights(found["weights"], found["pull"], found["similarity_with_entropy"])
        yield ""
    if "gradients" in found:
        yield "## Gradients of the samples, policy term alone"
        yield ""
        yield from _gradients(found["gradients"])
        yield ""


def _conflict(found: Mapping[str, Any]) -> Iterator[str]:
    pairs, opposed = sum(found["pairs"]), sum(found["opposed"])
    yield "| cosine of the codes | pairs | of all pairs | opposed |"
    yield "| --- | ---: | ---: | ---: |"
    edges = found["edges"]
    for low, high, count, against in zip(edges, edges[1:], found["pairs"], found["opposed"], strict=False):
        yield f"| {low:g} to {high:g} | {count} | {_share(count, pairs)} | {_share(against, count)} |"
    same = _share(found["same_opposed"], found["same"])
    yield f"| the same token | {found['same']} | {_share(found['same'], pairs)} | {same} |"
    yield f"| **all** | {pairs} | | {_share(opposed, pairs)} |"
    yield ""
    yield (
        "A pair is opposed when its images have advantages of opposite sign. "
        f"{_share(found['same'], pairs)} of all pairs are one token drawn twice, and {same} of those are opposed: what "
        "the policy term tells such a token from both images points in opposite directions."
    )


def _weights(
    found: Mapping[str, float], pull: Mapping[str, float] | None, correlation: float | None
) -> Iterator[str]:
    yield "| over the tokens of groups that teach | |"
    yield "| --- | ---: |"
    yield f"| mean similarity s | {found['similarity']:.3f} |"
    yield f"| mean advantage weight w | {found['weight']:.3f} |"
    yield f"| tokens that as many equal weights would stand for | {found['effective']:.0%} |"
    yield f"| mean KL weight m | {found['kl_weight']:.4f} |"
    yield f"| tokens with m below 1 | {found['freed']:.1%} |"
    yield f"| tokens that all samples of a group drew alike | {found['same_everywhere']:.0%} |"
    if correlation is not None:
        yield f"| correlation of similarity with entropy | {correlation:+.2f} |"
    if pull is not None:
        yield f"| tokens that hold 90 % of the pull | {pull['tokens']:.0%} |"
        yield f"| mean similarity, each token by its pull | {pull['similarity']:.3f} |"
        yield f"| pull that the weights move to other tokens | {pull['moved']:.0%} |"
    yield ""
    yield (
        "With the numbers of the paper m falls below 1 only where s is below 0, so the KL weights act on no other "
        "tokens. Where the sum of w divides the policy term, as in algorithm=stage, w moves the gradient between "
        "tokens and does not shrink it. The pull of a token is |A| (1 - p): from one that was certain anyway nothing "
        "is learned, whatever its weight."
    )


def _gradients(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| | without weights | with weights |"
    yield "| --- | ---: | ---: |"
    rows = (
        ("cosine of samples with opposite advantages", "opposite"),
        ("cosine of samples with advantages of one sign", "alike"),
        ("length of the sum over the sum of lengths", "surviving"),
    )
    for name, key in rows:
        yield f"| {name} | {_number(found['without'][key])} | {_number(found['with'][key])} |"
    yield ""
    yield (
        f"Cosine between a sample's gradient with and without the weights: {_number(found['cosine_of_samples'])}; "
        f"between those of the whole rollout: {_number(found['cosine_of_sums'])}. The whole gradient is "
        f"{found['length_ratio']:.2f} times as long with them. Over {found['parameters']:,} parameters."
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
