"""Look into one rollout of a checkpoint. `python -m stage.diagnose --help` says what can be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from stage import launch

if TYPE_CHECKING:
    from stage.objective.credit import Credit
    from stage.rollout import Distribution
    from stage.subject import Subject
    from stage.types import Prompt, Rollout

LEAST = {"prompts": 1, "group_size": 2, "maps": 0}


@hydra.main(config_path="../conf", config_name="diagnose", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        diagnose(config)


def diagnose(config: DictConfig) -> Path:
    """Draw one rollout, count, draw maps, and write what was found; return the folder."""
    check(config)
    # Imported here, so that --help and mistakes on the command line are answered at once.
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from stage.group_draws import Stopwatch
    from stage.rollout import collect, scored_distribution
    from stage.subject import choose_device, find_subjects, recorded

    launch.quiet_libraries()
    overrides = HydraConfig.get().overrides.task
    subjects, device = find_subjects(config, overrides), choose_device(config.device)
    trained = subjects.trained_with or {}
    parts = {name: recorded(name, config, trained, overrides) for name in ("algorithm", "reward", "data")}
    weighted, plain = (instantiate(switched(parts["algorithm"], on)) for on in (True, False))
    subject = subjects.tuned or subjects.base
    folder = output_folder(config.output, subject)
    policy = subject.load(device, trainable=True)
    sampler, scorer = instantiate(subjects.sampler), instantiate(parts["reward"])
    rollout = collect(
        policy,
        subjects.base.load(device),
        sampler,
        scorer,
        weighted,
        spread_prompts(instantiate(parts["data"]).validation, config.prompts),
        update=0,
        seed=config.seed,
        group_size=config.group_size,
        differentiable=False,
        beside=False,
        watch=Stopwatch(device),
    ).rollout
    credits = weighted.credit(rollout)[0], plain.credit(rollout)[0]
    found = counted(rollout, credits[0], tuple(config.edges))
    if config.gradients:
        distribution = scored_distribution(weighted, sampler)
        found["gradients"] = compared(
            policy, (weighted, plain), rollout, credits, distribution, config.parameters
        )
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder, rollout, credits[0], found, config.maps)
    write(folder, found, subject)
    print(f"diagnosis in {launch.short(folder)}", flush=True)
    return folder


def check(config: Any) -> None:
    """Raise ValueError for numbers that no rollout can have."""
    for name, least in LEAST.items():
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")


def switched(algorithm: Mapping[str, Any], on: bool) -> dict[str, Any]:
    """The configuration of an algorithm with STAGE's weights on or off, for a rollout without resampling."""
    return {
        **algorithm,
        "reweight_advantage": on,
        "reweight_kl": on and algorithm.get("beta") != 0,
        "resampling_rounds": 0,
        "micro_batch": None,
    }


def spread_prompts(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """`count` prompts spread evenly over a list, all of them where it is shorter."""
    count = min(count, len(prompts))
    return tuple(prompts[position * len(prompts) // count] for position in range(count))


def output_folder(asked: str | None, subject: Subject) -> Path:
    """Where to write: what was asked for, or beside the evaluations of the checkpoint's run."""
    if asked is not None:
        return Path(asked).expanduser()
    path = Path(subject.path)
    if subject.checkpoint is not None and path.parent.name == "checkpoints":
        return path.parent.parent / "diagnosis" / path.stem
    return Path("outputs") / "diagnosis" / f"{path.stem}-{subject.sha256[:8]}"


def counted(rollout: Rollout, credit: Credit, edges: tuple[float, ...]) -> dict[str, Any]:
    """Conflicts by similarity and what the weights do, as plain values."""
    from stage.diagnostics.conflict import conflict_by_similarity
    from stage.diagnostics.weights import alignment, pull_of, weight_use

    assert credit.similarity is not None and credit.token_weights is not None
    kl_weights = (
        credit.similarity.new_ones(credit.similarity.shape)
        if credit.kl_weights is None
        else credit.kl_weights
    )
    conflict = conflict_by_similarity(credit.advantages, rollout.codes, rollout.tokens, edges)
    use = weight_use(credit.similarity, credit.token_weights, kl_weights, credit.advantages, rollout.tokens)
    pull = pull_of(credit.similarity, credit.token_weights, credit.advantages, rollout.old.logps)
    teaching = (credit.advantages != 0).any(dim=-1).double().mean()
    return {
        "prompts": len(rollout.prompts),
        "samples": rollout.tokens.shape[1],
        "teaching": float(teaching),
        "conflict": {
            "edges": list(conflict.edges),
            "pairs": conflict.pairs.tolist(),
            "opposed": conflict.opposed.tolist(),
            "same": conflict.same,
            "same_opposed": conflict.same_opposed,
        },
        "weights": None if use is None else asdict(use),
        "pull": None if pull is None else asdict(pull),
        "similarity_with_entropy": alignment(credit.similarity, rollout.old.entropy),
    }


def compared(
    policy: Any,
    objectives: tuple[Any, Any],
    rollout: Rollout,
    credits: tuple[Credit, Credit],
    distribution: Distribution,
    pattern: str | None,
) -> dict[str, Any]:
    """Gradients of the policy term of each sample, with the weights and without them."""
    from stage.diagnostics.gradients import (
        agreement,
        chosen_parameters,
        cosine,
        mean_sample_cosine,
        sample_gradients,
    )

    chosen = chosen_parameters(policy, pattern)
    weighted, plain = (
        sample_gradients(policy, objective, rollout, credit, distribution, chosen, with_kl=False)
        for objective, credit in zip(objectives, credits, strict=True)
    )
    return {
        "parameters": sum(parameter.numel() for parameter in chosen),
        "with": asdict(agreement(weighted, credits[0].advantages)),
        "without": asdict(agreement(plain, credits[1].advantages)),
        "cosine_of_samples": mean_sample_cosine(weighted, plain),
        "cosine_of_sums": cosine(weighted.sum(dim=(0, 1)), plain.sum(dim=(0, 1))),
        "length_ratio": float(
            weighted.sum(dim=(0, 1)).norm() / plain.sum(dim=(0, 1)).norm().clamp_min(1e-30)
        ),
    }


def draw(folder: Path, rollout: Rollout, credit: Credit, found: Mapping[str, Any], maps: int) -> None:
    """conflict.png, and maps_N.png of the prompts whose rewards differ most."""
    from stage.diagnostics.maps import Layer, conflict_chart, map_sheet
    from stage.objective.advantage import task_rewards

    conflict = found["conflict"]
    shares = [
        o / p if p else float("nan") for o, p in zip(conflict["opposed"], conflict["pairs"], strict=True)
    ]
    chart = conflict_chart({"all tokens": shares}, conflict["edges"], conflict["pairs"])
    chart.savefig(folder / "conflict.png", dpi=130)
    rewards = task_rewards(rollout.scores).cpu()
    order = rewards.std(dim=-1).argsort(descending=True, stable=True)[:maps].tolist()
    top = float(rollout.old.entropy.quantile(0.99))
    for number, p in enumerate(order, start=1):
        assert credit.similarity is not None and credit.token_weights is not None
        layers = [
            Layer("similarity s", credit.similarity[p], -1, 1, "coolwarm"),
            Layer("advantage weight w", credit.token_weights[p], 0, 1, "viridis"),
            *(
                []
                if credit.kl_weights is None
                else [Layer("KL weight m", credit.kl_weights[p], 0.5, 1, "cividis")]
            ),
            Layer("entropy, nats", rollout.old.entropy[p], 0, max(top, 1e-6), "magma"),
        ]
        captions = [
            f"r {reward:.2f}\nA {advantage:+.2f}"
            for reward, advantage in zip(rewards[p].tolist(), credit.advantages[p].tolist(), strict=True)
        ]
        sheet = map_sheet(rollout.images[p], layers, captions, rollout.prompts[p].text)
        sheet.savefig(folder / f"maps_{number}.png", dpi=110)


def write(folder: Path, found: Mapping[str, Any], subject: Subject) -> None:
    """diagnosis.json and diagnosis.md."""
    import json

    from stage.benchmarks.images import write_atomic
    from stage.diagnostics.words import sentences

    record = {"checkpoint": subject.path, "sha256": subject.sha256, "update": subject.update, **found}
    write_atomic(folder / "diagnosis.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(folder / "diagnosis.md", "\n".join(sentences(record)).encode())


if __name__ == "__main__":
    launch.run(main)
