"""Whether the records of a rollout belong together, asked before anything is computed from them."""

from __future__ import annotations

from stage.types import Rollout


def check_rollout(rollout: Rollout, needs_reference: bool) -> None:
    """Raises ValueError for records that do not belong together and rewards that are not finite."""
    scores, shape = rollout.scores, rollout.old.logps.shape
    groups = {"scores.parts": scores.parts, "codes": rollout.codes, "sampled_logps": rollout.sampled_logps}
    for name, tensor in groups.items():
        length = 2 if name == "scores.parts" else 3
        if tensor.shape[:length] != shape[:length]:
            raise ValueError(
                f"{name} must begin with the shape of the log-probabilities {tuple(shape[:length])}, "
                f"got {tuple(tensor.shape)}; keep the group as an axis of its own"
            )
    if rollout.plans is not None and (rollout.plan_weight is None or rollout.old.plan is None):
        raise ValueError(
            "a rollout with plans needs their weight and their old scores, got "
            f"plan_weight={rollout.plan_weight} and old.plan={rollout.old.plan}; score the tokens with their plans"
        )
    columns = scores.parts.shape[-1]
    if not columns == len(scores.names) == len(scores.weights):
        raise ValueError(
            f"each reward part needs one name and one weight, got {columns} parts, names {scores.names} and "
            f"weights {scores.weights}; mend the scorer"
        )
    finite = scores.parts.isfinite().flatten(0, 1).all(dim=0)
    if not finite.all():
        broken = [name for name, good in zip(scores.names, finite.tolist(), strict=True) if not good]
        raise ValueError(
            f"rewards must be finite, got NaN or infinity in {', '.join(broken)}; mend the scorer"
        )
    if needs_reference and rollout.reference is None:
        raise ValueError(
            "the KL term and the entropy reward need reference scores, got None; score the rollout with the "
            "reference model, or set beta and entropy_coefficient to 0 and take no slot that looks back at it"
        )
