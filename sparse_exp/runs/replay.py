"""What a tracker is told of a run, from its manifest and files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

from sparse_exp.runs.directory import Run
from sparse_exp.tracking import Event, Metrics, epoch_metrics, from_plain

HISTORY = "history.json"


def told_of(run: Run, stage: str, *, epochs: bool) -> Iterator[tuple[Event, float]]:
    """The events of a finished stage, and when each happened.

    Args:
        run: the run; its record of the stage is read.
        stage: name of the stage.
        epochs: with those of a training, one for each record of the history.

    Yields:
        Events, and seconds since 1970; 0 where that was not recorded.
    """
    record = run.records[stage]
    for plain in record.events:
        yield from_plain(plain, run.path), record.ended
    if epochs and HISTORY in record.outputs:
        for epoch in json.loads((run.path / HISTORY).read_text(encoding="utf-8")):
            yield epoch_metrics(epoch), float(epoch.get("ended", record.ended))
    numbers = {name: float(v) for name, v in record.metrics.items() if isinstance(v, float | int)}
    step = record.step if record.step is not None else 0
    yield Metrics({**numbers, f"time/{stage}_s": record.seconds}, step=step), record.ended
