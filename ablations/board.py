"""TensorBoard's view of a study: every cell a session of the HParams page, and figures; without TensorFlow.

A cell's session is written to the folder with the scalars of its training, so that both are one run. Files of an
earlier report are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

from msign_lightning.ablations.cell import show
from msign_lightning.ablations.results import factors_of

SUFFIX = ".report"
METRICS = dict(val_loss="validation loss", stable="stable", stable_rank="stable rank", steps_per_second="steps/s")
MISSING = "–"
MANY = 20  # values of a numeric column from which on it is an interval in the page's filter, not a list of boxes


def write(table: pd.DataFrame, figures: Mapping[str, bytes], folder: Path) -> None:
    """Writes what TensorBoard shows of a study with `--logdir folder`.

    Args:
        table: The study's runs, as of `results.tabulate`; the scalars of each are in the folder of its cell.
        figures: Name → PNG file, shown as images of the root's run.
        folder: The study's folder.
    """
    cells = factors_of(table["group"]).assign(lr=table["lr"], seed=table["seed"].map(str)).apply(_of_one_type)
    hparams = [summary_v2.HParam(name, _domain(cells[name])) for name in cells]
    metrics = [summary_v2.Metric(f"outcome/{name}", display_name=text) for name, text in METRICS.items()]
    now = time.time()
    config = summary_v2.hparams_config_pb(hparams, metrics, time_created_secs=now)
    _replace(folder, [config, *(_image(f"figures/{name}", png) for name, png in figures.items())], step=0, at=now)
    for run, cell in zip(table.to_dict("records"), cells.to_dict("records"), strict=True):
        _session(run, cell, folder / run["group"].cell(run["lr"], run["seed"]).folder)


def _of_one_type(column: pd.Series) -> pd.Series:
    """The column in the one type that the page wants: numbers if all cells have one there; else text.

    There is a dash where a factor does not concern the cell's arm: with an empty value the page would leave the cell
    out of its parallel coordinates.
    """
    kinds = set(map(type, column))
    if kinds <= {int, float} and column.notna().all():
        return column.astype(float)
    return column if kinds == {bool} else column.map(show, na_action="ignore").fillna(MISSING)


def _domain(column: pd.Series) -> summary_v2.Domain:
    if column.nunique() > MANY and column.dtype == float:
        return summary_v2.RealInterval(float(column.min()), float(column.max()))
    return summary_v2.Discrete(set(column))


def _session(run: Mapping[str, Any], cell: Mapping[str, Any], folder: Path) -> None:
    """One run's session: its cell, its outcome, and that it has ended, when its training did."""
    ends = [file.stat().st_mtime for file in folder.glob("events.out.tfevents.*") if not file.name.endswith(SUFFIX)]
    end = max(ends, default=time.time())
    scalars = [Summary.Value(tag=f"outcome/{name}", simple_value=run[name]) for name in METRICS if pd.notna(run[name])]
    ended = {"status": api_pb2.STATUS_SUCCESS, "end_time_secs": end}
    data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
    last = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data, tensor=metadata.NULL_TENSOR)
    first = summary_v2.hparams_pb(cell, trial_id=folder.name, start_time_secs=end - run["seconds"])
    _replace(folder, [first, Summary(value=scalars), Summary(value=[last])], step=run["steps"], at=end)


def _image(tag: str, png: bytes) -> Summary:
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # of the header
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _replace(folder: Path, summaries: Sequence[Summary], *, step: int, at: float) -> None:
    """Writes an event file, in place of that of an earlier report."""
    for file in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        file.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for summary in summaries:
        writer.add_event(Event(wall_time=at, step=step, summary=summary))
    writer.close()
