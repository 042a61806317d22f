"""One short function per stage: a context in, an outcome out.

Stages hand each other files and the facts of their records, never objects, so that each can run
alone and a run can be resumed between any two of them. Libraries are imported when a stage runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from sparse_exp.stages.base import Context, Outcome
from sparse_exp.stages.baseline import _announce_baseline, baseline
from sparse_exp.stages.benchmark import benchmark
from sparse_exp.stages.evaluate import evaluate
from sparse_exp.stages.export import export
from sparse_exp.stages.fetch import _announce_fetch, fetch
from sparse_exp.stages.plan import _announce_plan, plan
from sparse_exp.stages.publish import publish
from sparse_exp.stages.register import register
from sparse_exp.stages.report import report
from sparse_exp.stages.sparsity_csv import announce_sparsity
from sparse_exp.stages.train import _announce_train, train
from sparse_exp.stages.verify import verify

_log = logging.getLogger(__name__)


STAGES: dict[str, Callable[[Context], Outcome]] = {
    function.__name__: function
    for function in (
        fetch, plan, baseline, train, evaluate, export, verify, benchmark, report, publish, register
    )
}  # fmt: skip


_ANNOUNCED: dict[str, Callable[[Context], None]] = {
    "fetch": _announce_fetch,
    "plan": _announce_plan,
    "baseline": _announce_baseline,
    "train": _announce_train,
    "evaluate": lambda context: announce_sparsity(context, "evaluate"),
}


def announce(context: Context, stage: str, *, replay: bool = False) -> None:
    """Tell the tracker what a finished stage found, beside its metrics: from its record and its files alone.

    Args:
        context: of the run, which has the stage's record.
        stage: its name.
        replay: the tracker has seen nothing of it, as it was done by another job or at another time: the
            epochs of a training, too.
    """
    if stage in _ANNOUNCED:
        _ANNOUNCED[stage](context)
    if stage == "train" and replay:
        from sparse_exp.stages.train import epoch_metrics

        for record in json.loads((context.run.path / "history.json").read_text(encoding="utf-8")):
            context.tracker.log(epoch_metrics(record))
