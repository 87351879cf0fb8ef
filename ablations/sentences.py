"""From the runs of a study to sentences, which say what the runs show, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from msign_lightning.ablations.frontier import LEVEL, Boundary, PairedDifference, Run
from msign_lightning.ablations.study import Grid, Study
from msign_lightning.ablations.tables import (
    Best,
    Result,
    best,
    bound,
    interval,
    missing,
    overheads,
    pairs,
    results,
    show_loss,
)


def summarize(study: Study, runs: Sequence[Run], baseline: str, boundaries: Sequence[Boundary] = ()) -> list[str]:
    """What the runs show, in sentences.

    Args:
        study: Their study.
        runs: At least one.
        baseline: The arm with which others are compared.
        boundaries: Those of `frontier`, if that means something for the study.

    Raises:
        ValueError: No run is of the baseline.
    """
    found = results(runs, baseline)
    grid = isinstance(study.sampler, Grid)  # else few learning rates were tried by several arms, and none on purpose
    return [
        *_counts(study, runs),
        _criterion(study),
        *_ranking(study, found, baseline),
        *(_differences(found, baseline, len({run.cell.seed for run in runs})) if grid else []),
        *_frontier(boundaries, baseline),
        *_throughput(runs),
    ]


def _counts(study: Study, runs: Sequence[Run]) -> list[str]:
    seeds = len({run.cell.seed for run in runs})
    diverged = sum(run.outcome.diverged_at is not None for run in runs)
    stable = sum(run.stable for run in runs)
    sentences = [
        f"{_many(len(runs), 'run')} of {study.steps} steps over {_many(seeds, 'seed')}: {stable} stable, "
        f"{len(runs) - stable - diverged} unstable, {diverged} diverged."
    ]
    if absent := missing(study, runs):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        sentences.append(f"Without a result, failed or not trained yet: {', '.join(absent[:3])}{more}.")
    if seeds == 1:
        sentences.append("One seed says nothing about others: differences have no intervals.")
    return sentences


def _criterion(study: Study) -> str:
    criterion = study.criterion
    rules = [
        f"its last smoothed training loss is at most {criterion.delta:g} nats per token above its lowest, and not "
        "above its first"
    ]
    if criterion.max_loss is not None:
        rules.append(f"its validation loss is at most {criterion.max_loss:g} nats per token")
    if criterion.spikes_per_10k is not None:
        rules.append(
            f"its loss rises {criterion.spike:g} above the running median at most {criterion.spikes_per_10k:g} times "
            "in 10,000 steps"
        )
    return (
        f"A run counts as stable if it stays finite and {', '.join(rules)}. That was seen for {study.steps} steps; "
        "longer runs may collapse later."
    )


def _ranking(study: Study, found: Sequence[Result], baseline: str) -> list[str]:
    """Who is first, where the baseline is, and what beats MSign."""
    ranking = best(found, study.sampler)
    if len(ranking) < 2:
        return []
    places = [f"{ranking[0].group.label} ends lowest{_with(ranking[0])}"]
    for number, b in enumerate(ranking[1:], start=2):
        if b.group.arm == baseline:
            places.append(f"{b.group.label} is number {number}{_with(b)}")
    sentences = [
        f"Of the {len(ranking)} compared, each at the learning rate that is best for it on these seeds"
        f"{'' if isinstance(study.sampler, Grid) else ', of those that the sampler chose for it'}, {'; '.join(places)}."
    ]
    compared = {b.group for b in ranking}
    if absent := dict.fromkeys(r.group.label for r in found if r.group not in compared):
        sentences.append(f"Not compared, since a seed has no finite result: {', '.join(absent)}.")
    ours = [b for b in ranking if study.arm(b.group.arm).until is not None]
    others = [b for b in ranking if b not in ours]
    if not ours or not others:
        return sentences
    first = ours[0].group.label + (f" (the best of {len(ours)} with it)" if len(ours) > 1 else "")
    lower = ", ".join(_gap(b, ours[0]) for b in others if b.mean < ours[0].mean)
    if lower:
        return [*sentences, f"Without MSign, these have a lower mean than its best, {first}: {lower}."]
    return [*sentences, f"Nothing without MSign has a lower mean than {first}; next is {_gap(others[0], ours[0])}."]


def _with(b: Best) -> str:
    return f", with {show_loss(b.mean)}{'' if b.lr is None else f' at {b.lr:.3g}'}"


def _gap(theirs: Best, ours: Best) -> str:
    gaps = [theirs.losses[seed] - ours.losses[seed] for seed in theirs.losses if seed in ours.losses]
    if not gaps:
        return f"{theirs.group.label} (on other seeds)"
    spread = f" (by seed {show_loss(min(gaps), '+')} … {show_loss(max(gaps), '+')})" if len(gaps) > 1 else ""
    return f"{theirs.group.label} {show_loss(fmean(gaps), '+')}{spread}"


def _differences(found: Sequence[Result], baseline: str, seeds: int) -> list[str]:
    """One sentence for each learning rate at which an arm and the baseline were trained with every seed."""
    every = "on every seed" if seeds > 1 else "on the only seed"
    better, worse, undecided, unstable = f"better {every}", f"worse {every}", "undecided", f"unstable as {baseline}"
    sentences = []
    for lr in sorted({result.lr for result in found}):
        at_lr = [result for result in found if result.lr == lr]
        baseline_stable = any(_is_stable_once(result) for result in at_lr if result.group.arm == baseline)
        verdicts: dict[str, list[str]] = {verdict: [] for verdict in (better, worse, undecided, unstable)}
        for result in at_lr:
            difference = result.difference
            if difference is None or pairs(difference) < seeds:
                continue
            if not baseline_stable and not _is_stable_once(result):
                verdicts[unstable].append(result.group.label)
                continue
            one_sided = {difference.n_better: better, difference.n_worse: worse}
            verdict = one_sided.get(pairs(difference), undecided)
            verdicts[verdict].append(f"{result.group.label} {_by(difference)}")
        told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items() if names)
        if told:
            sentences.append(f"Against {baseline}, at a learning rate of {lr:.3g}, {told}.")
    if sentences and seeds > 1:
        sentences.append(
            f"In parentheses after differences: {LEVEL:.0%} intervals over paired seeds, each for itself. By chance "
            f"alone, one of two equal arms is better on every one of {seeds} seeds with probability "
            f"{2 ** (1 - seeds):.2g}."
        )
    return sentences


def _is_stable_once(result: Result) -> bool:
    return any(run.stable for run in result.runs.values())


def _by(difference: PairedDifference) -> str:
    counts = (
        (difference.n_diverged, "diverged where the baseline did not"),
        (difference.n_baseline_diverged, "did not diverge where the baseline did"),
        (difference.n_both_diverged, "diverged with the baseline"),
    )
    told = [f"[{what} on {_many(count, 'seed')}]" for count, what in counts if count]
    return " ".join([*([] if difference.mean is None else [interval(difference)]), *told])


def _frontier(boundaries: Sequence[Boundary], baseline: str) -> list[str]:
    """How the others' boundaries stand to the baseline's."""
    sentences = []
    for reference in boundaries:
        same = set(reference.group.factors)
        places: dict[str, list[str]] = {}
        for b in boundaries:
            if reference.group.arm != baseline or b.group.arm == baseline or not same <= set(b.group.factors):
                continue
            apart = "higher" if b.low >= reference.high else "lower" if b.high <= reference.low else None
            place = "undecided" if apart is None else f"{apart}, with intervals apart"
            places.setdefault(place, []).append(f"{b.group.label} {bound(b)}")
        if places:
            told = "; ".join(f"{place}: {', '.join(names)}" for place, names in places.items())
            sentences.append(f"{reference.group.label} is stable up to a learning rate of {bound(reference)}; {told}.")
    if sentences:
        level = min(b.confidence for b in boundaries)
        sentences.append(
            f"An interval of LR_max holds it with a probability of {level:.3g} or more."
            if level > 0
            else "An interval of LR_max over one seed lies between two runs and says nothing about other seeds."
        )
    if strange := [b.group.label for b in boundaries if b.non_monotone]:
        sentences.append(f"A stable run is above an unstable one, so there is no sharp boundary: {', '.join(strange)}.")
    return sentences


def _throughput(runs: Sequence[Run]) -> list[str]:
    return [
        f"{group.label}: one application takes as long as {fit.ratio:.2f} steps, by a fit of T∞ / (1 + r/P) that is "
        f"{fit.error:.1%} off{'' if fit.ratio > 0 else ': too noisy to see its cost'}."
        for group, fit in overheads(runs).items()
    ]


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
