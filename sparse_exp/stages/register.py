"""The deployed file as a version in the tracker's model registry, with the engine that its accuracy is of."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sparse_exp import __version__
from sparse_exp.config.schema import Experiment
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import sha256_of
from sparse_exp.metrics.recovery import recovery_engine
from sparse_exp.runs.deployment import TORCH
from sparse_exp.stages.base import Context, Outcome, Stage
from sparse_exp.tracking import Model

# What MLflow's registry takes, and a URL and a search in it take without quotes. It numbers versions itself.
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_MLFLOWS = "onnxruntime"  # computes what is loaded from the registry
_ALIAS = re.compile(r"(?!latest$|v\d+$)[a-z0-9_-]{1,200}", re.IGNORECASE)


def _run(context: Context) -> Outcome:
    experiment, run, name = context.experiment, context.run, context.experiment.tracker.register
    if name is None:
        return Outcome()
    engines, deployment = experiment.hardware.engines, context.run.deployment
    engine = _MLFLOWS if _MLFLOWS in engines else recovery_engine(engines)
    file = deployment.model if engine == TORCH else deployment.deployed(engine)
    if "verify" not in run.records or not file.is_file():
        raise ConfigError(
            f"{run.path} has no verified deployment to register. Add export and verify to stages."
        )
    result = run.result()
    map50 = result.get(f"deployed/{engine}/map50")  # torch alone cannot run what was quantized
    tags = {
        **({} if map50 is None else {"map50": f"{map50:.4f}"}),
        "engine": engine,
        "sparsity": f"{result['sparsity/onnx']:.4f}",
        "run": experiment.name,
        "sparse_exp.version": __version__,
    }
    facts = {"name": name, "alias": experiment.tracker.alias, "sha256": sha256_of(file)}
    return Outcome(facts=facts, events=[Model(file, name, experiment.tracker.alias, tags)])


def _check(experiment: Experiment) -> Iterator[str]:
    tracker, stages = experiment.tracker, experiment.stages
    name, alias = tracker.register, tracker.alias
    if name is None:
        if alias is not None:
            do = "Set tracker.register=NAME, or leave out tracker.alias."
            yield f"tracker.alias={alias} needs a model to point to. {do}"
        if stages == ["register"]:
            yield "stages=[register] needs a name to register under. Set tracker.register=NAME."
        return
    if not _MODEL_NAME.fullmatch(name):
        do = "For example tracker.register=crowns."
        yield expected("tracker.register", "letters, digits and _ . - (at most 200)", name, do)
    if alias is not None and not _ALIAS.fullmatch(alias):
        do = "For example tracker.alias=candidate."
        yield expected("tracker.alias", "letters, digits, _ and -, not 'latest' or 'v1'", alias, do)
    if tracker.backend != "mlflow":
        do = "Set tracker=mlflow, or leave out tracker.register."
        yield f"tracker.register={name} needs MLflow, but tracker.backend is '{tracker.backend}'. {do}"
    missing = [stage for stage in ("export", "verify", "register") if stage not in stages]
    if missing and not experiment.resume:
        do = "Add it to stages, or leave out tracker.register."
        yield f"tracker.register={name} needs the stage {missing[0]}. {do}"


STAGE = Stage(
    name="register",
    run=_run,
    depends_on=("tracker",),
    light=True,
    outside=True,
    takes_checkpoint=True,
    wanted=lambda experiment: experiment.tracker.register is not None,
    check=_check,
)
