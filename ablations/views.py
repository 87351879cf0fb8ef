"""The report of a study: tables, sentences, figures, one web page that needs nothing else, and TensorBoard."""

from __future__ import annotations

import base64
import fcntl
import io
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd  # type: ignore[import-untyped]
import yaml

from msign_lightning.ablations import board, figures
from msign_lightning.ablations.cell import show
from msign_lightning.ablations.figures import Drawing
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.results import (
    FEWEST,
    LEVEL,
    Findings,
    Run,
    best,
    by_seed,
    factors_of,
    find,
    overheads,
    paired,
)
from msign_lightning.ablations.study import Bisect, Grid, Study, Tpe
from msign_lightning.recipes.provenance import provenance

MISSING = "–"
OPTIONAL = ("frontier.csv", "curves.png", "loss.png", "frontier.png", "frontier_map.png", "survival.png")
LOWEST = 10  # runs in the table of a search


def show_loss(loss: float, sign: str = "") -> str:
    """A loss or difference for people; of an exploded one only its magnitude is of interest."""
    if not math.isfinite(loss):
        return MISSING if math.isnan(loss) else "diverged"
    return f"{loss:{sign}.3f}" if abs(loss) < 100 else f"{loss:{sign}.3g}"


def tables(found: Findings) -> dict[str, pd.DataFrame]:
    """For people: title → table of text, without columns that say nothing."""
    study, results, baseline = found.study, found.results, found.baseline
    shown: dict[str, list[dict[str, str]]] = {}
    if isinstance(study.sampler, Tpe):
        lowest = found.table.dropna(subset="val_loss").nsmallest(LOWEST, "val_loss")
        shown[f"The lowest of {len(found.table)} runs"] = [
            {**_place(r), "seed": str(r.seed), "loss": show_loss(r.val_loss)} for r in lowest.itertuples()
        ]
    if isinstance(study.sampler, Grid):
        ranking = best(results)
        losses, sound = by_seed(ranking), ranking["n_stable"] == ranking["n_runs"]
        own = [i for i, group in ranking["group"].items() if group.arm == baseline][:1]
        gaps = (losses.drop(own) - losses.loc[own].mean()).dropna()  # none if the baseline is not ranked
        tests = {i: _interval(paired(gap if sound[[i, *own]].all() else [])) for i, gap in gaps.iterrows()}
        texts = {i: " / ".join(show_loss(d, "+") for d in gap) + tests[i] for i, gap in gaps.iterrows()}
        shown["Each arm at its best learning rate"] = [
            {
                **_place(r),
                "mean validation loss": show_loss(r.mean),
                f"difference to {baseline} by seed ({LEVEL:.0%} interval)": texts.get(r.Index, ""),
            }
            for r in ranking.itertuples()
        ]
    shown["Up to which learning rate training is stable"] = [
        {
            "arm": b.group.label,
            "LR_max": figures.bound(b),
            "interval": " … ".join(f"{end:.4g}" if 0 < end < math.inf else "?" for end in (b.low, b.high)),
            "probability that it holds LR_max": f"{b.confidence:.3g}" if b.n_seeds > 1 else "one seed's bracket",
            f"against {baseline}": b.verdict or MISSING,
            "seeds": str(b.n_seeds),
            "runs": str(b.n_runs),
            "LR sensitivity": MISSING if math.isnan(b.lr_sensitivity) else f"{b.lr_sensitivity:.3f}",
            "not monotone": f"{b.n_non_monotone} of {b.n_seeds} seeds" if b.n_non_monotone else "",
        }
        for b in found.boundaries.itertuples()
    ]
    if isinstance(study.sampler, Grid) and results["n_collapsed"].any():
        shown["How many runs collapsed or diverged, and when"] = [
            {
                **_place(r),
                "collapsed": f"{r.n_collapsed} of {r.n_runs}",
                "median step": f"{r.collapse_median:,.0f}" if r.n_collapsed else MISSING,
                "first … last": f"{r.collapse_first:,.0f} … {r.collapse_last:,.0f}" if r.n_collapsed else MISSING,
            }
            for r in results.itertuples()
        ]
    if isinstance(study.sampler, Grid):
        shown["Results"] = [_result(found, r) for r in results.itertuples()]
    shown["Arms"] = []
    for name in study.arms:
        settings = study.variants[name].settings if name in study.variants else {}
        extra = f" With {', '.join(f'{k} = {show(v)}' for k, v in settings.items())}." if settings else ""
        shown["Arms"].append({"arm": name, "what it is": study.arm(name).description + extra})
    frames = {title: pd.DataFrame(rows) for title, rows in shown.items() if rows}
    return {title: frame.loc[:, ~frame.isin(["", MISSING]).all()] for title, frame in frames.items()}


def _interval(test: Mapping[str, float]) -> str:
    """That of `paired`, if there is one."""
    low, high = (test[f"difference_{end}"] for end in ("low", "high"))
    return "" if math.isnan(low) else f" ({show_loss(low, '+')} … {show_loss(high, '+')})"


def _place(row: Any) -> dict[str, str]:
    return {"arm": row.group.label, "learning rate": f"{row.lr:.4g}"}


def _result(found: Findings, r: Any) -> dict[str, str]:
    """What a group gave at a learning rate, for people."""
    losses = by_seed(found.results)
    is_baseline = r.group.arm == found.baseline
    return {
        **_place(r),
        f"validation loss by seed ({', '.join(map(str, losses))})": " / ".join(map(show_loss, losses.loc[r.Index])),
        "stable": f"{r.n_stable} of {r.n_runs}",
        "mean": show_loss(r.mean),
        f"paired difference to {found.baseline} ({LEVEL:.0%} interval)": show_loss(r.difference, "+")
        + _interval(r._asdict())
        if r.n_pairs
        else "",
        f"better than {found.baseline}": "" if is_baseline else f"{r.n_better} of {r.n_pairs}",
        "verdict": r.verdict or ("" if is_baseline else MISSING),
        "stable rank at the end": MISSING if math.isnan(r.stable_rank) else f"{r.stable_rank:.1f}",
        "steps/s": f"{r.steps_per_second:,.1f}",
    }


def markdown(table: pd.DataFrame) -> str:
    """A table of text in Markdown."""
    lines = [list(table), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    escaped = ([text.replace("|", r"\|") for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def missing(found: Findings) -> list[str]:
    """What failed or is not trained yet: cells of a grid, groups of a bisection; of a search nothing is known."""
    if isinstance(found.study.sampler, Bisect):
        tried = set(found.table["group"])
        return [group.label for group in found.study.groups if group not in tried]
    done = set(found.table["key"])
    return [cell.label for key, cell in found.study.cells.items() if key not in done]


def sentences(found: Findings) -> list[str]:
    """What the tables do not say: counts, what is missing, when a run is stable, and what a verdict is worth."""
    study, table = found.study, found.table
    seeds, diverged, stable = sorted(set(table["seed"])), table["diverged_at"].count(), table["stable"].sum()
    told = [
        f"Runs of {study.steps} steps: {len(table)}, {stable} of them stable, {len(table) - stable - diverged} "
        f"unstable, {diverged} diverged. Seeds: {', '.join(map(str, seeds))}."
    ]
    if absent := missing(found):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        told.append(f"Without a result, failed or not trained yet: {', '.join(absent[:3])}{more}.")
    criterion = study.stability
    rules = [f"its last smoothed training loss is at most {criterion.delta:g} above its lowest and not above its first"]
    if criterion.max_loss is not None:
        rules.append(f"its {study.metric} is at most {criterion.max_loss:g}")
    if criterion.spikes_per_10k is not None:
        spike, often = f"rises {criterion.spike:g} above the running median", f"{criterion.spikes_per_10k:g} times"
        rules.append(f"its loss {spike} at most {often} in 10,000 steps")
    told.append(
        f"A run counts as stable if it stays finite and {', '.join(rules)}. That was seen for {study.steps} steps; "
        "longer runs may collapse later."
    )
    if isinstance(study.sampler, Grid):
        ranked = set(best(found.results)["group"])
        if unranked := [group.label for group in found.results["group"].unique() if group not in ranked]:
            told.append(f"Not ranked, since a seed has no finite result: {', '.join(unranked)}.")
    if tests := pd.concat([found.results, found.boundaries])["p"].count():
        where = " Losses are compared where all runs of both are stable." if isinstance(study.sampler, Grid) else ""
        told.append(
            f"If no arm differs from {found.baseline}, any of the {tests} verdicts together is higher or lower with a "
            f"probability of at most {1 - LEVEL:.0%}: paired t-tests over seeds, corrected by Holm's method.{where} "
            "Intervals hold each for itself."
        )
    elif len(seeds) < FEWEST and not isinstance(study.sampler, Tpe):
        told.append(f"There are no verdicts: they need at least {FEWEST} seeds.")
    told += [
        f"{group.label}: one application takes as long as {fit.ratio:.2f} steps, by a fit of T∞ / (1 + r/P) that is "
        f"{fit.error:.1%} off."
        for group, fit in overheads(table).items()
    ]
    return told


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
    drawings = [*figures.curves(study, runs, found.baseline), *figures.draw(found)]
    images = {drawing.name: _image(drawing, "png") for drawing in drawings}
    files = {
        "report.html": _page(found, drawings).encode(),
        "report.md": _markdown(found, drawings).encode(),
        "runs.csv": _csv(found.table),
        "results.csv": _csv(found.results),
        **({"frontier.csv": _csv(found.boundaries)} if len(found.boundaries) else {}),
        **{f"{name}.png": png for name, png in images.items()},
    }
    out = folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "report.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for others, as parents that end at the same moment
            out.mkdir(exist_ok=True)
            for name in OPTIONAL:
                (out / name).unlink(missing_ok=True)
            for name, content in files.items():
                (out / name).write_bytes(content)
            board.write(found.table, images, folder)
    except OSError as error:
        raise StudyError(f"folder must be one that can be written to, got {str(folder)!r}: {error.strerror}") from error
    return [out / name for name in files]


def _image(drawing: Drawing, form: str) -> bytes:
    """The figure as a file, the same for the same data."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _csv(frame: pd.DataFrame) -> bytes:
    """A table as CSV, with all digits and a column for each factor; what a row has not is empty."""
    rows = pd.concat([factors_of(frame["group"]), frame.drop(columns="group")], axis=1)
    text: str = rows.to_csv(index=False, lineterminator="\n")
    return text.encode()


def _markdown(found: Findings, drawings: Sequence[Drawing]) -> str:
    lines = [
        f"# Study {found.study.name}",
        f"Report written with {provenance()}.",
        "\n".join(f"- {sentence}" for sentence in sentences(found)),
        *(f"![{drawing.caption}]({drawing.name}.png)" for drawing in drawings),
        *(f"## {title}\n\n{markdown(table)}" for title, table in tables(found).items()),
    ]
    return "\n\n".join(lines) + "\n"


def _page(found: Findings, drawings: Sequence[Drawing]) -> str:
    """The web page, which needs no other file, network or script."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html").render(
        name=found.study.name,
        written=f"Report written with {provenance()}, lightning {version('lightning')}, optuna {version('optuna')}",
        sentences=sentences(found),
        images=[
            (d.caption, 4 * d.figure.get_figwidth(), base64.b64encode(_image(d, "svg")).decode()) for d in drawings
        ],
        tables=tables(found),
        missing=missing(found),
        settings=yaml.safe_dump(found.study.fingerprint(), sort_keys=False, allow_unicode=True),
    )
