"""The exported files against the checkpoint they came from."""

from __future__ import annotations

from sparse_exp.stages.base import Context, Outcome


def verify(context: Context) -> Outcome:
    """Hold the exported files against the checkpoint they came from; accuracy and size of each cell."""
    from sparse_exp.export.cells import measure_cells
    from sparse_exp.export.verification import verify_deployment
    from sparse_exp.metrics.recovery import recovery_metrics

    metrics, curves = verify_deployment(context)
    measured, cells = measure_cells(context, metrics)
    metrics |= measured
    metrics |= recovery_metrics(context.facts("baseline"), metrics, context.experiment.hardware.engines)
    return Outcome(metrics=metrics, facts={"curves": curves, "cells": cells})
