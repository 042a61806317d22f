"""The plan in words: on the console, in the run's log and in its manifest."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sparse_exp.config.imgsz import in_words
from sparse_exp.config.schema import HardwareConfig
from sparse_exp.hardware import host_facts, usable_physical_cores
from sparse_exp.hardware.targets import prefers
from sparse_exp.metrics.result_rows import work_sentence
from sparse_exp.planning.plan import Plan, PlannedPhase
from sparse_exp.sparsity.prune import BLOCKS
from sparse_exp.text import console_width, plain_text
from sparse_exp.training.phases import last_mosaic

_CHOSEN = {
    "adaptive": "smallest layer-adaptive magnitudes",
    "uniform": "smallest magnitudes of each layer",
    "work": "smallest layer-adaptive magnitudes for the work that they save",
    "speed": "smallest magnitudes of each layer, in shares that harm least for their measured times",
}
_log = logging.getLogger(__name__)


def show_plan(plan: Plan) -> None:
    """Log the plan: on the console and in the run's log alike."""
    _log.info("%s", plain_text(*render(plan), width=console_width()).rstrip())


def render(plan: Plan) -> list[Table | str]:
    """The plan as what is printed: lines and a table."""
    rows = phase_rows(plan)
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column in next(iter(rows), ()):
        table.add_column(column)
    for row in rows:  # several learning rates of a phase go below each other
        table.add_row(*(text.replace(", ", "\n") for text in row.values()))
    lines = [f"{label}: {text}" for label, text in labelled_lines(plan).items()]
    pruning = pruning_sentence(plan)
    warnings = [f"Warning: {warning}" for warning in plan.warnings]
    return [*lines, *([pruning] if pruning else []), *warnings, *([table] if rows else [])]


def as_facts(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for the run's manifest."""
    config, trial = plan.experiment.recipe, plan.trial
    return {
        "prune_to": plan.prune_to,
        "pattern": config.pattern,
        "pruning": pruning_sentence(plan),
        "phases": phase_rows(plan),
        "sparsity": plan.sparsity,
        "layers": dict(plan.layers),
        "shares": dict(plan.speed.shares) if plan.speed else None,
        "final_sparsity": plan.final_sparsity,
        "macs": plan.macs,
        "dense_macs": plan.dense_macs,
        "final_work": plan.final_work,
        "lines": labelled_lines(plan),
        "warnings": list(plan.warnings),
        "sizes": asdict(plan.sizes) if plan.sizes else {},
        "left": list(plan.start.left),
        "anchors": asdict(plan.anchors) if plan.anchors else {},
        "qat_split": trial.qat_split if trial else 1,
        "seconds_per_step": trial.seconds if trial else {},
        "peak_mb": trial.peak_mb if trial else {},
        "estimated_s": plan.seconds,
    }


def pruning_sentence(plan: Plan) -> str:
    """The inserted pruning step; empty when there is none."""
    if plan.prune_to is None:
        return ""
    config = plan.experiment.recipe
    known = "The start checkpoint is dense" if plan.start.sparsity is not None else "Should it be dense"
    out, into = BLOCKS[config.pattern]
    channels = f"{out} output" if out > 1 else f"{into} input"
    blocks = f" in blocks of {channels} channels" if out * into > 1 else ""
    macs, speedup = plan.experiment.model.macs, plan.experiment.model.speedup
    zeros = f"{plan.prune_to:.0%} zeros" if macs is None else f"zeros that leave {macs:.0%} of all work"
    if speedup is not None:
        engine = plan.experiment.hardware.engines[0]
        zeros = f"zeros that make the network {speedup:g} times as fast as dense in {engine}"
    return (
        f"{known}: its prunable convolutions are pruned to {zeros}{blocks} "
        f"({_CHOSEN[config.shares]}) before epoch 0, so that the transfer starts sparse."
    )


def phase_rows(plan: Plan) -> list[dict[str, str]]:
    """A row for each phase, as texts by column; of a recipe that is applied at once only its last phase."""
    if not plan.experiment.recipe.oneshot:
        return [_phase_row(phase) for phase in plan.phases]
    images = f"{plan.experiment.recipe.calibration_images} images"
    return [
        {
            "phase": phase.name,
            "epochs": "none",
            "precision": _precision(phase),
            "calibration": images,
            "sparsity": _sparsity(phase),
        }
        for phase in plan.phases[-1:]
    ]


def _phase_row(phase: PlannedPhase) -> dict[str, str]:
    texts = dict.fromkeys(f"{first:g} to {last:g}" for first, last in phase.rates or ())
    rates = "trainer's" if phase.rates is None else ", ".join(texts) or "as before"
    size, split = phase.batch_size, phase.split
    row = {
        "phase": phase.name,
        "epochs": f"{phase.start:g} to {phase.end:g}",
        "learning rate": rates,
        "EMA": "off" if phase.quantized else "on",
        "precision": _precision(phase),
        "batch": f"{split} x {math.ceil(size / split)}" if split > 1 else str(size),
        "sparsity": _sparsity(phase),
    }
    return row if phase.seconds is None else {**row, "time": duration(phase.seconds)}


def _precision(phase: PlannedPhase) -> str:
    return "int8 in fp32" if phase.quantized else phase.precision


def _sparsity(phase: PlannedPhase) -> str:
    return "that of the start" if phase.sparsity is None else f"{phase.sparsity:.1%}"


def labelled_lines(plan: Plan) -> dict[str, str]:
    """What else there is to say, a line for each label."""
    experiment, start = plan.experiment, plan.start
    setting = {
        "data": f"{experiment.dataset.name}, {in_words(experiment.dataset.imgsz)} px",
        "engines": ", ".join(experiment.hardware.engines),
        "target": _target(experiment.hardware),
        "stages": " -> ".join(experiment.stages),
    }
    if plan.recipe is None:
        return {"checkpoint": start.origin, **setting}
    name, baseline = experiment.model.name, experiment.recovery.baseline
    lines = {"model": f"{name} from {start.origin}"}
    if start.grown_from:
        lines["grown"] = (
            f"from {start.grown_from}: no checkpoint of {name} can be had; this "
            "smaller one is made larger so that it computes nearly the same"
        )
    if start.left:
        lines["left"] = f"{len(start.left)} tensors keep initial class scores: {_shortened(start.left)}"
    lines |= {**setting, "recipe": f"{plan.recipe}, {_training(plan)}", **plan.rules}
    if plan.slimming:
        steps = [f"{share:.0%} from epoch {epoch:g}" for epoch, share in plan.slimming]
        lines["channels"] = f"taken out; of the work stays {', '.join(steps)}"
    elif experiment.recipe.channels is not None:
        lines["channels"] = f"taken out of the start: {experiment.recipe.channels:.0%} of its work is left"
    if plan.distills:
        lines["teacher"] = f"{experiment.recipe.teacher}"
    if not experiment.recipe.oneshot:
        lines["learning rate"] = _schedule(plan)
        if plan.experiment.trainer.augment.mosaic:
            lines["mosaic"] = _mosaic(plan)
    if plan.quantization:
        lines["quantization"] = plan.quantization
    if plan.speed:
        lines["speed-up"] = str(plan.speed)
    if plan.anchors:
        fitted = f", fitted to them (the start's: {plan.anchors.before:.1%})" if plan.anchors.fitted else ""
        lines["anchors"] = f"answer for {plan.anchors.recall:.1%} of the training boxes{fitted}"
    lines["memory layout"] = "channels_last" if plan.channels_last else "contiguous"
    if baseline != "none" and (plan.matches or plan.quantization or plan.distills):
        lines["baseline"] = _baseline(plan, baseline)
    for modifier, layers in plan.matches.items():
        lines[modifier] = f"{len(layers)} layers: {_shortened(layers)}"
    return lines | _estimates(plan)


def _baseline(plan: Plan, wanted: str) -> str:
    if wanted != "auto":
        return f"{wanted} (recovery.baseline)"
    if plan.experiment.recipe.oneshot:
        return "the start itself (recovery.baseline=auto)"
    return (
        f"the dense network, found among earlier runs or trained for {plan.epochs:g} epochs as well, up to "
        "as long again; recovery.baseline=none does without"
    )


def _training(plan: Plan) -> str:
    config, batch = plan.experiment.recipe, plan.experiment.trainer.batch_size
    if config.oneshot:
        return "in one shot, without training"
    return f"{plan.epochs:g} epochs of batch {batch}, {config.optimizer}"


def _schedule(plan: Plan) -> str:
    trainer = plan.experiment.trainer
    own = f"trainer.lr={trainer.lr:g}, trainer.warmup={trainer.warmup:g}"
    if not plan.schedules:
        return f"the trainer's warm-up and cosine ({own})"
    return f"set by the recipe ({', '.join(plan.schedules)}); the trainer's own schedule ({own}) is not used"


def _mosaic(plan: Plan) -> str:
    config = plan.experiment.trainer
    start = next((phase.start for phase in plan.phases if phase.quantized), None)
    last = last_mosaic(config, plan.epochs, start)
    if last >= plan.epochs:
        return f"until the end (trainer.close_mosaic={config.close_mosaic:g})"
    ends = (
        f"the training ends after {plan.epochs:g}"
        if start is None
        else f"quantization begins after {start:g}"
    )
    given = "null" if config.close_mosaic is None else f"{config.close_mosaic:g}"
    return f"up to epoch {max(0.0, last):g}, {ends} (trainer.close_mosaic={given})"


def _estimates(plan: Plan) -> dict[str, str]:
    """Sizes, and what the timed steps showed."""
    lines = {}
    if plan.macs is not None and plan.dense_macs is not None:
        lines["work"] = work_sentence(plan.macs, plan.dense_macs, plan.final_work)
    if sizes := plan.sizes:
        lines["expected sizes"] = (
            f"checkpoint {sizes.checkpoint_mb:.1f} MB, model.onnx {sizes.onnx_mb:.1f} MB, "
            f"compressed {sizes.onnx_gzip_mb:.1f} MB (estimates)"
        )
    if plan.seconds is not None:
        alone = " of one process with the threads of all" if plan.experiment.trainer.devices > 1 else ""
        lines["time"] = f"about {duration(plan.seconds)} of training, from a few timed steps{alone}"
    elif plan.waits_for_start:
        lines["time"] = "estimated once the data and the start checkpoint are on this machine"
    if plan.trial and plan.trial.peak_mb:
        peaks = [f"{peak / 1000:.1f} GB ({kind} steps)" for kind, peak in plan.trial.peak_mb.items()]
        lines["memory"] = f"at most {', '.join(peaks)}"
    if plan.asked_first:
        lines[plan.experiment.model.name] = (
            "not on this machine; the run asks for it first, and grows nothing where it serves: "
            f"{', '.join(plan.asked_first)}"
        )
    return lines


def _target(hardware: HardwareConfig) -> str:
    """What will be measured, and which recipes suit that."""
    cores = ", ".join(map(str, hardware.cores)) or str(usable_physical_cores())
    batches = ", ".join(map(str, hardware.batch_sizes))
    recipes = ", ".join(prefers(hardware, host_facts()).recipes)
    measured = f"{' and '.join(hardware.scenarios)} on {cores} cores, batch {batches}"
    return f"{hardware.name}: {measured}; recipes that suit it: {recipes}"


def _shortened(names: Sequence[str], most: int = 3) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, ... {names[-1]}"


def duration(seconds: float) -> str:
    """Seconds as words: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
