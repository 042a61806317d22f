"""The data set and the start checkpoint, on this machine and verified."""

from __future__ import annotations

import logging
from typing import Any

from sparse_exp.stages.base import Context, Outcome
from sparse_exp.tracking import Dataset, Tags

_log = logging.getLogger(__name__)


def fetch(context: Context) -> Outcome:
    """Bring the data set and the start checkpoint onto this machine, verified."""
    from sparse_exp.data import check_dataset

    dataset = context.dataset
    boxes = check_dataset(dataset)
    for split, samples in dataset.splits.items():
        _log.info("%s/%s: %d images, %d boxes", dataset.name, split, len(samples), boxes[split])
    facts: dict[str, Any] = {
        "dataset": dataset.digest,
        "boxes": boxes,
        "names": list(dataset.names),
        "skipped": dataset.skipped,
    }
    if "train" in context.experiment.stages:
        facts |= _fetch_start(context)
    origin = {"weights/origin": facts["origin"]} if "origin" in facts else {}
    return Outcome(metrics=origin, facts=facts)


def _fetch_start(context: Context) -> dict[str, str]:
    """Where the start comes from, the sha256 of its file, and the file's origin if it is grown from that."""
    from sparse_exp.sources.start import SCRATCH, fetch_start

    start = fetch_start(context.experiment.model, context.cache, context.zoo)
    if start is None:
        facts = {"origin": SCRATCH, "sha256": ""}
    else:
        facts = {"origin": start.name, "sha256": start.file.sha256}
        facts |= {"grown_from": start.file.origin} if start.grown else {}
        _log.info("Start weights: %s, sha256 %s", start.name, start.file.sha256)
    return facts


def _announce_fetch(context: Context) -> None:
    dataset, facts = context.dataset, context.facts("fetch")
    for split, samples in dataset.splits.items():
        context.tracker.log(Dataset(dataset.name, dataset.digest, str(dataset.root), split, len(samples)))
    tags = {"dataset.digest": facts["dataset"], "dataset.skipped": str(facts["skipped"])}
    weights = {f"weights/{name}": facts.get(name) for name in ("origin", "sha256", "grown_from")}
    context.tracker.log(Tags({**tags, **{name: text for name, text in weights.items() if text}}))
