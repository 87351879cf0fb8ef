"""The command `msign`: look into checkpoints, restore one, plan; and ablation studies and the demo by their own."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from csv import writer
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from msign_lightning._extras import need
from msign_lightning.checkpoint_files import find_checkpoints
from msign_lightning.checkpoints import Measured, build, measure, restore_copy, select
from msign_lightning.collapse import Alarm
from msign_lightning.linalg import Rule, gaussian_stable_rank
from msign_lightning.linalg import restore as restore_matrices
from msign_lightning.settings import MonitorSettings, RestorationSettings
from msign_lightning.targets import Target, format_targets, select_targets

FALLEN, HIGH = 0.5, 0.9
"""Ranks have fallen if the last is below half of their highest; they do so from the last above 90 % of it on."""


# --- msign inspect -----------------------------------------------------------------------------------------------


@dataclass
class Look:
    """A checkpoint as it was measured, with the alarms that it raised."""

    path: Path
    step: int
    matrices: list[Measured]
    alarms: list[Alarm] = field(default_factory=list)

    def mean(self, group: str = "") -> float:
        """Geometric mean of the stable ranks, NaN where there are none."""
        logs = [math.log(m.stable_rank) for m in self.matrices if m.stable_rank > 0 and group in ("", m.group)]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan


def inspect(
    checkpoints: list[str],
    *,
    thresholds: Mapping[str, float | None] | None = None,
    top: int = 20,
    csv: Path | None = None,
    json: Path | None = None,
    png: Path | None = None,
    html: Path | None = None,
    **options: Any,
) -> int:
    """Measures stable ranks in checkpoints and says whether they fell, when and where.

    Examples::

        msign inspect runs/mine/checkpoints
        msign inspect checkpoint-1000 checkpoint-2000 --html report.html --csv ranks.csv
        msign inspect ckpt.pt --model my_package.model:make_model
        msign inspect weights.pt --cuts '{"*.qkv.weight": {"sizes": [512, 128, 128], "names": ["q", "k", "v"]}}'

    Args:
        checkpoints: Files or folders of checkpoints, or folders that hold several.
        thresholds: Arguments of `CollapseDetector` that differ from its defaults.
        top: How many matrices to list, the lowest stable ranks first.
        csv: File for all values.
        json: File for all values and the verdict.
        png: File for a figure (needs Matplotlib).
        html: File for a report with a heat map.
        **options: As for `select`.

    Raises:
        ValueError: No checkpoint can be measured, or a file can't be written.
    """
    detector = MonitorSettings(thresholds=thresholds).detector()
    for file in (csv, json, png, html):
        if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()):
            raise ValueError(f"files must be in a folder that can be written to, got {str(file)!r}")
    if png is not None:
        need("ablations", "matplotlib")
    looks, failed, left, numbered = [], {}, "", False
    for path in (paths := find_checkpoints(checkpoints)):
        try:
            selection = select(path, **options)
            count, step = len(selection.parameters), selection.checkpoint.step
            numbered |= step is None
            found = tqdm(measure(selection), path.name, count, unit="parameter", leave=False, disable=None)
            looks.append(Look(path, step or 0, [m for matrices in found for m in matrices]))
            left = f"recognised by {selection.how}; left out: {selection.left_out or 'nothing'}"
        except (ValueError, OSError) as error:
            if len(paths) == 1:
                raise
            failed[path] = str(error)
    if not looks:
        raise ValueError("no checkpoint could be read; " + "; ".join(dict.fromkeys(failed.values())))
    if numbered and len(looks) > 1:
        print("not all checkpoints say their step: they are numbered in the order given")
        for number, look in enumerate(looks):
            look.step = number
    looks.sort(key=lambda look: look.step)
    for look in looks:
        ranks = {m.name: m.stable_rank for m in look.matrices if m.note in ("", "not finite")}
        look.alarms = detector.update(look.step, stable_ranks=ranks)
    verdict = _verdict(looks)
    print(_table(looks, top), left, sep="\n")
    if len(looks) > 1:
        print(_trend(looks))
    print(*verdict, sep="\n")
    for path, reason in failed.items():
        print(f"not read: {path}: {reason}", file=sys.stderr)
    for file, write in ((csv, _write_csv), (json, _write_json), (png, _write_png), (html, _write_html)):
        if file is not None:
            write(looks, verdict, file)
            print(f"written: {file}")
    return 1 if failed or math.isnan(looks[-1].mean()) else 0


def falls_from(values: Sequence[float]) -> int | None:
    """From which value on they fall, to less than half of the highest at the end; None if they don't."""
    highest = max((v for v in values if v > 0), default=0.0)
    if not values or not values[-1] < FALLEN * highest:
        return None
    return max(i for i, value in enumerate(values) if value >= HIGH * highest)


def _verdict(looks: Sequence[Look]) -> list[str]:
    """Lines that say whether stable ranks fell, when, and what to go on from."""
    lines = []
    means = [look.mean() for look in looks]
    if (start := falls_from(means)) is not None:
        lines.append(
            f"stable ranks fall from step {looks[start].step} on: their mean is {means[start]:.3g} there and "
            f"{means[-1]:.3g} at step {looks[-1].step}"
        )
    first = next((i for i, look in enumerate(looks) if look.alarms), None)
    if first is None:
        return [*lines, "verdict: no alarm"]
    for (kind, _), group in groupby(looks[first].alarms, lambda alarm: (alarm.kind, alarm.step)):
        alarms = sorted(group, key=lambda alarm: alarm.value)
        among = f"{len(alarms)} of {len(looks[first].matrices)} matrices, {alarms[0].name} first"
        lines.append(f"verdict: {kind} alarm at step {looks[first].step}: {among} ({alarms[0].value:.3g})")
    good = looks[first - 1].path if first else None
    lines.append(f"last checkpoint before it: {good}" if good else "no checkpoint before it")
    if good:
        lines.append(f"to go on from there: msign restore {shlex.quote(str(good))} NEW")
    return lines


def _table(looks: Sequence[Look], top: int) -> str:
    """The matrices of the last checkpoint, the worst first."""
    history: dict[str, list[tuple[int, float]]] = {}
    for look in looks:
        for m in look.matrices:
            history.setdefault(m.name, []).append((look.step, m.stable_rank))
    rows: list[tuple[str, ...]] = [
        ("matrix", "group", "shape", "stable rank", "of random", "spectral norm", "Frobenius norm", "falls from")
    ]
    last = looks[-1]
    worst = sorted(last.matrices, key=lambda m: (m.note == "", m.stable_rank))
    for m in worst[:top]:
        steps, ranks = zip(*history[m.name], strict=True)
        start = falls_from(ranks)
        values = [f"{m.stable_rank:.4g}", f"{m.stable_rank / gaussian_stable_rank(*m.shape):.0%}"]
        values += [f"{m.spectral_norm:.4g}", f"{m.frobenius_norm:.4g}"]
        values = [m.note, "", "", ""] if m.note else values
        shape = " x ".join(map(str, m.shape))
        rows.append((m.name, m.group, shape, *values, "" if start is None else f"step {steps[start]}"))
    more = f"\n... and {len(worst) - top} more" if len(worst) > top else ""
    return f"{last.path}, step {last.step}\n{_aligned(rows)}{more}"


def _trend(looks: Sequence[Look]) -> str:
    groups = sorted({m.group for look in looks for m in look.matrices})
    rows = [("step", "lowest rank", "mean", *groups, "largest norm", "alarms", "checkpoint")]
    for look in looks:
        ranks = [m.stable_rank for m in look.matrices if m.stable_rank > 0]
        norm = max((m.spectral_norm for m in look.matrices if m.spectral_norm > 0), default=math.nan)
        values = [min(ranks, default=math.nan), look.mean(), *map(look.mean, groups), norm]
        rows.append((str(look.step), *(f"{v:.4g}" for v in values), str(len(look.alarms) or ""), look.path.name))
    return f"\nmeans over the matrices of each checkpoint\n{_aligned(rows)}\n"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _write_csv(looks: Sequence[Look], verdict: Sequence[str], file: Path) -> None:
    with file.open("w", newline="") as opened:
        table = writer(opened)
        table.writerow(("checkpoint", "step", *Measured._fields))
        for look in looks:
            for m in look.matrices:
                table.writerow((look.path, look.step, *m[:2], "x".join(map(str, m.shape)), *m[3:]))


def _write_json(looks: Sequence[Look], verdict: Sequence[str], file: Path) -> None:
    def plain(row: Alarm | Measured) -> dict[str, Any]:  # JSON knows no NaN
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row._asdict().items()}

    keys = ("path", "step", "alarms", "matrices")
    rows = [(str(k.path), k.step, list(map(plain, k.alarms)), list(map(plain, k.matrices))) for k in looks]
    content = [dict(zip(keys, row, strict=True)) for row in rows]
    file.write_text(json.dumps({"verdict": list(verdict), "checkpoints": content}, indent=1))


def _write_png(looks: Sequence[Look], verdict: Sequence[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [look.step for look in looks]
    style = "-" if len(looks) > 1 else "o"
    curves: dict[str, dict[int, float]] = {}
    for look in looks:
        for m in look.matrices:
            curves.setdefault(m.name, {})[look.step] = m.stable_rank
    for curve in curves.values():
        axes.plot(list(curve), list(curve.values()), style, color="0.8", lw=0.6, ms=2)
    for group in sorted({m.group for look in looks for m in look.matrices}):
        axes.plot(steps, [look.mean(group) for look in looks], style, marker="o", ms=3, label=f"mean, {group}")
    for alarm in [alarm for look in looks for alarm in look.alarms if alarm.kind == "stable_rank"][:1]:
        axes.axvline(alarm.step, color="C3", ls=":", lw=1, label=f"alarm: too many below {alarm.threshold:.3g}")
    axes.set(yscale="log", xlabel="step", ylabel="stable rank")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


_COLOURS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Those of viridis, which the colour-blind and a black-and-white print can tell apart; dark is low."""


def _write_html(looks: Sequence[Look], verdict: Sequence[str], file: Path) -> None:
    """A heat map: a row for each layer and, for each kind of matrix, a band with a column for each step."""
    lowest: dict[tuple[str, str, int], Measured] = {}
    for i, look in enumerate(looks):
        for m in look.matrices:
            number = re.search(r"\b\d+\b", m.name)
            place = (re.sub(r"\b\d+\b", "*", m.name).replace(".weight", ""), number[0] if number else "", i)
            if place not in lowest or not m.stable_rank >= lowest[place].stable_rank:  # of experts the worst
                lowest[place] = m
    kinds = list(dict.fromkeys(kind for kind, _, _ in lowest))
    layers = sorted({layer for _, layer, _ in lowest}, key=lambda layer: (not layer, int(layer or 0)))
    width, height = max(3, min(16, 1000 // (len(kinds) * len(looks)))), 8 if len(layers) > 40 else 14
    band = max(width * len(looks), 14) + 6
    top = 12 + 6 * max(map(len, kinds))
    cells = []
    for (kind, layer, i), m in lowest.items():
        x, y = 40 + band * kinds.index(kind) + width * i, top + height * layers.index(layer)
        text = escape(f"{m.name}, step {looks[i].step}: {m.note or f'{m.stable_rank:.4g}'}")
        shape = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        cells.append(f'<rect {shape} fill="{_colour(m)}"><title>{text}</title></rect>')
    for i, kind in enumerate(kinds):
        cells.append(f'<text transform="translate({46 + band * i} {top - 4}) rotate(-90)">{escape(kind)}</text>')
    for i in range(0, len(layers), 1 if height > 10 else 5):
        cells.append(f'<text x="36" y="{top + height * (i + 1) - 2}" text-anchor="end">{layers[i]}</text>')
    size = f'width="{60 + band * len(kinds)}" height="{top + height * len(layers) + 4}"'
    steps = ", ".join(str(look.step) for look in looks)
    scale = "".join(f'<span style="background:#{colour}">&emsp;</span>' for colour in _COLOURS)
    table = escape(_table(looks, 20) + ("\n" + _trend(looks) if len(looks) > 1 else ""))
    file.write_text(
        f"""<!doctype html><meta charset="utf-8"><title>Stable ranks</title>
<style>body{{font:14px sans-serif;margin:2em}}text{{font:10px sans-serif}}pre{{font-size:12px}}</style>
<h1>Stable ranks</h1><p>{"<br>".join(map(escape, verdict))}</p>
<p>Rows are layers; in each band, a column for each of the steps {steps}, from left to right.
Of the experts of a layer the lowest counts. 1 {scale} that of a random matrix of the shape (logarithmic);
<span style="background:#e31a1c">&emsp;</span> not finite, <span style="background:#ddd">&emsp;</span> not read.</p>
<svg {size}>{"".join(cells)}</svg><pre>{table}</pre>
""",
        encoding="utf-8",
    )


def _colour(m: Measured) -> str:
    if m.note or m.stable_rank <= 0:
        return "#e31a1c" if m.note == "not finite" else "#ddd"
    share = math.log(max(m.stable_rank, 1)) / math.log(max(gaussian_stable_rank(*m.shape), 1.001))
    return f"#{_COLOURS[min(int(share * len(_COLOURS)), len(_COLOURS) - 1)]}"


# --- msign restore, msign plan -----------------------------------------------------------------------------------


def restore(checkpoint: Path, out: Path, rule: Rule = "msign", **options: Any) -> int:
    """Copies a checkpoint and restores the stable rank of matrices in the copy; a run can go on from it.

    All else is copied bit for bit, the optimizer's state included. What made the ranks fall is still there: go on at a
    lower learning rate, or with MSign.

    Examples::

        msign restore step=4000.ckpt rescued.ckpt --rule cap
        msign restore checkpoint-2000 rescued --targets attention

    Args:
        checkpoint: File or folder of a checkpoint.
        out: Where the copy goes; nothing may be there.
        rule: "msign", or "cap", which only lifts the stable rank to that of a random matrix.
        **options: As for `select`.
    """
    reports = restore_copy(checkpoint, out, rule, **options)
    rows = [("matrix", "stable rank before", "after")]
    rows += [(r.name, f"{r.stable_rank_before:.4g}", f"{r.stable_rank_after:.4g}") for r in reports if r.changed]
    print(_aligned(rows))
    if skipped := [r.name for r in reports if not r.finite]:
        print(f"left as they are, since they hold NaN or infinity: {', '.join(skipped)}")
    print(f"{out}: {len(rows) - 1} of {len(reports)} matrices restored; all else as in {checkpoint}")
    return 0


def plan(source: str, period: int = 100, **options: Any) -> int:
    """Says which matrices MSign would restore, how they are cut, what is left out, and what it costs here.

    Examples::

        msign plan config.json
        msign plan my_package.model:make_model --period 50 --targets attention
        msign plan checkpoint-2000

    Args:
        source: A checkpoint, a Hugging Face config.json, or what makes a model, package.module:function.
        period: Optimizer steps between two applications.
        **options: As for `select`.
    """
    RestorationSettings(period)
    path = Path(source)
    if path.exists() and path.name != "config.json":
        selection = select(path, **options)
        built, chosen = selection.model, selection.targets
        print(f"recognised by {selection.how}")
    else:
        built = build(source)
        chosen = select_targets(built, **{k: options[k] for k in ("targets", "exclude", "cuts") if k in options})
    print(format_targets(chosen, period=period, model=built))
    on_gpu = torch.cuda.is_available()
    seconds = _seconds(chosen, torch.device("cuda" if on_gpu else "cpu"))
    here = torch.cuda.get_device_name() if on_gpu else f"this CPU ({torch.get_num_threads()} threads)"
    print(f"about {seconds:.2g} s per application on {here}, {seconds / period:.2g} s per step at period {period}")
    if not on_gpu:
        print("on a GPU: unknown, for none is here; python -m benchmarks.application measures it there")
    return 0


def _seconds(targets: Sequence[Target], device: torch.device, budget: float = 1.0) -> float:
    """What one application takes, by the FLOPs, from the largest shape that can be tried in about a second."""
    m, n = max((target.shape for target in targets), key=lambda shape: min(shape) ** 2 * max(shape))
    began, rate, size = time.perf_counter(), 0.0, min(64, max(m, n))
    while True:
        tried = [max(1, round(side * size / max(m, n))) for side in (m, n)]
        matrix = torch.randn(*tried, device=device)
        start = time.perf_counter()
        restore_matrices(matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rate = seconds / (2 * math.prod(tried) * min(tried) + 11 * min(tried) ** 3)
        if size == max(m, n) or time.perf_counter() - began + 8 * seconds > budget:
            return rate * sum(target.svd_flops for target in targets)
        size = min(2 * size, max(m, n))


# --- the command -------------------------------------------------------------------------------------------------

COMMANDS: Mapping[str, Callable[..., int]] = {"inspect": inspect, "restore": restore, "plan": plan}
ELSEWHERE = {"ablate": [], "demo": ["run", "demo", "--folder", "runs"]}
"""Commands of `msign_lightning.ablations` → the first of their arguments there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 0, 1 where a part could not be done, 2 for errors, 130 for an interruption."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in ELSEWHERE:
            studies = import_module("msign_lightning.ablations.__main__")  # which needs the packages of its extra
            return int(studies.main([*ELSEWHERE[given[0]], *given[1:]]))
        need("checkpoints", "jsonargparse")
        name, options = _parse(given)
        return COMMANDS[name](**options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing has been written that is not whole", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of examples."""

    parser = ArgumentParser(
        prog="msign",
        description="Stable ranks in checkpoints: look, plan, rescue.\n\nBesides there are, each with a --help:\n"
        "  msign ablate    ablation studies (python -m msign_lightning.ablations)\n"
        "  msign demo      training with and without MSign, into runs/demo (the study demo)",
        formatter_class=Formatter,
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").partition("    Args:")[0].replace("\n    ", "\n").replace("::", ":").strip()
        sub = ArgumentParser(description=text, formatter_class=Formatter)
        sub.add_argument("--config", action="config", help="YAML file with these options")
        skip: set[str | int] = set()
        if name == "inspect":
            sub.add_argument("checkpoints", nargs="+", type=str, help="files or folders, or folders that hold several")
            skip = {"checkpoints"}
        sub.add_function_arguments(command, as_group=False, as_positional=True, skip=skip)
        commands.add_subcommand(name, sub, help=text.partition("\n")[0])
    config = parser.parse_args(list(arguments))
    options = config[config.command].as_dict()
    options.pop("config", None)
    return config.command, options


if __name__ == "__main__":
    sys.exit(main())
