"""TensorBoard's view of a study: every cell a session of the HParams page, and figures; without TensorFlow.

A cell's session is written to the folder with the scalars of its training, so that both are one run. Files of an
earlier report are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

from msign_lightning.ablations.cell import Cell, show
from msign_lightning.ablations.methods import Scalar, Value
from msign_lightning.ablations.results import Run

SUFFIX = ".report"
METRICS = {
    "outcome/val_loss": "validation loss",
    "outcome/stable": "stable",
    "outcome/stable_rank": "stable rank",
    "outcome/steps_per_second": "steps/s",
}
MISSING = "–"
MANY = 20  # values of a numeric column from which on it is an interval in the page's filter, not a list of boxes


def write(runs: Sequence[Run], figures: Mapping[str, bytes], folder: Path) -> None:
    """Writes what TensorBoard shows of a study with `--logdir folder`.

    Args:
        runs: The study's; the scalars of each are in folder / run.cell.folder.
        figures: Name → PNG file, shown as images of the root's run.
        folder: The study's folder.
    """
    columns = _columns([run.cell for run in runs])
    hparams = [summary_v2.HParam(name, _domain([row[name] for row in columns])) for name in columns[0]]
    metrics = [summary_v2.Metric(tag, display_name=text) for tag, text in METRICS.items()]
    now = time.time()
    config = summary_v2.hparams_config_pb(hparams, metrics, time_created_secs=now)
    _replace(folder, [config, *(_image(f"figures/{name}", png) for name, png in figures.items())], step=0, at=now)
    for run, row in zip(runs, columns, strict=True):
        _session(run, row, folder / run.cell.folder)


def _columns(cells: Sequence[Cell]) -> list[dict[str, Scalar]]:
    """What identifies each cell: the same columns for all, each of one type, which is all that the page knows.

    A column is numeric if all cells have a number there. Else it is text, with a dash where a factor does not concern
    the cell's arm: with an empty value the page would leave the cell out of its parallel coordinates. A diverged run,
    without a validation loss, it leaves out there as long as that metric is selected.
    """
    rows: list[dict[str, Value]] = [{"arm": c.arm, **dict(c.factors), "seed": str(c.seed)} for c in cells]
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {name: {type(row.get(name)) for row in rows} for name in names}
    convert: dict[str, Callable[[Any], Scalar]] = {
        name: float if kind <= {int, float} else bool if kind == {bool} else show for name, kind in kinds.items()
    }
    return [{name: convert[name](row.get(name, MISSING)) for name in names} for row in rows]


def _domain(values: Sequence[Scalar]) -> summary_v2.Domain:
    distinct = set(values)
    if len(distinct) > MANY and all(isinstance(value, float) for value in distinct):
        return summary_v2.RealInterval(min(distinct), max(distinct))
    return summary_v2.Discrete(distinct)


def _session(run: Run, row: Mapping[str, Scalar], folder: Path) -> None:
    """One run's session: its columns, its outcome, and that it has ended, when its training did."""
    ends = [file.stat().st_mtime for file in folder.glob("events.out.tfevents.*") if not file.name.endswith(SUFFIX)]
    end = max(ends, default=time.time())
    start = end - run.outcome.seconds
    outcome = run.outcome
    values = (outcome.val_loss, float(run.stable), outcome.stable_rank, outcome.steps_per_second)
    scalars = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in zip(METRICS, values, strict=True)
        if value is not None
    ]
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=end)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=ended)
    last = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    first = summary_v2.hparams_pb(row, trial_id=run.cell.folder, start_time_secs=start)
    _replace(folder, [first, Summary(value=scalars), Summary(value=[last])], step=outcome.steps, at=end)


def _image(tag: str, png: bytes) -> Summary:
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # of the header
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _replace(folder: Path, summaries: Sequence[Summary], *, step: int, at: float) -> None:
    """Writes an event file, in place of that of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        file.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for summary in summaries:
        writer.add_event(Event(wall_time=at, step=step, summary=summary))
    writer.close()
