"""The report of a study: tables, sentences, figures, one web page that needs nothing else, and TensorBoard.

A mean or difference stands for all seeds or is not given: it is never that of the runs which happened not to diverge.
"""

from __future__ import annotations

import base64
import fcntl
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import pandas as pd  # type: ignore[import-untyped]
import yaml

from msign_lightning.ablations import board, figures
from msign_lightning.ablations.cell import Group, show
from msign_lightning.ablations.figures import Drawing, bound
from msign_lightning.ablations.methods import PLAIN
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.results import (
    FEWEST,
    LEVEL,
    Boundary,
    Comparison,
    Result,
    Run,
    Verdict,
    best,
    frontier,
    judge,
    overheads,
    summarize,
    tabulate,
)
from msign_lightning.ablations.study import Bisect, Grid, Study, Tpe
from msign_lightning.recipes.provenance import provenance

MISSING = "–"
FIGURES = ("curves", "loss", "frontier", "frontier_map", "survival")
TEXTS = ("report.html", "report.md", "runs.csv", "results.csv", "frontier.csv")
_LOWEST = 10
"""Runs in the table of a search."""


class Table(NamedTuple):
    """A table for people: title and text."""

    title: str
    frame: pd.DataFrame

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [list(self.frame), ["---"] * len(self.frame.columns), *self.frame.to_numpy().tolist()]
        escaped = ([str(text).replace("|", r"\|") for text in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def html(self) -> str:
        """The table in HTML."""
        html: str = self.frame.to_html(index=False, border=0)
        return html


class Findings(NamedTuple):
    """What the runs of a study show.

    Attributes:
        study: The study.
        table: A row for each run.
        baseline: The arm with which others are compared.
        results: For each group and learning rate.
        boundaries: For each group of a grid over learning rates or of a bisection; none for other studies.
        verdicts: On each comparison with the baseline, of a result's losses or of a group's boundary.
    """

    study: Study
    table: pd.DataFrame
    baseline: str
    results: list[Result]
    boundaries: list[Boundary]
    verdicts: dict[object, tuple[Comparison, Verdict | None]]


def find(study: Study, runs: Sequence[Run]) -> Findings:
    """What the runs show: AdamW, or else the study's first arm that has runs, is the baseline.

    Raises:
        StudyError: There are no runs.
    """
    if not runs:
        raise StudyError(f"runs must hold at least one finished run to report study {study.name}, got none")
    place = {group: i for i, group in enumerate(study.groups)}
    runs = sorted(runs, key=lambda r: (place.get(r.cell.group, len(place)), r.cell.lr, r.cell.seed))
    table = tabulate(runs)
    baseline = next(arm for arm in (PLAIN, *study.arms) if arm in set(table["arm"]))
    results = summarize(table, baseline)
    rates = [float(lr) for lr in study.factors["lr"]] if isinstance(study.sampler, Grid) else []  # type: ignore[arg-type]
    is_several = table.groupby(["group", "seed"])["lr"].nunique().max() > 1
    boundaries = frontier(table, rates) if is_several and not isinstance(study.sampler, Tpe) else []
    compared: dict[object, Comparison] = {}
    if isinstance(study.sampler, Grid):  # others chose their learning rates by the losses
        compared |= {(r.group, r.lr): r.comparison for r in results if r.comparison is not None}
    for reference in boundaries:
        for b in boundaries:
            if reference.group.arm == baseline != b.group.arm and set(reference.group.factors) <= set(b.group.factors):
                comparison = b.against(reference)
                if comparison is not None:
                    compared[b.group] = comparison
    verdicts = judge(list(compared.values()))
    told = {what: (c, verdict) for (what, c), verdict in zip(compared.items(), verdicts, strict=True)}
    return Findings(study, table, baseline, results, boundaries, told)


# --- tables ------------------------------------------------------------------------------------------------------


def results_table(found: Findings) -> Table:
    """A row for each group and learning rate."""
    seeds = sorted({seed for result in found.results for seed in result.losses})
    by_seed = f"validation loss by seed ({', '.join(map(str, seeds))})"
    rows = []
    for r in found.results:
        is_baseline = r.group.arm == found.baseline
        losses = [MISSING if seed not in r.losses else show_loss(r.losses[seed], "diverged") for seed in seeds]
        rows.append(
            {
                "arm": r.group.label,
                "learning rate": f"{r.lr:.4g}",
                by_seed: " / ".join(losses),
                "stable": f"{r.stable} of {len(r.losses)}",
                "mean": show_loss(r.mean),
                f"paired difference to {found.baseline} ({LEVEL:.0%} interval)": _difference(r),
                f"better than {found.baseline}": "" if is_baseline else f"{r.better} of {len(r.baseline)}",
                "verdict": found.verdicts.get((r.group, r.lr), (None, None))[1] or ("" if is_baseline else MISSING),
                "stable rank at the end": MISSING if r.stable_rank is None else f"{r.stable_rank:.1f}",
                "steps/s": f"{r.steps_per_second:,.1f}",
            }
        )
    return Table("Results", pd.DataFrame(rows))


def show_loss(value: float | None, missing: str = MISSING, sign: str = "") -> str:
    """A loss or difference for people; of an exploded one only its magnitude is of interest."""
    if value is None:
        return missing
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.3g}"


def _difference(result: Result) -> str:
    """The mean difference to the baseline, with its interval if it has one: "-0.373 (-0.470 … -0.276)"."""
    gaps = [
        ours - theirs
        for seed, theirs in result.baseline.items()
        if theirs is not None and (ours := result.losses[seed]) is not None
    ]
    if not gaps or len(gaps) < len(result.baseline):
        return MISSING if result.baseline else ""
    mean = show_loss(sum(gaps) / len(gaps), sign="+")
    if result.comparison is None or len(gaps) < FEWEST:
        return mean
    low, high = (show_loss(end, sign="+") for end in result.comparison.interval())
    return f"{mean} ({low} … {high})"


def frontier_table(found: Findings) -> Table:
    """A row for each group."""
    rows = []
    for b in found.boundaries:
        ends = (f"{end:.3g}" if 0 < end < math.inf else "?" for end in (b.low, b.high))
        rows.append(
            {
                "arm": b.group.label,
                "LR_max": bound(b),
                "interval": " … ".join(ends),
                "probability that it holds LR_max": "one seed's bracket"
                if len(b.seeds) == 1
                else f"{b.confidence:.3g}",
                f"against {found.baseline}": found.verdicts.get(b.group, (None, None))[1] or MISSING,
                "seeds": len(b.seeds),
                "runs": b.n_runs,
                "LR sensitivity": MISSING if b.lr_sensitivity is None else f"{b.lr_sensitivity:.3f}",
                "not monotone": f"{len(b.non_monotone)} of {len(b.seeds)} seeds" if b.non_monotone else "",
            }
        )
    return Table("Up to which learning rate training is stable", pd.DataFrame(rows))


def best_table(found: Findings) -> Table:
    """Of a grid: each group at its own best learning rate, lowest loss first. Of a search: its lowest runs."""
    if isinstance(found.study.sampler, Tpe):
        lowest = found.table.dropna(subset="val_loss").nsmallest(_LOWEST, "val_loss")
        rows = [
            {"arm": r.group.label, "learning rate": f"{r.lr:.4g}", "seed": r.seed, "loss": show_loss(r.val_loss)}
            for r in lowest.itertuples()
        ]
        return Table(f"The lowest of {len(found.table)} runs", pd.DataFrame(rows))
    ranking = best(found.results)
    reference = next((b for b in ranking if b.group.arm == found.baseline), None)
    rows = []
    for b in ranking:
        theirs = {} if reference is None or b is reference else reference.losses
        gaps = [show_loss((b.losses[s] or 0) - (value or 0), sign="+") for s, value in theirs.items()]
        rows.append(
            {
                "arm": b.group.label,
                "learning rate": f"{b.lr:.4g}",
                "mean validation loss": show_loss(b.mean),
                f"difference to {found.baseline} by seed": " / ".join(gaps),
            }
        )
    return Table("Each arm at its best learning rate", pd.DataFrame(rows))


def arms_table(study: Study) -> Table:
    """What each arm of the study is."""
    rows = []
    for name in study.arms:
        settings = study.variants[name].settings if name in study.variants else {}
        extra = f" With {', '.join(f'{k} = {show(v)}' for k, v in settings.items())}." if settings else ""
        rows.append({"arm": name, "what it is": study.arm(name).description + extra})
    return Table("Arms", pd.DataFrame(rows))


def missing(found: Findings) -> list[str]:
    """What failed or is not trained yet: cells of a grid, groups of a bisection; of a search nothing is known."""
    if isinstance(found.study.sampler, Bisect):
        tried = set(found.table["group"])
        return [group.label for group in found.study.groups if group not in tried]
    done = set(found.table["key"])
    return [cell.label for key, cell in found.study.cells.items() if key not in done]


def _csv(frame: pd.DataFrame) -> str:
    """A table as CSV, with all digits; what a row has not is empty."""
    for name in frame.columns.intersection(["diverged_at", "collapsed_at", "period"]):
        frame = frame.assign(**{name: frame[name].astype("Int64")})
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text


def _record(found: Findings, group: Group, what: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file: a group, values, and the test against the baseline."""
    comparison, verdict = found.verdicts.get(what, (None, None))
    low, high = (None, None) if comparison is None else comparison.interval()
    test = {"p": comparison and comparison.p, "difference_low": low, "difference_high": high, "verdict": verdict}
    return {"arm": group.arm, **{name: show(value) for name, value in group.factors}, **values, **test}


def results_csv(found: Findings) -> str:
    """A row for each group and learning rate; the losses of seed n in val_loss_n, "diverged" where it did."""
    rows = []
    for r in found.results:
        losses = {f"val_loss_{s}": "diverged" if v is None else v for s, v in sorted(r.losses.items())}
        counts = {"n_runs": len(r.losses), "n_stable": r.stable, "n_pairs": len(r.baseline), "n_better": r.better}
        means = {"mean": r.mean, "stable_rank": r.stable_rank, "steps_per_second": r.steps_per_second}
        rows.append(_record(found, r.group, (r.group, r.lr), {"lr": r.lr, **losses, **means, **counts}))
    return _csv(pd.DataFrame(rows))


def frontier_csv(found: Findings) -> str:
    """A row for each group."""
    rows = []
    for b in found.boundaries:
        own = {name: value for name, value in b._asdict().items() if name not in ("group", "seeds")}
        counts = {"n_seeds": len(b.seeds), "n_non_monotone": len(b.non_monotone)}
        rows.append(_record(found, b.group, b.group, {**own, **counts}))
    return _csv(pd.DataFrame(rows))


# --- sentences ---------------------------------------------------------------------------------------------------


def sentences(found: Findings) -> list[str]:
    """What the runs show, whatever it is."""
    return [
        *_counts(found),
        _criterion(found.study),
        *(_ranking(found) if isinstance(found.study.sampler, Grid) else []),
        *_verdicts(found),
        *_rule(found),
        *(
            f"{group.label}: one application takes as long as {fit.ratio:.2f} steps, by a fit of T∞ / (1 + r/P) that "
            f"is {fit.error:.1%} off."
            for group, (fit, _) in overheads(found.table).items()
        ),
    ]


def _counts(found: Findings) -> list[str]:
    table = found.table
    seeds = table["seed"].nunique()
    diverged = int(table["diverged_at"].notna().sum())
    stable = int(table["stable"].sum())
    told = [
        f"{_many(len(table), 'run')} of {found.study.steps} steps over {_many(seeds, 'seed')}: {stable} stable, "
        f"{len(table) - stable - diverged} unstable, {diverged} diverged."
    ]
    if absent := missing(found):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        told.append(f"Without a result, failed or not trained yet: {', '.join(absent[:3])}{more}.")
    return told


def _criterion(study: Study) -> str:
    criterion = study.stability
    rules = [
        f"its last smoothed training loss is at most {criterion.delta:g} above its lowest, and not above its first"
    ]
    if criterion.max_loss is not None:
        rules.append(f"its {study.metric} is at most {criterion.max_loss:g}")
    if criterion.spikes_per_10k is not None:
        rules.append(
            f"its loss rises {criterion.spike:g} above the running median at most {criterion.spikes_per_10k:g} times "
            "in 10,000 steps"
        )
    return (
        f"A run counts as stable if it stays finite and {', '.join(rules)}. That was seen for {study.steps} steps; "
        "longer runs may collapse later."
    )


def _ranking(found: Findings) -> list[str]:
    """Who is first, where the baseline is, and how far MSign got: a description, without a verdict."""
    ranking = best(found.results)
    if len(ranking) < 2:
        return []
    is_ours = [found.study.arm(b.group.arm).until is not None for b in ranking]
    first_of_ours = [is_ours.index(True)] if any(is_ours) else []
    baselines = [i for i, b in enumerate(ranking) if b.group.arm == found.baseline]
    places = [
        f"{ranking[i].group.label} is number {i + 1} ({show_loss(ranking[i].mean)} at {ranking[i].lr:.3g})"
        for i in sorted({0, *baselines, *first_of_ours})
    ]
    told = f"Of the {len(ranking)} compared, each at the learning rate that is best for it on these very seeds"
    compared = {b.group for b in ranking}
    absent = dict.fromkeys(r.group.label for r in found.results if r.group not in compared)
    missing = [f"Not compared, since a seed has no finite result: {', '.join(absent)}."] if absent else []
    return [f"{told}, {'; '.join(places)}.", *missing]


def _verdicts(found: Findings) -> list[str]:
    """One sentence for each learning rate of a grid, and one for the boundaries of each group of the baseline."""
    lines = []
    if isinstance(found.study.sampler, Grid):
        for lr in sorted({r.lr for r in found.results}):
            places: dict[str, list[str]] = {}
            for r in found.results:
                if r.lr == lr and r.baseline:
                    verdict = found.verdicts.get((r.group, lr), (None, None))[1]
                    place = verdict or ("no verdict" if r.comparison is not None else "not all runs of both stable")
                    stable = "" if r.comparison is not None else f" ({r.stable} of {len(r.losses)} stable)"
                    places.setdefault(place, []).append(
                        f"{r.group.label} {_difference(r)}{stable}".replace(f" {MISSING}", "")
                    )
            if places:
                lines.append(f"Loss against {found.baseline}, at a learning rate of {lr:.3g}: {_told(places)}.")
    for reference in found.boundaries:
        places = {}
        same = set(reference.group.factors)
        for b in found.boundaries:
            if reference.group.arm == found.baseline != b.group.arm and same <= set(b.group.factors):
                verdict = found.verdicts.get(b.group, (None, None))[1]
                places.setdefault(verdict or "no verdict", []).append(f"{b.group.label} {bound(b)}")
        if places:
            limit = f"{reference.group.label} is stable up to a learning rate of {bound(reference)}"
            lines.append(f"{limit}. Against it: {_told(places)}.")
    if strange := [b.group.label for b in found.boundaries if b.non_monotone]:
        lines.append(f"A stable run is above an unstable one, so there is no sharp boundary: {', '.join(strange)}.")
    return lines


def _told(places: dict[str, list[str]]) -> str:
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in sorted(places.items(), reverse=True))


def _rule(found: Findings) -> list[str]:
    if not found.verdicts:
        return []
    tested = sum(len(comparison.differences) >= FEWEST for comparison, _ in found.verdicts.values())
    if not tested:
        return [f"There are no verdicts: they need at least {FEWEST} seeds."]
    return [
        f"If no arm differs from {found.baseline}, any of the {tested} verdicts together is higher or lower with a "
        f"probability of at most {1 - LEVEL:.0%}: paired t-tests over seeds, corrected by Holm's method. Intervals "
        "hold each for itself."
    ]


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


# --- files -------------------------------------------------------------------------------------------------------


def report(study: Study, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Writes all views of a study's runs, in place of those of an earlier report.

    Args:
        study: The study.
        runs: What it gave so far.
        folder: Its folder. The web page report.html, report.md, CSV files and figures go to folder / "report", what
            TensorBoard needs to the folder and those of the cells in it. No file but these is touched.

    Returns:
        The files, the web page first, without those for TensorBoard.

    Raises:
        StudyError: There are no runs, or the folder can't be written to.
    """
    found = find(study, runs)
    drawings = [
        *figures.curves(study, runs, found.baseline),
        *figures.draw(study, found.table, found.boundaries, found.baseline),
    ]
    ranked = not isinstance(study.sampler, Bisect) and len(found.table.dropna(subset="val_loss"))
    tables = [
        *([best_table(found)] if ranked else []),
        *([frontier_table(found)] if found.boundaries else []),
        *([] if isinstance(study.sampler, Tpe) else [results_table(found)]),
        arms_table(study),
    ]
    texts = {
        "report.html": _page(found, drawings, tables),
        "report.md": _markdown(found, drawings, tables),
        "runs.csv": _csv(found.table.drop(columns=["group", "clipped_loss"])),
        "results.csv": results_csv(found),
        **({"frontier.csv": frontier_csv(found)} if found.boundaries else {}),
    }
    images = {drawing.name: _image(drawing, "png") for drawing in drawings}
    out = folder / "report"
    try:
        with _alone(folder):
            out.mkdir(exist_ok=True)
            for name in (*TEXTS, *(f"{name}.png" for name in FIGURES)):
                (out / name).unlink(missing_ok=True)
            for name, text in texts.items():
                (out / name).write_text(text, encoding="utf-8")
            for name, png in images.items():
                (out / f"{name}.png").write_bytes(png)
            board.write(runs, images, folder)
    except OSError as error:
        raise StudyError(f"folder must be one that can be written to, got {str(folder)!r}: {error.strerror}") from error
    return [out / name for name in (*texts, *(f"{name}.png" for name in images))]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for other processes that write a report to the folder, such as parents that end at the same moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _image(drawing: Drawing, form: str) -> bytes:
    """The figure as a file, the same for the same data."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _markdown(found: Findings, drawings: Sequence[Drawing], tables: Sequence[Table]) -> str:
    lines = [
        f"# Study {found.study.name}",
        f"Report written with {provenance()}.",
        "\n".join(f"- {sentence}" for sentence in sentences(found)),
    ]
    lines += [f"![{drawing.caption}]({drawing.name}.png)" for drawing in drawings]
    for table in tables:
        lines += [f"## {table.title}", table.markdown()]
    return "\n\n".join(lines) + "\n"


def _page(found: Findings, drawings: Sequence[Drawing], tables: Sequence[Table]) -> str:
    """The web page, which needs no other file, network or script."""
    seeds = sorted(set(found.table["seed"]))
    facts = [
        f"{_many(len(found.table), 'run')} of {found.study.steps} steps",
        f"{_many(len(seeds), 'seed')}: {', '.join(map(str, seeds))}",
        f"Report written with {provenance()}, lightning {version('lightning')}, optuna {version('optuna')}",
    ]
    images = [
        (drawing.caption, 4 * drawing.figure.get_figwidth(), base64.b64encode(_image(drawing, "svg")).decode("ascii"))
        for drawing in drawings
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html").render(
        name=found.study.name,
        facts=facts,
        sentences=sentences(found),
        images=images,
        tables=tables,
        missing=missing(found),
        settings=yaml.safe_dump(found.study.fingerprint(), sort_keys=False, allow_unicode=True),
    )
