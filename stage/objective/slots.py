"""What fits where: the keywords of the slots, the range of the switches, and what excludes what."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

# The keywords each slot of `Objective` is called with.
SLOTS: Mapping[str, tuple[str, ...]] = {
    "advantage": ("scores", "bonus", "tied_groups"),
    "token_weights": ("advantages", "kept", "codes"),
    "ratio": ("scores", "old_logps", "advantages", "clip_low", "clip_high"),
    "divergence": ("scores", "reference"),
    "aggregation": ("weights", "like"),
    "entropy_reward": ("best", "entropy", "reference_entropy", "coefficient"),
    "critical_tokens": ("old", "reference", "codes"),
    "penalty": ("scores", "reference"),
    "beta_schedule": ("update",),
}
OPTIONAL = ("critical_tokens", "penalty", "beta_schedule")  # null turns them off
DISTRIBUTIONS = ("conditional", "guided")


def check_switches(switches: Mapping[str, Any]) -> None:
    """Raises ValueError for a switch of `Objective` that is out of its range, whatever the slots."""
    for name in ("reweight_advantage", "reweight_kl"):
        if not isinstance(switches[name], bool):
            raise ValueError(f"{name} must be true or false, got {switches[name]!r}; write it without quotes")
    for name in ("entropy_coefficient", "beta"):
        value = switches[name]
        if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}; 0 turns it off")
    for name, optional in (("updates_per_rollout", False), ("micro_batch", True)):
        value = switches[name]
        if not (value is None and optional) and (not isinstance(value, int) or value < 1):
            whole = "; null means all samples at once" if optional else "; 1 is on-policy"
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}{whole}")
    rounds = switches["resampling_rounds"]
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(
            f"resampling_rounds must be a whole number of at least 0, got {rounds!r}; 0 keeps all groups"
        )
    if switches["distribution"] not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {switches['distribution']!r}; "
            "conditional scores the logits without guidance"
        )


def check_slots(slots: Mapping[str, Callable[..., Any] | None], switches: Mapping[str, Any]) -> None:
    """Raises ValueError for a slot that is missing, cannot be called, or whose own check fails."""
    for name, keywords in SLOTS.items():
        slot = slots[name]
        if slot is None:
            _check_empty(name, switches)
            continue
        try:
            inspect.signature(slot).bind(**dict.fromkeys(keywords))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the slot {name} is called with the keywords {', '.join(keywords)}, got {slot!r} ({error}); "
                "fill it with a callable that takes them (an instance, not its class)"
            ) from error
        check = getattr(slot, "check", None)
        if check is not None:
            check(switches)
    if slots["beta_schedule"] is not None and switches["beta"] == 0:
        raise ValueError(
            "a beta_schedule multiplies beta, got beta=0; set beta above 0, or beta_schedule to null"
        )


def _check_empty(name: str, switches: Mapping[str, Any]) -> None:
    reweighted = switches["reweight_advantage"] or switches["reweight_kl"]
    idle = {
        "token_weights": not reweighted,
        "divergence": switches["beta"] == 0,
        "entropy_reward": switches["entropy_coefficient"] == 0,
    }
    if name in OPTIONAL or idle.get(name, False):
        return
    reason = {
        "token_weights": "when reweight_advantage or reweight_kl is true",
        "divergence": f"when beta is {switches['beta']}",
        "entropy_reward": f"when entropy_coefficient is {switches['entropy_coefficient']}",
    }.get(name, "always")
    raise ValueError(f"the slot {name} is needed {reason}, got null; fill it, or turn off what needs it")
