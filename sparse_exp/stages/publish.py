"""The finished run as a model of the local zoo."""

from __future__ import annotations

import logging

from sparse_exp.config.plain import as_dict
from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Tags

_log = logging.getLogger(__name__)


def publish(context: Context) -> Outcome:
    """Put the finished run into the local zoo, where the configuration asks for it."""
    from sparse_exp.zoo.publish import AUTO, FinishedRun, publish_run

    experiment, run = context.experiment, context.run
    if experiment.publish is None:
        return Outcome()
    finished = FinishedRun(run.path, as_dict(experiment), run.records, run.state)
    model = publish_run(
        finished,
        context.zoo,
        stub=experiment.publish,
        force=experiment.overwrite,
        numbered=experiment.publish == AUTO,
        dataset=context.dataset,
    )
    _log.info("Published as %s in %s", model.stub, model.directory)
    context.tracker.log(Tags({"zoo/stub": model.stub}))
    return Outcome(metrics={"zoo/stub": model.stub}, facts={"directory": str(model.directory)})
