"""The deployed file as a version in the tracker's model registry."""

from __future__ import annotations

from sparse_exp import __version__
from sparse_exp.errors import ConfigError
from sparse_exp.files import sha256_of
from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Model


def register(context: Context) -> Outcome:
    """Make the deployed file a version in the tracker's model registry, where that is asked for."""
    from sparse_exp.export.square import FOLDER, MODEL, TORCH
    from sparse_exp.metrics.recovery import recovery_engine

    experiment, run, name = context.experiment, context.run, context.experiment.tracker.register
    if name is None:
        return Outcome()
    engine = recovery_engine(experiment.hardware.engines)
    file = run.path / FOLDER / MODEL if engine == TORCH else context.deployed(engine)
    if "verify" not in run.records or not file.is_file():
        raise ConfigError(
            f"{run.path} has no verified deployment to register. Add export and verify to stages."
        )
    result = run.result()
    map50 = result.get(f"deployed/{engine}/map50")  # torch alone cannot run what was quantized
    tags = {
        **({} if map50 is None else {"map50": f"{map50:.4f}"}),
        "sparsity": f"{result['sparsity/onnx']:.4f}",
        "run": experiment.name,
        "sparse_exp.version": __version__,
    }
    context.tracker.log(Model(file, name, experiment.tracker.alias, tags))
    return Outcome(facts={"name": name, "alias": experiment.tracker.alias, "sha256": sha256_of(file)})
