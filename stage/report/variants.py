"""The runs of an ablation by what differs between them, and everything about them that must not be averaged away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage.report.groups import algorithm_label, settings_of
from stage.report.read import Run

UNNAMED = "train"  # the name of a run that was given none


@dataclass(frozen=True)
class Finding:
    """Something wrong with the runs: `kind` in a few words, `text` with names and numbers."""

    kind: str
    text: str


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seed.

    `runs` are the whole ones by seed, which means are made of; `broken` those that are not, with the reason.
    """

    label: str
    settings: Mapping[str, str]
    runs: Mapping[int, Run]
    broken: Mapping[int, tuple[Run, str]]

    @property
    def seeds(self) -> list[int]:
        return sorted([*self.runs, *self.broken])

    def part(self, algorithm: bool) -> dict[str, str]:
        """The settings of the algorithm, or all others."""
        return {k: v for k, v in self.settings.items() if k.startswith("algorithm.") is algorithm}


def find_variants(runs: Sequence[Run], baseline: str | None) -> tuple[list[Variant], list[Finding]]:
    """Variants, that of the baseline first, and what is wrong with their runs.

    Versions of the code count as settings, so runs of two versions are never averaged. Of two runs with the same
    settings and seed the first counts.

    Args:
        baseline: label of a variant; None takes plain GRPO, or the first variant where there is none.

    Raises ValueError for a run without a configuration, or a baseline that is not there.
    """
    found: dict[tuple[tuple[str, str], ...], dict[int, Run]] = {}
    findings: list[Finding] = []
    for run in runs:
        if "seed" not in run.config:
            raise ValueError(
                f"{run.folder} has no config.yaml with a seed, so it belongs to no group; give run folders"
            )
        seed = int(run.config["seed"])
        members = found.setdefault(tuple(sorted({**dict(settings_of(run.config)), **_code(run)}.items())), {})
        if seed in members:
            findings.append(_twice(members[seed], run, seed))
        members.setdefault(seed, run)
    labels = label_variants([dict(key) for key in found], [list(m.values()) for m in found.values()])
    variants = [
        _variant(label, dict(key), members)
        for label, (key, members) in zip(labels, found.items(), strict=True)
    ]
    first = _baseline(variants, baseline)
    variants.sort(key=lambda variant: variant is not first)
    return variants, [*findings, *_versions(runs), *_missing(variants), *_broken(variants)]


def counterpart(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """What a variant is compared with: the baseline's algorithm under the variant's other settings.

    Where no such variant is there, or the variant has the baseline's algorithm itself, it is the baseline. None for the
    baseline.
    """
    baseline = variants[0]
    if variant is baseline:
        return None
    algorithm, others = baseline.part(algorithm=True), variant.part(algorithm=False)
    for other in variants:
        if other is not variant and other.part(algorithm=True) == algorithm and other.part(False) == others:
            return other
    return baseline


def fault(run: Run) -> str | None:
    """Why a run counts in no mean: it met a number that is not finite, or ended before its last update."""
    if run.not_finite is not None:
        metric, update = run.not_finite
        return f"diverged: {metric} is not finite in update {update}"
    if not run.curves:
        return None  # an evaluation alone
    last, planned = int(max(curve.x[-1] for curve in run.curves.values())), run.config.get("updates")
    if isinstance(planned, int) and last < planned:
        return f"stopped after update {last} of {planned}"
    return None


def label_variants(settings: Sequence[Mapping[str, str]], runs: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each variant: its algorithm, and of what else differs what few variants have.

    Algorithms with the same switches are told apart by the names of their experiments, or by their settings.
    """
    labels = [algorithm_label(members[0].config) for members in runs]
    names = [str(members[0].config.get("name", UNNAMED)) for members in runs]
    for label in set(labels):
        alike = [place for place, other in enumerate(labels) if other == label]
        parts = {tuple(sorted(_algorithm(settings[place]))) for place in alike}
        if len(parts) > 1 and len({names[place] for place in alike}) > 1:
            for place in alike:
                labels[place] = names[place]
    usual = _usual(settings)
    full = []
    for label, mine in zip(labels, settings, strict=True):
        others = [other for name, other in zip(labels, settings, strict=True) if name == label]
        apart = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
        telling = [key for key in apart if mine[key] != usual.get(key)]
        full.append(", ".join([label, *(_said(key, mine[key]) for key in telling[:3])]))
    for place, label in enumerate(full):  # what is usual here and there may still be two variants
        if full.count(label) > 1:
            others = [other for name, other in zip(full, settings, strict=True) if name == label]
            apart = [k for k, v in settings[place].items() if any(other.get(k) != v for other in others)]
            full[place] = ", ".join([label, *(_said(key, settings[place][key]) for key in apart[:3])])
    return full


def _algorithm(settings: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, value) for key, value in settings.items() if key.startswith("algorithm.")]


def _usual(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The value of each setting that most variants have; none where two are equally frequent."""
    usual = {}
    for key in {key for mine in settings for key in mine}:
        counts = Counter(mine[key] for mine in settings if key in mine).most_common(2)
        if len(counts) == 1 or counts[0][1] > counts[1][1]:
            usual[key] = counts[0][0]
    return usual


def _said(key: str, value: str) -> str:
    return f"code {value[:8]}" if key == "code" else f"{key.rpartition('.')[2]}={value}"


def _code(run: Run) -> dict[str, str]:
    """The versions of the code of a run as a setting; none where they are not known."""
    return {"code": "+".join(str(version["sha256"])[:12] for version in run.code)} if run.code else {}


def _variant(label: str, settings: Mapping[str, str], members: Mapping[int, Run]) -> Variant:
    reasons = {seed: fault(run) for seed, run in sorted(members.items())}
    whole = {seed: members[seed] for seed, reason in reasons.items() if reason is None}
    broken = {seed: (members[seed], reason) for seed, reason in reasons.items() if reason is not None}
    return Variant(label, settings, whole, broken)


def _baseline(variants: Sequence[Variant], wanted: str | None) -> Variant:
    if wanted is None:
        return next((variant for variant in variants if variant.label == "grpo"), variants[0])
    for variant in variants:
        if variant.label == wanted:
            return variant
    raise ValueError(f"no variant is called {wanted!r}; there are {', '.join(v.label for v in variants)}")


def _twice(first: Run, second: Run, seed: int) -> Finding:
    text = f"{first.folder} and {second.folder} have the same settings and seed {seed}; only the first counts"
    return Finding("the same run twice", text)


def _versions(runs: Sequence[Run]) -> list[Finding]:
    """Runs of more than one version of the code, known and unknown, in one table."""
    by_version: dict[str, list[Run]] = {}
    for run in runs:
        by_version.setdefault(_code(run).get("code", "unknown"), []).append(run)
    if len(by_version) < 2:
        return []
    told = [f"{_commit(of[0])} made {_names(of)}" for of in by_version.values()]
    return [
        Finding("mixed versions of the code", "; ".join(told) + ". They are not averaged with each other.")
    ]


def _commit(run: Run) -> str:
    if not run.code:
        return "an unknown version"
    words = [
        f"{version['sha256'][:8]}" + (f" (commit {version['commit'][:8]})" if version.get("commit") else "")
        for version in run.code
    ]
    return "version " + " and then ".join(words)


def _missing(variants: Sequence[Variant]) -> list[Finding]:
    every = sorted({seed for variant in variants for seed in variant.seeds})
    return [
        Finding("missing seeds", f"{variant.label} lacks {_list(lacking)} of {_list(every)}")
        for variant in variants
        if (lacking := [seed for seed in every if seed not in variant.seeds])
    ]


def _broken(variants: Sequence[Variant]) -> list[Finding]:
    return [
        Finding(
            "a run that is not whole", f"{v.label}, seed {seed} ({run.name}) {reason}; it counts in no mean"
        )
        for v in variants
        for seed, (run, reason) in v.broken.items()
    ]


def _names(runs: Sequence[Run]) -> str:
    shown = [run.name for run in runs[:6]]
    return ", ".join(shown) + (f" and {len(runs) - len(shown)} more" if len(runs) > len(shown) else "")


def _list(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)
