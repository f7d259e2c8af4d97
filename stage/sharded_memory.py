"""How much device memory a run takes in each process when its weights are sliced over several of them.

Parts that are never there at the same time are not added up: before a rollout the weights are gathered, as soon as its
tokens are drawn they are given back, and gradients come after that. FSDP2 in a backward pass has the layer that runs,
the gathered bytes of the next, the gradients of a layer, and these once more in float32 on their way to the slices
(torch.distributed.fsdp, `FSDPParamGroup.post_backward`). All sizes in bytes; see `stage.memory` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stage.memory import FLOAT, SLACK, ModelShape, Reference, Workload, activation_bytes, rollout_bytes

AHEAD = 2  # layers that are whole at once: the one that runs, and the next, which is gathered meanwhile
ROOMS = 2  # layers that a rollout's weights are on their way of at once (stage.policy.flat_gather)


@dataclass(frozen=True)
class Slices:
    """Numbers of weights by what becomes of them.

    replicated: frozen outside of the layers, whole everywhere. frozen: the layers' that are not trained. outside:
    trained outside of the layers. layer: all of one layer. layer_trained: what is trained of one.
    """

    replicated: int
    frozen: int
    outside: int
    layer: int
    layer_trained: int


def slices_of(policy: Any) -> Slices:
    """Counted from a policy that is not sliced yet; nothing is read but shapes."""
    layers = policy.language_model.layers
    inside = {id(parameter) for parameter in layers.parameters()}
    outer = [parameter for parameter in policy.parameters() if id(parameter) not in inside]
    return Slices(
        replicated=sum(p.numel() for p in outer if not p.requires_grad),
        frozen=sum(p.numel() for p in layers.parameters() if not p.requires_grad),
        outside=sum(p.numel() for p in outer if p.requires_grad),
        layer=sum(p.numel() for p in layers[0].parameters()),
        layer_trained=sum(p.numel() for p in layers[0].parameters() if p.requires_grad),
    )


def sharded_parts(
    shape: ModelShape,
    slices: Slices,
    run: Workload,
    processes: int,
    *,
    copied: bool,
    offload: bool,
    kept: bool,
) -> dict[str, int]:
    """Bytes of each part on the device of one of `processes`.

    Args:
        run: what one process does; its `optimizer_bytes` are those of all processes, for float32 masters.
        copied: whether all weights are gathered for a rollout.
        offload: whether masters, gradients and optimizer are in CPU memory.
        kept: whether layers stay whole from forward to backward (`Sharded.keeps_layers`).
    """
    on_device = 0 if offload else 1
    b = shape.width
    masters = on_device * FLOAT * shape.trained // processes
    keys_values = rollout_bytes(replace(shape, rollout_copy=0), run)
    whole = b * (slices.layer * shape.layers + slices.outside)
    rooms = b * slices.layer * (ROOMS * (processes + 1)) // processes  # what is sent, and all that comes
    return {
        "weights": b * slices.replicated + b * slices.frozen // processes + masters,
        "reference": b * shape.trained // processes if run.reference is Reference.COPY else 0,
        "gradients": masters,
        "optimizer": on_device * run.optimizer_bytes // processes,
        "gathered for the rollout": whole if copied else b * (slices.layer + slices.outside),
        "on their way to it": rooms if copied else 0,
        "keys and values": keys_values,
        "layers in use": b * (AHEAD * slices.layer + slices.outside),
        "layers kept whole": b * slices.layer * max(0, shape.layers - AHEAD) if kept else 0,
        "activations": activation_bytes(shape, run),
        "gradients of a layer": (b + FLOAT) * slices.layer_trained,
        "gradients outside of the layers": (2 * b + FLOAT) * slices.outside + FLOAT * slices.layer_trained,
    }


def sharded_peak(parts: Mapping[str, int]) -> int:
    """The most that is there at once, with slack: in the rollout, in a backward pass, or at the end of all.

    A backward pass begins with the layers that were kept whole and ends with all gradients: the more of these, the
    fewer of those.
    """
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    layer = parts["layers in use"] + parts["activations"] + parts["gradients of a layer"]
    moments = (
        parts["gathered for the rollout"] + max(parts["on their way to it"], parts["keys and values"]),
        max(parts["layers kept whole"], parts["gradients"]) + layer,
        parts["gradients"] + parts["gradients outside of the layers"],
    )
    return round(SLACK * (always + max(moments)))
