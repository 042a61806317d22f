"""The finished run as a model of the local zoo."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError
from sparse_exp.runs.directory import Run
from sparse_exp.sources.local import require_free, require_writable, zoo_directory
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Tags
from sparse_exp.zoo.publish import publish_run

_AUTO = "auto"
_log = logging.getLogger(__name__)


def _run(context: Context) -> Outcome:
    experiment = context.experiment
    if experiment.publish is None:
        return Outcome()
    model = publish_run(
        context.run,
        context.zoo,
        stub=experiment.publish,
        numbered=experiment.publish == _AUTO,
        again=True,
        dataset=context.dataset,
    )
    _log.info("Published as %s in %s", model.stub, model.directory)
    stub = {"zoo/stub": model.stub}
    return Outcome(metrics=stub, facts={"directory": str(model.directory)}, events=[Tags(stub)])


def _certain_names(_: Experiment) -> Iterator[str]:
    yield "zoo/stub"


def _check(experiment: Experiment) -> Iterator[str]:
    if experiment.publish is None:
        if experiment.stages == ["publish"]:
            yield "stages=[publish] needs a stub to publish under. Set publish=auto, or publish=STUB."
        return
    zoo = zoo_directory(experiment.paths.zoo)
    missing = [stage for stage in ("evaluate", "export", "publish") if stage not in experiment.stages]
    if missing and not experiment.resume:
        do = "Add it to stages, or set publish=null."
        yield f"publish={experiment.publish} needs the stage {missing[0]}. {do}"
    try:
        require_writable(zoo)
        # A run that goes on may be published already: then by itself.
        if experiment.publish != _AUTO and not experiment.resume:
            replaced = Run.find(Path(experiment.paths.run)) if experiment.overwrite else None
            require_free(experiment.publish, zoo, replaced.key if replaced else None)
    except ConfigError as error:
        yield from error.problems


STAGE = Stage(
    name="publish",
    run=_run,
    depends_on=("publish",),
    light=True,
    outside=True,
    takes_checkpoint=True,
    wanted=lambda experiment: experiment.publish is not None,
    certain_names=_certain_names,
    check=_check,
)
