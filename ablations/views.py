"""The report of a study: figures, tables, sentences, one web page that needs nothing else, and TensorBoard."""

from __future__ import annotations

import base64
import fcntl
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import yaml
from matplotlib.figure import Figure

from msign_lightning.ablations import board, figures
from msign_lightning.ablations.frontier import Boundary, Run, frontier, survival
from msign_lightning.ablations.sentences import summarize
from msign_lightning.ablations.study import Study, StudyError, Tpe
from msign_lightning.ablations.tables import (
    Table,
    arms_table,
    best,
    best_table,
    frontier_csv,
    frontier_table,
    missing,
    results,
    results_csv,
    results_table,
    runs_csv,
)
from msign_lightning.recipes.provenance import provenance

BASELINE = "adamw"


class Drawing(NamedTuple):
    """A figure with a name for its file and a caption."""

    name: str
    caption: str
    figure: Figure


def report(study: Study, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Writes all views of a study's runs, in place of those of an earlier report.

    Args:
        study: The study.
        runs: What it gave so far.
        folder: Its folder. The web page report.html, report.md, CSV files and figures go to folder / "report", which is
            made anew, what TensorBoard needs to the folder and those of the cells in it.

    Returns:
        The files, the web page first, without those for TensorBoard.

    Raises:
        StudyError: There are no runs, or the folder can't be written to.
    """
    if not runs:
        raise StudyError(f"runs must hold at least one finished run to report study {study.name}, got none")
    place = {group: i for i, group in enumerate(study.groups())}
    runs = sorted(runs, key=lambda r: (place.get(r.cell.group, len(place)), r.cell.lr, r.cell.seed))
    baseline = find_baseline(study, runs)
    boundaries = find_boundaries(study, runs)
    found = results(runs, baseline)
    drawings = draw(study, runs)
    sentences = summarize(study, runs, baseline, boundaries)
    ranking = best(found, study.sampler)
    tables = [
        *([best_table(ranking, baseline)] if ranking else []),
        *([frontier_table(boundaries)] if boundaries else []),
        results_table(found, baseline),
        arms_table(study),
    ]
    texts = {
        "report.html": render(study, runs, sentences, drawings, tables),
        "report.md": _markdown(study, sentences, drawings, tables),
        "runs.csv": runs_csv(runs),
        "results.csv": results_csv(found),
        **({"frontier.csv": frontier_csv(boundaries)} if boundaries else {}),
    }
    images = {drawing.name: _image(drawing, "png") for drawing in drawings}
    out = folder / "report"
    try:
        with _alone(folder):
            if out.exists():
                shutil.rmtree(out)
            out.mkdir()
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


def find_baseline(study: Study, runs: Sequence[Run]) -> str:
    """The arm with which others are compared: AdamW, or else the study's first arm that has runs."""
    trained = {run.cell.arm for run in runs}
    return next(arm for arm in (BASELINE, *study.arms) if arm in trained)


def find_boundaries(study: Study, runs: Sequence[Run]) -> list[Boundary]:
    """Those of `frontier` for a grid over learning rates or a bisection; none for other studies."""
    tried: dict[object, set[float]] = {}
    for run in runs:
        tried.setdefault((run.cell.group, run.cell.seed), set()).add(run.cell.lr)
    several = any(len(rates) > 1 for rates in tried.values())
    return frontier(runs) if several and not isinstance(study.sampler, Tpe) else []


def find_comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs with a learning rate and seed that all groups have."""
    tried: dict[object, set[tuple[float, int]]] = {}
    for run in runs:
        tried.setdefault(run.cell.group, set()).add((run.cell.lr, run.cell.seed))
    common = set.intersection(*tried.values())
    return [run for run in runs if (run.cell.lr, run.cell.seed) in common]


def draw(study: Study, runs: Sequence[Run]) -> list[Drawing]:
    """The figures for which there are data."""
    baseline = find_baseline(study, runs)
    boundaries = find_boundaries(study, runs)
    drawings = [
        Drawing(
            "loss",
            "Validation loss against peak learning rate. Lines are means over seeds, bands reach from the lowest to "
            "the highest; where seeds have learning rates of their own, each has a thin line.",
            figures.loss(runs, baseline),
        )
    ]
    if boundaries:
        text = "Up to which learning rate training is stable, with intervals; arrows where no run shows an end."
        drawings.append(Drawing("frontier", text, figures.frontier(boundaries)))
    if (figure := figures.frontier_map(boundaries)) is not None:
        drawings.append(Drawing("frontier_map", "Highest stable learning rate by period and targets.", figure))
    comparable = find_comparable(runs)
    curves = survival(comparable)
    if any(curve.n_collapsed for curve in curves):
        text = (
            f"Share of runs that have not collapsed, by Kaplan and Meier; {curves[0].n_runs} runs in each group, with "
            "the same learning rates and seeds. A run that had not collapsed at its end is censored there."
        )
        drawings.append(Drawing("survival", text, figures.survival(curves, find_baseline(study, comparable))))
    if (figure := figures.throughput(runs)) is not None:
        text = "Throughput against the period, with a fit; a point is a run. Runs side by side share the machine."
        drawings.append(Drawing("throughput", text, figure))
    return drawings


def _image(drawing: Drawing, form: str) -> bytes:
    """The figure as a file, the same for the same data."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _markdown(study: Study, sentences: Sequence[str], drawings: Sequence[Drawing], tables: Sequence[Table]) -> str:
    lines = [
        f"# Study {study.name}",
        f"Report written with {provenance()}.",
        "\n".join(f"- {sentence}" for sentence in sentences),
    ]
    lines += [f"![{drawing.caption}]({drawing.name}.png)" for drawing in drawings]
    for table in tables:
        lines += [f"## {table.title}", table.markdown()]
    return "\n\n".join(lines) + "\n"


def render(
    study: Study, runs: Sequence[Run], sentences: Sequence[str], drawings: Sequence[Drawing], tables: Sequence[Table]
) -> str:
    """The web page, which needs no other file, network or script."""
    seeds = sorted({run.cell.seed for run in runs})
    facts = [
        f"{len(runs)} run{'s' * (len(runs) > 1)} of {study.steps} steps",
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {', '.join(map(str, seeds))}",
        f"Report written with {provenance()}, lightning {version('lightning')}, optuna {version('optuna')}",
    ]
    images = [
        (drawing.caption, 4 * drawing.figure.get_figwidth(), base64.b64encode(_image(drawing, "svg")).decode("ascii"))
        for drawing in drawings
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_PAGE).render(
        name=study.name,
        facts=facts,
        sentences=sentences,
        images=images,
        tables=tables,
        missing=missing(study, runs),
        settings=yaml.safe_dump(study.fingerprint(), sort_keys=False, allow_unicode=True),
    )


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Study {{ name }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
li { margin: .4rem 0; overflow-wrap: anywhere; }
figure { margin: 2rem 0; }
figure img { display: block; width: 100%; max-width: 55rem; height: auto; }
figcaption, .meta { color: #555; font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; min-width: 4rem; }
td { white-space: nowrap; }
td.text { white-space: normal; min-width: 12rem; }
summary { cursor: pointer; font-weight: bold; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .8rem; }
</style>
</head>
<body>
<h1>Study {{ name }}</h1>
<p class="meta">{{ facts|join(" · ") }}</p>
<h2>What the runs show</h2>
<ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
<h2>Figures</h2>
{% for caption, width, data in images %}
<figure>
<div class="wide">
<img style="min-width: {{ width }}rem" alt="{{ caption }}" src="data:image/svg+xml;base64,{{ data }}">
</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<details{{ " open" if table.rows|length <= 40 else "" }}>
<summary>{{ table.rows|length }} rows</summary>
<div class="wide">
<table>
<thead><tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for text in row %}<td{% if text|length > 40 %} class="text"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endfor %}
{% if missing %}
<h2>Without a result: failed or not trained yet</h2>
<ul>
{% for label in missing %}
<li>{{ label }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Settings</h2>
<pre>{{ settings }}</pre>
</body>
</html>
"""
