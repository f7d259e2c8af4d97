"""`python -m stage.speed.memory`: memory of a GPU by strategy and number of GPUs, counted from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from stage.memory import Reference, Workload, needed, shape_of
from stage.policy.lora import add_lora
from stage.sharded_memory import sharded_parts, sharded_peak, slices_of
from stage.speed.models import PROMPT_TOKENS, build_policy
from stage.speed.training import FROZEN, LORA

COUNTS = (1, 2, 4, 8)
ADAM = 8  # bytes of two float32 moments
MASTER = 12  # and of a float32 master beside a weight of 16 bits
IMAGES = 8  # of one prompt, an update and GPU

HOW = {
    "fsdp": {"copied": True, "kept": True},
    "fsdp, rollout=layers": {"copied": False, "kept": False},
}


def rows(size: str, kind: str) -> list[list[str]]:
    """GB a GPU of a size, trained in full or with adapters: a row for each way, a column for each of `COUNTS`."""
    policy = build_policy(size, "meta", torch.bfloat16)
    policy.freeze(FROZEN)
    if kind == "lora":
        with torch.device("meta"):
            add_lora(policy, **LORA)
    shape = shape_of(policy)
    run = Workload(
        images=IMAGES,
        micro_batch=IMAGES,
        prompt_tokens=PROMPT_TOKENS,
        rollout_rows=2,
        scored_rows=1,
        optimizer_bytes=shape.trained * (ADAM if kind == "lora" else MASTER),
        reference=Reference.SHARED if kind == "lora" else Reference.COPY,
        checkpointing=True,
        full_attention=False,
    )
    found = {"single, ddp": [needed(shape, run)] * len(COUNTS)}
    sliced, slices = replace(run, optimizer_bytes=shape.trained * ADAM), slices_of(policy)
    for name, how in HOW.items():
        parts = [sharded_parts(shape, slices, sliced, count, offload=False, **how) for count in COUNTS]
        found[name] = list(map(sharded_peak, parts))
    return [[size, kind, name, *(f"{value / 1e9:.0f}" for value in values)] for name, values in found.items()]


def table() -> str:
    """Markdown."""
    heads = ["size", "trained", "strategy", "1 GPU", *(f"{count} GPUs" for count in COUNTS[1:])]
    lines = [heads, ["---"] * 3 + ["---:"] * len(COUNTS)]
    lines += [line for size in ("1b", "7b") for kind in ("lora", "full") for line in rows(size, kind)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
